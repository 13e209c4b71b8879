"""The end of a bucketed set, through kills and with several processes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_t2i.pipeline import finishing, stage
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.buckets import Buckets
from latent_t2i.shards.schema import Manifest
from tests.coco_folders import CocoFolder, make_coco
from tests.object_stores import Store
from tests.stage_one import contents, make_config

TALL, WIDE = (1, 2, 3), (4, 5, 6)
"""Images of each of two buckets."""


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    made = make_coco(tmp_path / "coco", [2] * 6)
    for numbers, shape in ((TALL, (200, 90, 3)), (WIDE, (90, 200, 3))):
        for number in numbers:
            noise = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
            Image.fromarray(noise).save(made.images / f"{number:012d}.png")
    return made


@pytest.fixture
def config(folder: CocoFolder, tmp_path: Path) -> PipelineConfig:
    sizes = {"image_size_px": 64, "bucket_multiple_px": 16}
    return make_config(folder, tmp_path / "out", buckets=True, records_per_shard=1, **sizes)


def at(config: PipelineConfig, tmp_path: Path, url: bool) -> PipelineConfig:
    """Returns the configuration with its output at a URL, if asked for."""
    if not url:
        return config
    Store.faults[:] = []
    out, work = f"store://{tmp_path}/out", str(tmp_path / "work")
    return replace(config, out=out, work_dir=work)


@pytest.mark.parametrize("url", [False, True])
def test_killed_between_the_manifests_of_two_buckets(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: bool
) -> None:
    """The second bucket goes on with the scale of int8 text, which the first one has too."""
    config = at(replace(config, text_dtype="int8"), tmp_path, url)
    build(replace(config, out=str(tmp_path / "whole"), work_dir=None))
    original = finishing.finish_one
    calls = iter([original])
    with monkeypatch.context() as patch:
        patch.setattr(finishing, "finish_one", lambda *rest: next(calls)(*rest))
        with pytest.raises(StopIteration):
            build(config)
    assert len(list((tmp_path / "out").glob("*/manifest.json"))) == 1
    build(config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_deleted_bucket_gets_the_scale_of_a_finished_one(
    config: PipelineConfig, tmp_path: Path
) -> None:
    config = replace(config, text_dtype="int8")
    build(config)
    whole = contents(tmp_path / "out")
    bucket = min(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    shutil.rmtree(bucket)
    build(config)
    assert contents(tmp_path / "out") == whole


def spoil(folder: CocoFolder) -> None:
    """Leaves the header of each image of one bucket only."""
    for number in TALL:
        path = folder.images / f"{number:012d}.png"
        path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("url", [False, True])
def test_two_processes_finish_at_once_and_a_bucket_is_empty(
    folder: CocoFolder,
    config: PipelineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: bool,
) -> None:
    """Rank 0 comes first, and deletes the empty bucket's folder."""
    spoil(folder)
    config = at(replace(config, max_quarantined=0.5), tmp_path, url)
    whole = build(replace(config, out=str(tmp_path / "whole"), work_dir=None))
    original = stage.finish

    def finish(*args: Any, **kwargs: Any) -> dict[str, Manifest]:
        monkeypatch.setattr(stage, "finish", original)
        monkeypatch.setenv("RANK", "0")
        assert build(config).keys() == whole.keys()
        monkeypatch.setenv("RANK", "1")
        return original(*args, **kwargs)

    monkeypatch.setattr(stage, "finish", finish)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert build(config).keys() == whole.keys()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("url", [False, True])
def test_the_reasons_of_an_empty_bucket_stay_when_the_command_is_repeated(
    folder: CocoFolder, config: PipelineConfig, tmp_path: Path, url: bool, capsys: Any
) -> None:
    spoil(folder)
    config = at(replace(config, max_quarantined=0.5), tmp_path, url)
    build(config)
    before, printed = contents(tmp_path / "out"), capsys.readouterr().out
    build(config)
    assert contents(tmp_path / "out") == before
    assert Buckets.load(tmp_path / "out").read_quarantined().keys() == {
        f"{number:012d}" for number in TALL
    }
    last = "images      6 in = 3 written + 3 quarantined"
    assert printed.splitlines()[-1] == last == capsys.readouterr().out.splitlines()[-1]
