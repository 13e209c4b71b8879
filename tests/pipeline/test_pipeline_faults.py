"""What stage one survives: kills at random, a killed colleague, hostile files, a full disk."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.encode import encode_captions, encode_views, load_encoders
from latent_t2i.pipeline.images import load
from latent_t2i.pipeline.sets import make_preprocessing
from latent_t2i.pipeline.sources.locators import read_image_bytes
from latent_t2i.pipeline.sources.open import open_source
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.verify import verify
from tests import tiny
from tests.coco_folders import CocoFolder, make_coco
from tests.hostile import write_hostile, write_special

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 20
LONGEST_RUN_S = 0.6
NUM_SHARDS = 6


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path in the folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def flags_of(folder: CocoFolder, out: Path, *more: str) -> list[str]:
    encoders = tiny.encoders()
    return [
        *("--name", "noise", "--vae", encoders.vae, "--text-encoder", encoders.clip),
        *("--source.images", str(folder.images), "--source.captions", str(folder.captions)),
        *("--max-tokens", "16", "--records-per-shard", "2", "--batch-size", "2"),
        *("--device", "cpu", "--out", str(out), *more),
    ]


RUNNER = """
    import json, os, signal, sys, time
    from pathlib import Path
    from latent_t2i.configs.cli import parse
    from latent_t2i.pipeline import stage
    from latent_t2i.pipeline.config import PipelineConfig
    from latent_t2i.pipeline.encode import find_device, load_encoders

    starts = json.load(sys.stdin)
    config = parse(PipelineConfig, "pipeline", starts[0]["flags"])
    load_encoders(config, find_device("cpu", 0))  # the children need not import what this imports
    original = stage.cut_batches
    found = []
    for start in starts:
        config = parse(PipelineConfig, "pipeline", start["flags"])
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.environ.update(start["environment"])

            def telling(target, *rest):
                os.write(writing, f"shard-{target.plan.index:06d}\\n".encode())
                return original(target, *rest)

            stage.cut_batches = telling
            stage.build(config)
            os._exit(0)
        os.close(writing)
        if start["moment_s"] is not None:
            time.sleep(start["moment_s"])
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(reading) as told:
            begun = told.read().splitlines()
        finished = [path.stem for path in Path(config.out).glob("progress/shard-*.json")]
        found.append({"status": status, "begun": begun, "finished": sorted(finished)})
    print(json.dumps(found))
"""


def start(
    flags: list[str], moment_s: float | None = None, rank: int = 0, num_processes: int = 1
) -> dict[str, Any]:
    """A start of the stage, which is killed after so many seconds, or ends by itself."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    return {"flags": flags, "moment_s": moment_s, "environment": environment}


def run(*starts: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one start after another.

    Returns, for each, its status, the shards that it began, and those that had their reports then.
    """
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUNNER)],
        input=json.dumps(starts),
        env=os.environ | threads,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2, 2, 3, 2, 2, 3, 2, 2, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_killed_at_random_and_started_again(
    folder: CocoFolder, tmp_path: Path, text_dtype: str
) -> None:
    """Byte-identical output, and no shard is begun again once it has its report."""
    whole, killed = (
        flags_of(folder, tmp_path / name, "--text-dtype", text_dtype)
        for name in ("whole", "killed")
    )
    times = random.Random(text_dtype)
    kills = [start(killed, times.uniform(0, LONGEST_RUN_S)) for _ in range(NUM_KILLS)]
    _, *starts = run(start(whole), *kills, start(killed))
    assert starts[-1]["status"] == 0
    assert sum(found["status"] == 9 for found in starts) >= 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for before, after in pairwise(starts):
        assert not {*before["finished"]} & {*after["begun"]}


def test_output_does_not_depend_on_the_number_of_processes(
    folder: CocoFolder, tmp_path: Path
) -> None:
    one = flags_of(folder, tmp_path / "one")
    many = {number: flags_of(folder, tmp_path / str(number)) for number in (2, 4)}
    parts = [start(flags, None, r, n) for n, flags in many.items() for r in range(n)]
    _, *found = run(start(one), *parts)
    for number, mine in ((2, found[:2]), (4, found[2:])):
        assert contents(tmp_path / str(number)) == contents(tmp_path / "one")
        begun = [name for part in mine for name in part["begun"]]
        assert len(begun) == len(set(begun)) == NUM_SHARDS  # each by one process, none twice


@pytest.mark.slow
def test_two_processes_at_once(folder: CocoFolder, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latent_t2i.pipeline.run", *flags_of(folder, tmp_path / "two")]
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert printed.count("images      10 in = 10 written + 0 quarantined") >= 1
    run(start(flags_of(folder, tmp_path / "one")))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_of_two_processes_one_is_killed(folder: CocoFolder, tmp_path: Path) -> None:
    """The other keeps to its share; given again, the commands complete the set."""
    one, two = (flags_of(folder, tmp_path / name) for name in ("one", "two"))
    _, _, other, *again = run(
        start(one),
        start(two, 0.02, rank=0, num_processes=2),
        start(two, None, rank=1, num_processes=2),
        start(two, None, rank=1, num_processes=2),
        start(two, None, rank=0, num_processes=2),
    )
    assert len(other["begun"]) == NUM_SHARDS // 2
    assert again[0]["begun"] == []  # nothing of its own was left, and it did not end the set
    assert again[0]["finished"] and not again[1]["finished"]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def config_of(images: Path, out: Path, **changes: Any) -> PipelineConfig:
    encoders = tiny.encoders()
    values: dict[str, Any] = {
        "name": "hostile",
        "vae": encoders.vae,
        "text_encoder": encoders.clip,
        "source": SourceConfig(kind="folder", images=str(images)),
        "max_tokens": 16,
        "records_per_shard": 5,
        "out": str(out),
        "device": "cpu",
        "max_quarantined": 1.0,
    }
    return PipelineConfig(**(values | changes))


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
    manifests = build(config_of(images, tmp_path / "out", buckets=buckets, image_size_px=64))
    quarantined: dict[str, str] = {}
    if buckets:
        quarantined |= json.loads((tmp_path / "out/buckets.json").read_text())["quarantined"]
    for manifest in manifests.values():
        quarantined |= manifest.quarantined
    reasons = list(quarantined.values())
    told = [reason for reason in expected.values() if reason is not None]
    for reason in sorted([*told, "missing file"], reverse=True):  # whole ones before beginnings
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


def test_buckets_hold_every_image_in_its_shape(coco_mini: Path, tmp_path: Path) -> None:
    source = SourceConfig(
        images=str(coco_mini / "val2017"),
        captions=str(coco_mini / "annotations/captions_val2017.json"),
    )
    config = config_of(
        Path(), tmp_path / "out", source=source, buckets=True, image_size_px=64,
        bucket_multiple_px=16, records_per_shard=50,
    )  # fmt: skip
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


def test_a_disk_too_small_is_told_before_anything_is_written(
    folder: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(images=str(folder.images), captions=str(folder.captions))
    config = config_of(Path(), tmp_path / "out", source=source)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("latent_t2i.model.paths.shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"the shards need .* MB, the disk has 0\.0 MB free: choose"
    ):
        build(config)
    assert not (tmp_path / "out").exists()
    assert build(config_of(Path(), tmp_path / "out", source=source, force=True))
    assert build(config)  # nothing is left to write, so that no room is needed


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    folder: CocoFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SourceConfig(images=str(folder.images), captions=str(folder.captions))
    assert build(config_of(Path(), tmp_path / "out", source=source, dry_run=True)) == {}
    assert not (tmp_path / "out").exists()
    plan = capsys.readouterr().out
    assert "images      10 in\n" in plan and "captions    23, 0 of them will be cut" in plan
    (manifest,) = build(config_of(Path(), tmp_path / "out", source=source)).values()
    assert plan in capsys.readouterr().out
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    told = next(line for line in plan.splitlines() if line.startswith("in all"))
    assert float(told.split()[2]) * 1e6 == pytest.approx(written, rel=0.2)
    assert manifest.num_truncated == 0


@pytest.mark.parametrize("image_size_px", [64, 256])
def test_the_plan_knows_the_size_to_two_percent(
    coco_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], image_size_px: int
) -> None:
    source = SourceConfig(
        images=str(coco_mini / "train2017"),
        captions=str(coco_mini / "annotations/captions_train2017.json"),
    )
    changes: dict[str, Any] = {"source": source, "image_size_px": image_size_px}
    build(config_of(Path(), tmp_path / "out", **changes, max_tokens=77))
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("in all"))
    number, unit = told.split()[2:4]
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert float(number) * {"MB,": 1e6, "GB,": 1e9}[unit] == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("image_size_px", [64, 256])
def test_what_is_stored_is_what_one_image_at_a_time_gives(
    coco_mini: Path, tmp_path: Path, image_size_px: int
) -> None:
    """The embedded encoders on photographs, many in a batch against one by one: within 1 %."""
    source = SourceConfig(
        images=str(coco_mini / "val2017"),
        captions=str(coco_mini / "annotations/captions_val2017.json"),
        num_images=20,
    )
    folders = {"vae": "scenes/encoders/vae", "text_encoder": "scenes/encoders/clip"}
    config = config_of(
        Path(),
        tmp_path / "out",
        source=source,
        image_size_px=image_size_px,
        max_tokens=77,
        **folders,
    )
    build(config)
    encoders = load_encoders(config, torch.device("cpu"))
    how = make_preprocessing(config, (image_size_px, image_size_px))
    records = {record.key: record for record in open_source(config, tmp_path)}
    shards = open_shards(tmp_path / "out")
    places = np.arange(len(shards))
    stored = shards.gather(places, np.zeros(len(places)), np.zeros(len(places)))
    worst = 0.0
    for place, key in enumerate(shards.keys(places)):
        record = records[key]
        picture = load(read_image_bytes(record.locator), how, key=key)
        latent = encode_views(encoders, picture.pixels[None])[0, 0].astype(np.float64)
        text = encode_captions(encoders, record.captions[:1])[0][0].astype(np.float64)
        for found, expected in ((stored.latent[place], latent), (stored.text[place], text)):
            error = np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected)
            worst = max(worst, float(error))
    assert len(places) == 20
    assert worst < 1e-3, worst
