"""Stage one from end to end: photographs, broken images, reruns, and the command."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_t2i.model.encoders import fingerprint, load_text_encoder, load_vae
from latent_t2i.pipeline import stage
from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.run import main as run_main
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.verify import verify
from tests import tiny
from tests.coco_folders import CocoFolder, make_coco
from tests.stage_one import build_one, contents, make_config

SAMPLE_CAPTIONS = "latent_t2i.pipeline.index.Index.sample_captions"


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Runs `python -m pipeline.run` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["pipeline.run", *flags])
    try:
        run_main()
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
    manifest = build_one(config)
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


def test_the_manifest_has_the_hashes_of_the_encoders(folder: CocoFolder, out: Path) -> None:
    build(make_config(folder, out))
    encoders = tiny.encoders()
    _, text_encoder = load_text_encoder(encoders.clip)
    shards = open_shards(
        out,
        vae_sha256=fingerprint(load_vae(encoders.vae)),
        text_sha256=fingerprint(text_encoder),
        verify="full",
    )
    batch = shards.gather(np.arange(6), np.zeros(6), np.zeros(6))
    assert batch.latent.shape == (6, 2 * tiny.LATENT_CHANNELS, 8, 8)
    assert batch.text.shape == (6, 16, tiny.TEXT_WIDTH)
    assert shards.meta(0)["objects"][0]["category"] == "noise"


def test_each_record_has_the_hash_of_its_file(folder: CocoFolder, out: Path) -> None:
    build(make_config(folder, out))
    shards = open_shards(out)
    for meta in map(shards.meta, range(len(shards))):
        content = (folder.images / meta["file_name"]).read_bytes()
        assert meta["image_sha256"] == hashlib.sha256(content).hexdigest()


def test_the_last_line_accounts_for_every_image(
    folder: CocoFolder, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.images / "000000000002.png").write_text("no picture")
    (folder.images / "000000000003.png").unlink()
    annotations = folder.read("captions")["annotations"]
    annotations = [a for a in annotations if a["image_id"] != 5]
    folder.change("captions", annotations=annotations)
    manifest = build_one(make_config(folder, out, max_quarantined=0.5))
    assert manifest.read_quarantined() == {
        "000000000002": "not an image",
        "000000000003": "missing file",
        "000000000005": "no caption",
    }
    assert (manifest.num_source, manifest.num_records, manifest.num_captions) == (6, 3, 7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "images      6 in = 3 written + 3 quarantined"
    assert "quarantined 000000000002.png: not an image" in lines
    # At most 80 columns, apart from the folder, which is a long temporary one here.
    assert max(len(line.replace(str(out), "shards/data/noise/train")) for line in lines) <= 80


def test_too_many_quarantined_images_are_an_error_that_lists_them(
    folder: CocoFolder, out: Path
) -> None:
    (folder.images / "000000000002.png").write_text("no picture")
    config = make_config(folder, out, max_quarantined=0.1)
    message = (
        r"1 of 6 images cannot be used, but --max-quarantined 0\.1 allows 0: "
        r"000000000002.png: not an image \(all in .*quarantined\.json\)"
    )
    with pytest.raises(ValueError, match=message):
        build(config)
    assert not (out / "manifest.json").exists()
    assert json.loads(out.with_name("shards-quarantined.json").read_text()) == {
        "000000000002.png": "not an image"
    }
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert build_one(make_config(folder, out, max_quarantined=0.5)).num_records == 5
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert list(verify(out)) == []


def test_missing_images_are_reported_before_anything_is_encoded(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.images / "000000000002.png").unlink()
    monkeypatch.setattr("latent_t2i.pipeline.stage.write_missing", None)
    with pytest.raises(ValueError, match=r"1 of 6 images .* 000000000002.png: missing file"):
        build(make_config(folder, out))


@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_a_restored_image_is_written_by_the_same_command(
    folder: CocoFolder, tmp_path: Path, text_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, tmp_path / "whole", text_dtype=text_dtype)
    build(config)
    config = dataclasses.replace(config, out=str(tmp_path / "out"))
    images = {name: folder.images / f"00000000000{name}.png" for name in (2, 3, 6)}
    saved = {name: path.read_bytes() for name, path in images.items()}
    images[2].write_bytes(saved[2][:500])
    images[3].write_text("no picture")
    with pytest.raises(ValueError, match="2 of 6 images cannot be used"):
        build(config)
    images[2].write_bytes(saved[2])
    with pytest.raises(ValueError, match=r"1 of 6 images .* 000000000003.png: not an image"):
        build(config)
    tars = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    images[3].write_bytes(saved[3])
    build(config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out-quarantined.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert sum(tars.get(name) == time for name, time in times.items()) == len(times) - 1


def test_a_shard_deleted_during_the_run_is_an_error(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(*args: Any, **kwargs: Any) -> None:
        write_missing(*args, **kwargs)
        (out / "shard-000001.tar").unlink()

    write_missing = stage.write_missing
    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_missing", delete)
        with pytest.raises(ValueError, match="deleted or changed since: start the same command"):
            build(make_config(folder, out))
    assert build_one(make_config(folder, out)).num_records == 6


def test_a_finished_set_says_how_to_retry(
    folder: CocoFolder, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.images / "000000000002.png").write_text("no picture")
    config = make_config(folder, out, max_quarantined=0.5)
    for _ in range(2):
        build(config)
        assert "restore the images and run the same command with --retry" in capsys.readouterr().out


def test_reasons_name_files_not_hashed_keys(tmp_path: Path, out: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("кот.png", "good.png"):
        (images / name).write_text("no picture")
        (images / name).with_suffix(".txt").write_text("a cat")
    config = make_config(SourceConfig(kind="folder", images=str(images)), out)
    with pytest.raises(ValueError, match=r"good.png: not an image; кот.png: not an image"):
        build(config)
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"--source.images: .*{images}.* no images"):
        build(config)


@pytest.mark.parametrize("part", ["vae", "text"])
def test_networks_that_give_nan_stop_the_run_at_the_first_batch(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def load(*args: Any) -> Any:
        encoders = load_encoders(*args)
        network = encoders.vae.network.encoder if part == "vae" else encoders.text.network
        for weights in network.parameters():
            weights.fill_(torch.nan)
        return encoders

    load_encoders = stage.load_encoders
    monkeypatch.setattr(stage, "load_encoders", load)
    config = make_config(folder, out, max_quarantined=1.0, records_per_shard=5)
    name = "latent" if part == "vae" else "text"
    message = rf"{name} is not finite in float16 for each of the first 4 images: use --vae-dtype"
    with pytest.raises(ValueError, match=message):
        build(config)
    assert not list(out.glob("*.tar"))


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


def test_int8_text_is_the_float16_text_within_the_recorded_error(
    folder: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(make_config(folder, tmp_path / "float16"))
    capsys.readouterr()
    manifest = build_one(make_config(folder, tmp_path / "int8", text_dtype="int8"))
    assert list(verify(tmp_path / "int8")) == []
    assert manifest.text_scale is not None
    error, num_captions = manifest.text_scale.relative_error, manifest.text_scale.num_captions
    assert num_captions == 7  # all images share "a picture"
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
    assert wanted.latent.equal(found.latent)
    assert exact.empty_text.equal(stored.empty_text)


def test_values_outside_the_range_of_the_sample_are_reported(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(SAMPLE_CAPTIONS, lambda index, num: {"a": [3]})
    manifest = build_one(make_config(folder, out, text_dtype="int8"))
    assert manifest.text_scale is not None and manifest.text_scale.num_captions == 1
    assert (
        "of the values encoded in this run were outside the sample's range"
        in capsys.readouterr().out
    )
    assert list(verify(out)) == []


def test_a_rerun_keeps_the_scale_of_the_first_run(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, out, text_dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.finishing.finish_set", lambda *args, **kwargs: 1 / 0)
        patch.setattr(SAMPLE_CAPTIONS, lambda index, num: {"a": [3]})
        with pytest.raises(ZeroDivisionError):
            build(config)
    next(iter(out.glob("*.tar"))).unlink()  # one to write again
    monkeypatch.setattr("latent_t2i.pipeline.quantise.find_scale", None)
    manifest = build_one(config)
    assert manifest.text_scale is not None and manifest.text_scale.num_captions == 1
    assert list(verify(out)) == []


def test_no_shard_is_larger_than_the_limits(folder: CocoFolder, out: Path) -> None:
    manifest = build_one(make_config(folder, out, records_per_shard=9))
    assert [shard.records for shard in manifest.shards] == [4, 2]
    limit = max(shard.bytes for shard in manifest.shards) - 1
    changes = {"records_per_shard": 9, "max_shard_bytes": limit}
    manifest = build_one(make_config(folder, out.with_name("cut"), **changes))
    assert [shard.records for shard in manifest.shards] == [2, 2, 2]
    sizes = [path.stat().st_size for path in out.with_name("cut").glob("*.tar")]
    assert max(sizes) <= limit
    assert list(verify(out.with_name("cut"))) == []
    with pytest.raises(ValueError, match=rf"max_shard_bytes: found {limit}, expected 1000000000"):
        build(make_config(folder, out.with_name("cut"), records_per_shard=9))


def test_finished_shards_are_not_encoded_again(
    folder: CocoFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.finishing.finish_set", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(config)
    monkeypatch.setattr("latent_t2i.pipeline.workers.encode_views", None)
    assert build_one(config).num_records == 6


def test_a_folder_of_another_command_is_refused(folder: CocoFolder, out: Path) -> None:
    build(make_config(folder, out))
    with pytest.raises(ValueError, match="max_tokens: found 16, expected 20"):
        build(make_config(folder, out, max_tokens=20))
    other = tiny.make_encoders(out.with_name("encoders"), seed=1)
    message = rf"vae: found .*{tiny.encoders().vae}.* expected '{other.vae}'"
    with pytest.raises(ValueError, match=message):
        build(make_config(folder, out, vae=other.vae))
    folder.change("captions", annotations=folder.read("captions")["annotations"][1:])
    with pytest.raises(
        ValueError, match=r"the source has changed .* 1 \(0+1\) have other captions"
    ):
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
