"""Stage one from end to end: real photographs, broken ones, kills and reruns."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.model.encoders import fingerprint, load_text_encoder, load_vae
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.verify import verify
from tests import tiny
from tests.coco_folders import CocoFolder, make_coco

ROOT = Path(__file__).resolve().parents[2]


def make_config(folder: CocoFolder, out: Path, **changes: Any) -> PipelineConfig:
    encoders = tiny.encoders()
    source = SourceConfig(
        images=str(folder.images), captions=str(folder.captions), instances=str(folder.instances)
    )
    values: dict[str, Any] = {
        "name": "noise",
        "vae": encoders.vae,
        "text_encoder": encoders.clip,
        "source": source,
        "max_tokens": 16,
        "records_per_shard": 2,
        "batch_size": 4,
        "out": str(out),
        "device": "cpu",
    }
    return PipelineConfig(**(values | changes))


def make(config: PipelineConfig) -> Manifest:
    """Builds the one set of a configuration without buckets."""
    return build(config)[""]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path in the folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Runs `python -m pipeline.run` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["pipeline.run", *flags])
    try:
        runpy.run_module("latent_t2i.pipeline.run", run_name="__main__")
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2, 2, 3, 2, 2, 3])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.mark.parametrize("image_size_px", [64, 256])
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_photographs(coco_mini: Path, out: Path, split: str, image_size_px: int) -> None:
    captions = coco_mini / f"annotations/captions_{split}2017.json"
    instances = coco_mini / f"annotations/instances_{split}2017.json"
    folder = CocoFolder(coco_mini / f"{split}2017", captions, instances)
    config = make_config(folder, out, image_size_px=image_size_px, records_per_shard=50)
    manifest = make(config)
    assert manifest.num_source == manifest.num_records == {"train": 80, "val": 79}[split]
    shards = open_shards(out)
    side = image_size_px // 8
    assert manifest.latent_shape == (2 * tiny.LATENT_CHANNELS, side, side)
    expected = sorted(
        (annotation["image_id"], annotation["caption"])
        for annotation in json.loads(captions.read_text())["annotations"]
    )
    metas = [shards.meta(record) for record in range(len(shards))]
    found = [(meta["image_id"], caption) for meta in metas for caption in meta["captions"]]
    assert sorted(found) == expected
    assert all(min(meta["source_size_px"]) > 100 for meta in metas)
    assert list(verify(out)) == []


def test_shards_name_the_encoders_by_their_weights(folder: CocoFolder, out: Path) -> None:
    build(make_config(folder, out))
    encoders = tiny.encoders()
    _, text_encoder = load_text_encoder(encoders.clip)
    shards = open_shards(
        out,
        vae_sha256=fingerprint(load_vae(encoders.vae)),
        text_sha256=fingerprint(text_encoder),
        verify=True,
    )
    batch = shards.gather(np.arange(6), np.zeros(6), np.zeros(6))
    assert batch.latent.shape == (6, 2 * tiny.LATENT_CHANNELS, 8, 8)
    assert batch.text.shape == (6, 16, tiny.TEXT_WIDTH)
    assert shards.meta(0)["objects"][0]["category"] == "noise"


def test_the_last_line_accounts_for_every_image(
    folder: CocoFolder, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.images / "000000000002.png").write_text("no picture")
    (folder.images / "000000000003.png").unlink()
    annotations = folder.read("captions")["annotations"]
    annotations = [a for a in annotations if a["image_id"] != 5]
    folder.change("captions", annotations=annotations)
    manifest = make(make_config(folder, out, max_quarantined=0.5))
    assert manifest.quarantined == {
        "000000000002": "not an image",
        "000000000003": "missing file",
        "000000000005": "no caption",
    }
    assert (manifest.num_source, manifest.num_records, manifest.num_captions) == (6, 3, 7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "images      6 in = 3 written + 3 quarantined"
    assert "left out    000000000002: not an image" in lines
    # Widths are held to 80 columns but for the folder, which here is a long temporary one.
    assert max(len(line.replace(str(out), "shards/data/noise/train")) for line in lines) <= 80


def test_too_many_left_out_is_an_error_that_lists_them(folder: CocoFolder, out: Path) -> None:
    (folder.images / "000000000002.png").write_text("no picture")
    config = make_config(folder, out, max_quarantined=0.1)
    message = (
        r"1 of 6 images have to be left out, --max-quarantined 0\.1 allows 0: "
        r"000000000002: not an image \(all in .*quarantined\.json\)"
    )
    with pytest.raises(ValueError, match=message):
        build(config)
    assert not (out / "manifest.json").exists()
    assert json.loads(out.with_name("shards-quarantined.json").read_text()) == {
        "000000000002": "not an image"
    }
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert make(make_config(folder, out, max_quarantined=0.5)).num_records == 5
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert list(verify(out)) == []


def test_missing_images_are_told_before_anything_is_encoded(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.images / "000000000002.png").unlink()
    monkeypatch.setattr("latent_t2i.pipeline.stage.encode_missing", None)
    with pytest.raises(ValueError, match=r"1 of 6 images .* 000000000002: missing file"):
        build(make_config(folder, out))


def test_folder_of_other_images_is_named(folder: CocoFolder, out: Path) -> None:
    for path in list(folder.images.iterdir())[:4]:
        path.unlink()
    message = rf"4 of the 6 images in the captions file are not in {folder.images}, such as 0"
    with pytest.raises(ValueError, match=message):
        build(make_config(folder, out))
    assert not out.exists()


@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_same_source_gives_the_same_bytes(
    folder: CocoFolder, tmp_path: Path, text_dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        build(make_config(folder, tmp_path / name, text_dtype=text_dtype))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    build(make_config(folder, tmp_path / "a", text_dtype=text_dtype))
    assert "is finished already: nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}


def test_int8_text_is_the_float16_text_within_the_noted_error(
    folder: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(make_config(folder, tmp_path / "float16"))
    capsys.readouterr()
    manifest = make(make_config(folder, tmp_path / "int8", text_dtype="int8"))
    assert list(verify(tmp_path / "int8")) == []
    assert manifest.text_scale is not None
    error, num_captions = manifest.text_scale.relative_error, manifest.text_scale.num_captions
    assert num_captions == 7  # "a picture" is everyone's
    line = f"text        int8 16x32, relative error {error:.2%} on 7 captions"
    assert line in capsys.readouterr().out.splitlines()
    exact, stored = open_shards(tmp_path / "float16"), open_shards(tmp_path / "int8")
    assert stored.text_scale is not None
    u = np.full(6, 0.99)  # the last caption of each image: all different
    wanted, found = (shards.gather(np.arange(6), u, u) for shards in (exact, stored))
    text, restored = wanted.text.float(), found.text * stored.text_scale
    assert ((restored - text).norm() / text.norm()).item() == pytest.approx(error, rel=0.3)
    assert 0 < error < 0.01
    assert (restored - text).abs().amax((0, 1)).le(stored.text_scale * 0.51).all()
    assert wanted.latent.equal(found.latent) and wanted.tokens.equal(found.tokens)
    assert exact.empty_text.equal(stored.empty_text)


def test_values_beyond_the_sample_are_told(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("latent_t2i.pipeline.index.Index.captions", lambda index, most: ["a"])
    manifest = make(make_config(folder, out, text_dtype="int8"))
    assert manifest.text_scale is not None and manifest.text_scale.num_captions == 1
    assert "of this run's values were beyond the sample's range" in capsys.readouterr().out
    assert list(verify(out)) == []


def test_the_scale_is_decided_once(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun takes the scale that the killed run's shards have, not one of its own."""
    config = make_config(folder, out, text_dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.finish.finish_set", lambda *args, **kwargs: 1 / 0)
        patch.setattr("latent_t2i.pipeline.index.Index.captions", lambda index, most: ["picture 1"])
        with pytest.raises(ZeroDivisionError):
            build(config)
    next(iter(out.glob("*.tar"))).unlink()  # one to write again
    monkeypatch.setattr("latent_t2i.pipeline.stage.find_scale", None)
    manifest = make(config)
    assert manifest.text_scale is not None and manifest.text_scale.num_captions == 1
    assert list(verify(out)) == []


def test_no_shard_is_larger_than_asked_for(folder: CocoFolder, out: Path) -> None:
    manifest = make(make_config(folder, out, records_per_shard=9))
    assert [shard.records for shard in manifest.shards] == [4, 2]
    limit = max(shard.bytes for shard in manifest.shards) - 1
    changes = {"records_per_shard": 9, "max_shard_bytes": limit}
    manifest = make(make_config(folder, out.with_name("cut"), **changes))
    assert [shard.records for shard in manifest.shards] == [2, 2, 2]
    sizes = [path.stat().st_size for path in out.with_name("cut").glob("*.tar")]
    assert max(sizes) <= limit
    assert list(verify(out.with_name("cut"))) == []
    with pytest.raises(ValueError, match=rf"max_shard_bytes: found {limit}, asked for 1000000000"):
        build(make_config(folder, out.with_name("cut"), records_per_shard=9))


MOMENTS = [
    ("fsync", 1),  # of the provenance
    ("write", 1),  # of the first record
    ("fsync", 3),  # of the first shard
    ("replace", 2),  # the first shard's rename
    ("replace", 3),  # its report's rename: the shard has its name
    ("fsync", 6),  # of the folder of that report
    ("write", 2),  # the third record, the second being unreadable
    ("replace", 9),  # the manifest's rename, all shards being finished
    ("fsync", 6),  # of the folder of the manifest
    ("rmtree", 1),  # of the reports
]
"""The call, counted from the start of each run, at which that run is killed."""

INT8_MOMENTS = [
    ("fsync", 3),  # of the scale, after the provenance
    ("replace", 2),  # the scale's rename
    ("fsync", 4),  # of the folder of the scale, which has its name
    ("write", 1),  # of the first record
    ("replace", 3),  # the first shard's report's rename: the scale is not written again
    ("write", 2),
    ("replace", 11),  # the scale's rename in the set, all shards being finished
    ("replace", 4),  # the manifest's rename
    ("rmtree", 1),  # of the reports and the scale they have
]

KILLER = """
    import json, os, signal, sys
    from pathlib import Path
    from latent_t2i.configs.cli import parse
    from latent_t2i.pipeline.config import PipelineConfig
    from latent_t2i.pipeline.encode import find_device, load_encoders
    from latent_t2i.pipeline.stage import build
    from latent_t2i.shards import writer

    def kill_at(owner, name, count):
        original = getattr(owner, name)
        calls = iter(range(1, count + 1))

        def counting(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counting)

    config = parse(PipelineConfig, "pipeline", sys.argv[2:])
    load_encoders(config, find_device("cpu", 0))  # the children need not import what this imports
    owners = {"write": writer.ShardWriter, "fsync": os, "replace": Path, "rmtree": writer.shutil}
    statuses = []
    for name, count in json.loads(sys.argv[1]):
        pid = os.fork()
        if not pid:
            kill_at(owners[name], name, count)
            build(config)
            os._exit(0)
        statuses.append(os.waitpid(pid, 0)[1])
    print(json.dumps(statuses))
"""


@pytest.mark.parametrize(
    ("text_dtype", "moments"),
    [pytest.param("float16", MOMENTS, marks=pytest.mark.slow), ("int8", INT8_MOMENTS)],
)
def test_killed_anywhere_and_started_again_gives_the_same_bytes(
    folder: CocoFolder, tmp_path: Path, text_dtype: str, moments: list[tuple[str, int]]
) -> None:
    """Real SIGKILLs, one after another: each run goes on from where the last was killed."""
    (folder.images / "000000000002.png").write_text("no picture")
    changes = {"records_per_shard": 1, "max_quarantined": 0.5, "text_dtype": text_dtype}
    build(make_config(folder, tmp_path / "whole", **changes))
    config = make_config(folder, tmp_path / "killed", **changes)
    flags = ["--name", "noise", "--vae", config.vae, "--text-encoder", config.text_encoder]
    flags += ["--source.images", config.source.images, "--source.captions"]
    flags += [config.source.captions, "--source.instances", str(config.source.instances)]
    flags += ["--max-tokens", "16", "--records-per-shard", "1", "--batch-size", "4"]
    flags += ["--out", str(config.out), "--device", "cpu", "--max-quarantined", "0.5"]
    flags += ["--text-dtype", text_dtype]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), json.dumps(moments), *flags],
        env=os.environ | threads,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(killed.stdout.splitlines()[-1]) == [9] * len(moments), killed.stderr
    assert (tmp_path / "killed/manifest.json").exists()  # the last kill was after it
    build(config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_finished_shards_are_not_encoded_again(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.finish.finish_set", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(config)
    monkeypatch.setattr("latent_t2i.pipeline.workers.encode_views", None)
    assert make(config).num_records == 6


def test_a_folder_of_another_command_is_refused(folder: CocoFolder, out: Path) -> None:
    build(make_config(folder, out))
    with pytest.raises(ValueError, match="max_tokens: found 16, asked for 20"):
        build(make_config(folder, out, max_tokens=20))
    other = tiny.make_encoders(out.with_name("encoders"), seed=1)
    message = rf"vae: found .*{tiny.encoders().vae}.* asked for '{other.vae}'"
    with pytest.raises(ValueError, match=message):
        build(make_config(folder, out, vae=other.vae))
    folder.change("captions", annotations=folder.read("captions")["annotations"][1:])
    with pytest.raises(ValueError, match=r"source\.sha256: found '\w{64}', asked for '\w{64}'"):
        build(make_config(folder, out))


def test_command_with_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders = tiny.encoders()
    out = tmp_path / "demo"
    flags = ["--name", "demo", "--vae", encoders.vae, "--text-encoder", encoders.clip]
    flags += ["--source.kind", "scenes", "--source.num-images", "5", "--out", str(out)]
    assert run(monkeypatch, *flags) == 0
    assert capsys.readouterr().out.endswith("images      5 in = 5 written + 0 quarantined\n")
    assert open_shards(out).manifest.num_captions == 25


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("latent_t2i.pipeline.stage.output_root", lambda: tmp_path)
    folder = make_coco(tmp_path / "coco", [1])
    config = dataclasses.replace(make_config(folder, tmp_path), out=None, split="val")
    build(config)
    assert (tmp_path / "shards/data/noise/val/manifest.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--source.images", "nowhere"), "error: --source.images: 'nowhere' does not exist"),
        (("--source.captions", "README.md"), "not JSON, expected a COCO annotation file"),
        (("--image-size-px", "60"), "error: --image-size-px: 60 is not a multiple of 8"),
        (("--vae", "no/vae"), "error: --vae: "),
        (("--sauce.images", "x"), "error: unknown flag --sauce.images, did you mean"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(
    folder: CocoFolder,
    out: Path,
    flags: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoders = tiny.encoders()
    given = ["--name", "noise", "--vae", encoders.vae, "--text-encoder", encoders.clip]
    given += ["--source.images", str(folder.images), "--source.captions", str(folder.captions)]
    assert run(monkeypatch, *given, "--out", str(out), *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()
