"""Faults that stage one survives: kills, unreadable files, a full disk."""

import json
import random
import shutil
import signal
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.encode import encode_captions, encode_views
from latent_t2i.pipeline.images import Preprocessing, load
from latent_t2i.pipeline.sources.locators import read_image_bytes
from latent_t2i.pipeline.sources.open import open_source
from latent_t2i.pipeline.stage import build, load_encoders
from latent_t2i.shards.buckets import Buckets
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.verify import verify
from tests.coco_folders import CocoFolder, make_coco
from tests.hostile import write_hostile, write_special
from tests.stage_one import Moment, begun, contents, make_config, random_kills, run, start

NUM_KILLS = 20
NUM_SHARDS = 6

KILLS: list[Moment] = [
    "provenance.json",
    ("write", 1),  # of the first record
    ("fsync", 3),  # of the first shard
    "shard-000000.tar",
    "shard-000000.json",  # its report: the shard has its name
    ("fsync", 6),
    ("write", 2),
    "manifest.json",  # after all shards
    ("rmtree", 1),  # of the reports
]
"""The moment at which each run in turn kills itself."""
INT8_KILLS: list[Moment] = [
    "text_scale.json",
    ("fsync", 4),  # of the folder of the scale, after its rename
    ("write", 1),
    "shard-000000.json",
    ("write", 2),
    "text_scale.npy",  # after all shards
    "manifest.json",
    ("rmtree", 1),  # of the reports and the scale
]


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2, 2, 3, 2, 2, 3, 2, 2, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_killed_at_random_and_started_again(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext, text_dtype: str
) -> None:
    """The bytes are those of one run, and no shard is begun again once it has its report."""
    config = make_config(folder, tmp_path / "killed", text_dtype=text_dtype)
    build(replace(config, out=str(tmp_path / "whole")))
    finished: set[str] = set()
    num_killed = 0
    for number, kill in enumerate(random_kills(random.Random(text_dtype), NUM_KILLS)):
        log = tmp_path / f"{number}.log"
        exit_code = run(forks, config, kill_at=kill, log=log)
        assert exit_code in (0, -signal.SIGKILL)
        num_killed += exit_code == -signal.SIGKILL
        assert not finished & {*begun(log)}
        finished |= {path.stem for path in (tmp_path / "killed/progress").glob("shard-*.json")}
    assert num_killed >= NUM_SHARDS - 1
    assert run(forks, config) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("text_dtype", "kills"),
    [pytest.param("float16", KILLS, marks=pytest.mark.slow), ("int8", INT8_KILLS)],
)
def test_killed_anywhere_and_started_again_gives_the_same_bytes(
    tmp_path: Path, forks: ForkServerContext, text_dtype: str, kills: list[Moment]
) -> None:
    folder = make_coco(tmp_path / "coco", [2, 2, 3, 2, 2, 3])
    (folder.images / "000000000002.png").write_text("no picture")
    changes = {"records_per_shard": 1, "max_quarantined": 0.5, "text_dtype": text_dtype}
    config = make_config(folder, tmp_path / "killed", **changes)
    build(replace(config, out=str(tmp_path / "whole")))
    exit_codes = [run(forks, config, kill_at=kill) for kill in kills]
    assert exit_codes == [-signal.SIGKILL] * len(kills)
    assert (tmp_path / "killed/manifest.json").exists()  # written before the last kill
    build(config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_output_does_not_depend_on_the_number_of_processes(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext
) -> None:
    config = make_config(folder, tmp_path / "one")
    build(config)
    for number in (2, 4):
        config = replace(config, out=str(tmp_path / str(number)))
        log = tmp_path / f"{number}.log"
        for rank in range(number):
            assert run(forks, config, rank=rank, num_processes=number, log=log) == 0
        assert contents(tmp_path / str(number)) == contents(tmp_path / "one")
        assert len(begun(log)) == len({*begun(log)}) == NUM_SHARDS  # none by two processes


def test_two_processes_at_once(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext
) -> None:
    config = make_config(folder, tmp_path / "two")
    log = tmp_path / "log"
    both = [start(forks, config, rank=rank, num_processes=2, log=log) for rank in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert "images      10 in = 10 written + 0 quarantined" in log.read_text()
    build(replace(config, out=str(tmp_path / "one")))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_one_of_two_processes_is_killed(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext
) -> None:
    """The other writes its own share only; the same commands again complete the set."""
    config = make_config(folder, tmp_path / "two")
    build(replace(config, out=str(tmp_path / "one")))
    assert run(forks, config, rank=0, num_processes=2, kill_at=("write", 1)) == -signal.SIGKILL
    for rank, name, num_begun in ((1, "first", 3), (1, "again", 0), (0, "other", 3)):
        assert not (tmp_path / "two/manifest.json").exists()
        log = tmp_path / f"{name}.log"
        assert run(forks, config, rank=rank, num_processes=2, log=log) == 0
        assert len(begun(log)) == num_begun
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("buckets", [False, True])
def test_hostile_files_are_each_accounted_for(
    tmp_path: Path, buckets: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    expected = write_hostile(images) | write_special(images)
    captions = {name: f"a picture called {name}" for name in expected}
    good = [name for name, reason in expected.items() if reason is None]
    captions[good[0]] = "🐕🐈 " * 20  # an emoji may be many tokens
    captions[good[1]] = "very long " * 2000
    captions[good[2]] = "ünïcödé 漢字"
    captions["gone.jpg"] = "a file that is not there"
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    twin = Path(good[0]).with_suffix(".tiff").name  # two records with one key
    shutil.copy(images / good[0], images / twin)
    lines.append(json.dumps({"file_name": twin, "text": "again"}))
    (images / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = SourceConfig(kind="folder", images=str(images))
    config = make_config(source, tmp_path / "out", buckets=buckets, max_quarantined=1.0)
    manifests = build(config)
    quarantined: dict[str, str] = {}
    if buckets:
        quarantined |= Buckets.load(tmp_path / "out").read_quarantined()
    for manifest in manifests.values():
        quarantined |= manifest.read_quarantined()
    reasons = list(quarantined.values())
    wanted = [reason for reason in expected.values() if reason is not None]
    for reason in sorted([*wanted, "missing file"], reverse=True):  # a prefix after whole reasons
        fits = [found for found in reasons if found == reason]
        if reason.endswith(": "):
            fits = [found for found in reasons if found.startswith(reason)]
        assert fits, reason
        reasons.remove(fits[0])
    twice = [reason for reason in reasons if reason.startswith("another record has the key")]
    assert twice == reasons and len(twice) == 1
    written = sum(manifest.num_records for manifest in manifests.values())
    assert written + len(quarantined) == len(captions) + 1
    line = (
        f"images      {len(captions) + 1} in = {written} written + {len(quarantined)} quarantined"
    )
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert list(verify(tmp_path / "out")) == []


def read_captions(manifests: dict[str, Manifest], out: Path) -> set[str]:
    found: set[str] = set()
    for name in manifests:
        shards = open_shards(out / name)
        for record in range(len(shards)):
            found |= set(shards.meta(record)["captions"])
    return found


def test_every_image_is_in_the_bucket_of_its_aspect_ratio(coco_mini: Path, tmp_path: Path) -> None:
    source = SourceConfig(
        images=str(coco_mini / "val2017"),
        captions=str(coco_mini / "annotations/captions_val2017.json"),
    )
    changes = {"buckets": True, "bucket_multiple_px": 16, "records_per_shard": 50}
    config = make_config(source, tmp_path / "out", **changes)
    manifests = build(config)
    assert sum(manifest.num_records for manifest in manifests.values()) == 79
    assert len(manifests) > 2
    for name, manifest in manifests.items():
        width, height = map(int, name.split("x"))
        assert manifest.latent_shape[1:] == (height // 8, width // 8)
        assert width * height <= 64 * 64
        shards = open_shards(tmp_path / "out" / name)
        for record in range(len(shards)):
            source_width, source_height = shards.meta(record)["source_size_px"]
            if width != height:
                assert (source_width > source_height) == (width > height)
    annotations = json.loads(Path(source.captions).read_text())["annotations"]
    assert read_captions(manifests, tmp_path / "out") == {a["caption"] for a in annotations}
    assert list(verify(tmp_path / "out")) == []
    before = contents(tmp_path / "out")
    assert build(config) == manifests
    assert contents(tmp_path / "out") == before


def test_a_full_disk_is_reported_before_anything_is_written(
    folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("latent_t2i.model.paths.shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"the shards need .* MB, but the disk has 0\.0 MB free: choose"
    ):
        build(config)
    assert not (tmp_path / "out").exists()
    assert build(replace(config, force=True))
    assert build(config)  # nothing to write needs no space


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    folder: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(folder, tmp_path / "out", records_per_shard=5)
    assert build(replace(config, dry_run=True)) == {}
    assert not (tmp_path / "out").exists()
    plan = capsys.readouterr().out
    assert "images      10 in\n" in plan and "captions    23, 0 of them will be truncated" in plan
    (manifest,) = build(config).values()
    assert plan in capsys.readouterr().out
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    total = next(line for line in plan.splitlines() if line.startswith("total"))
    assert float(total.split()[1]) * 1e6 == pytest.approx(written, rel=0.2)
    assert manifest.num_truncated == 0


@pytest.mark.parametrize("buckets", [False, True])
def test_a_dry_run_counts_missing_files(
    folder: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], buckets: bool
) -> None:
    for number in (3, 5, 7):
        (folder.images / f"00000000000{number}.png").unlink()
    config = make_config(folder, tmp_path / "out", buckets=buckets, dry_run=True)
    assert build(config) == {}
    assert not [path for path in tmp_path.iterdir() if path.name != "coco"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"images      10 in, 3 {'cannot be used' if buckets else 'missing files'}"
    assert lines[-1].startswith("this run would be refused: 3 of 10 images cannot be used, but")
    assert "000000000003.png: missing file" in lines[-1]


@pytest.mark.parametrize("image_size_px", [64, 256])
def test_the_planned_size_is_right_within_two_percent(
    coco_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], image_size_px: int
) -> None:
    source = SourceConfig(
        images=str(coco_mini / "train2017"),
        captions=str(coco_mini / "annotations/captions_train2017.json"),
    )
    changes = {"image_size_px": image_size_px, "max_tokens": 77, "records_per_shard": 5}
    build(make_config(source, tmp_path / "out", **changes))
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    number, unit = total.split()[1:3]
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert float(number) * {"MB,": 1e6, "GB,": 1e9}[unit] == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("image_size_px", [64, 256])
def test_stored_values_equal_those_of_one_image_at_a_time(
    coco_mini: Path, tmp_path: Path, image_size_px: int
) -> None:
    """With the embedded encoders on photographs, batches differ by less than 0.1 %."""
    source = SourceConfig(
        images=str(coco_mini / "val2017"),
        captions=str(coco_mini / "annotations/captions_val2017.json"),
        num_images=20,
    )
    changes = {"vae": "scenes/encoders/vae", "text_encoder": "scenes/encoders/clip"}
    sizes = {"image_size_px": image_size_px, "max_tokens": 77}
    config = make_config(source, tmp_path / "out", **changes, **sizes)
    build(config)
    encoders = load_encoders(config, torch.device("cpu"))
    preprocessing = Preprocessing(size_px=(image_size_px, image_size_px))
    records = {record.key: record for record in open_source(source)}
    shards = open_shards(tmp_path / "out")
    numbers = np.arange(len(shards))
    stored = shards.gather(numbers, np.zeros(len(numbers)), np.zeros(len(numbers)))
    worst = 0.0
    for number, key in enumerate(shards.keys(numbers)):
        record = records[key]
        picture = load(read_image_bytes(record.locator), preprocessing, key=key)
        latent = encode_views(encoders, picture.pixels[:, None])["latent"][0, 0]
        (token_ids,) = encoders.text.tokenize(record.captions[:1])
        text = encode_captions(encoders, {record.captions[0]: token_ids})["text"][0]
        for found, expected in ((stored.latent[number], latent), (stored.text[number], text)):
            exact = expected.astype(np.float64)
            error = np.linalg.norm(found.numpy() - exact) / np.linalg.norm(exact)
            worst = max(worst, float(error))
    assert len(numbers) == 20
    assert worst < 1e-3, worst
