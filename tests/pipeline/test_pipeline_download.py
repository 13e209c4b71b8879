"""Downloads of COCO: resumed, verified, unpacked completely or not at all."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.configs.cli import parse
from latent_t2i.pipeline import download as module
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.download import ARCHIVES, DEFAULT_FOLDER, download, main
from tests.servers import Server, serve

ROOT = Path(__file__).resolve().parents[2]
COMPLETE = {"train2014": 12, "val2014": 7, "annotations": 6}
"""Number of files in each folder."""
TRAIN, VAL = "zips/train2014.zip", "zips/val2014.zip"


def publish(folder: Path, name: str, members: dict[str, bytes]) -> None:
    """Writes a zip to be served and replaces its entry in ARCHIVES."""
    path = folder / ("annotations" if "_" in name else "zips") / f"{name}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in members.items():
            file.writestr(member, content)
    content = path.read_bytes()
    num_files = sum(member.endswith((".jpg", ".json")) for member in members)
    module.ARCHIVES[name] = num_files, len(content), hashlib.sha256(content).hexdigest()


def photos(name: str, number: int) -> dict[str, bytes]:
    random = np.random.default_rng(number)
    return {f"{name}/COCO_{name}_{n:012d}.jpg": random.bytes(30_000) for n in range(number)}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with small releases of both years."""
    monkeypatch.setattr(module, "ARCHIVES", {})
    for year in ("2014", "2017"):
        publish(tmp_path / "served", f"train{year}", photos(f"train{year}", 12))
        publish(tmp_path / "served", f"val{year}", photos(f"val{year}", 7))
        kinds = [f"{k}_{s}{year}" for k in ("captions", "instances", "x") for s in ("train", "val")]
        files = {f"annotations/{kind}.json": json.dumps(kind).encode() for kind in kinds}
        publish(tmp_path / "served", f"annotations_trainval{year}", files)
    with serve(tmp_path / "served") as server:
        yield server


@pytest.fixture(params=["curl", "urllib"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which program downloads."""
    if request.param == "urllib":
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
    elif not shutil.which("curl"):
        pytest.skip("curl is not installed")
    return str(request.param)


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "data" / "coco"


def bring(served: Server, to: Path, *images: Any, **flags: Any) -> None:
    download(flags.pop("release", "coco2014"), images or ("train", "val"), to, served.url, **flags)


def count(to: Path) -> dict[str, int]:
    """Returns the number of files in each folder, and 1 for each file, hidden ones included."""
    paths = to.iterdir() if to.exists() else ()
    return {path.name: len(list(path.iterdir())) if path.is_dir() else 1 for path in paths}


def contents(to: Path) -> dict[str, bytes]:
    files = (path for path in to.rglob("*") if path.is_file())
    return {str(path.relative_to(to)): path.read_bytes() for path in files}


def published(served: Server) -> dict[str, bytes]:
    """Returns the files in the zips of 2014."""
    members: dict[str, bytes] = {}
    for path in served.folder.glob("*/*2014.zip"):
        with zipfile.ZipFile(path) as file:
            members |= {name: file.read(name) for name in file.namelist()}
    return members


def test_downloads_and_then_does_nothing(
    served: Server, to: Path, client: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bring(served, to)
    assert contents(to) == published(served)
    requests = list(served.asked)
    bring(served, to)
    assert served.asked == requests
    assert "train2014: complete, no download\n" in capsys.readouterr().out


def test_parts_and_both_releases_in_one_folder(served: Server, to: Path) -> None:
    download("coco2014", (), to, served.url)
    assert count(to) == {"annotations": 6}
    bring(served, to)
    bring(served, to, "val", release="coco2017")
    assert all(number == 1 for number in served.counts.values())
    assert count(to) == COMPLETE | {"val2017": 7, "annotations": 12}


def test_a_deleted_photo_is_restored(served: Server, to: Path) -> None:
    bring(served, to)
    before = contents(to)
    (to / "train2014" / "COCO_train2014_000000000003.jpg").unlink()
    bring(served, to)
    assert contents(to) == before
    assert served.counts == {TRAIN: 2, VAL: 1, "annotations/annotations_trainval2014.zip": 1}


@pytest.mark.parametrize("fault", ["drop", "short"])
def test_a_broken_connection_is_resumed(served: Server, to: Path, client: str, fault: str) -> None:
    served.faults = {TRAIN: [fault, fault]}
    bring(served, to)
    assert contents(to) == published(served)
    assert served.counts[TRAIN] == 3


def test_the_next_run_resumes(served: Server, to: Path, client: str) -> None:
    half = module.ARCHIVES["train2014"][1] // 2
    served.faults = {TRAIN: ["drop", "404"]}
    with pytest.raises(OSError, match=f"train2014.zip: .*404|22 .*at byte {half}; the same"):
        bring(served, to)
    assert (to / "train2014.zip.part").stat().st_size == half
    assert count(to) == {"train2014.zip.part": 1}
    expected = published(served)
    content = (served.folder / TRAIN).read_bytes()
    (served.folder / TRAIN).write_bytes(bytes(half) + content[half:])  # not requested again
    bring(served, to)
    assert contents(to) == expected


def test_a_server_without_ranges_cannot_resume(served: Server, to: Path, client: str) -> None:
    served.ranges = False
    served.faults = {TRAIN: ["drop"]}
    with pytest.raises(OSError, match=r"exit code 33 at byte|HTTP status 200 without new data at"):
        bring(served, to)


def test_a_zip_with_another_hash_is_refused_and_downloaded_again(served: Server, to: Path) -> None:
    served.faults = {TRAIN: ["corrupt"]}
    num_bytes, sha256 = module.ARCHIVES["train2014"][1:]
    with pytest.raises(
        ValueError, match=rf"part: size, sha256: expected \({num_bytes}, '{sha256}'"
    ):
        bring(served, to)
    assert count(to) == {}
    bring(served, to)
    assert contents(to) == published(served)


def test_a_zip_of_the_user_is_used_and_kept(served: Server, to: Path) -> None:
    to.mkdir(parents=True)
    shutil.copy(served.folder / TRAIN, to)
    bring(served, to)
    assert count(to) == COMPLETE | {"train2014.zip": 1}
    assert not served.counts[TRAIN]
    shutil.rmtree(to / "train2014")
    shutil.copy(served.folder / VAL, to / "train2014.zip")
    with pytest.raises(ValueError, match=r"train2014\.zip: size, sha256: expected"):
        bring(served, to)
    assert (to / "train2014.zip").exists()


def test_a_disk_that_is_too_small_is_refused(
    served: Server, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.ARCHIVES.copy()
    module.ARCHIVES.update(ARCHIVES)
    monkeypatch.setattr(module, "free_bytes", lambda folder: 27 * 10**9)
    with pytest.raises(ValueError) as caught:
        bring(served, to)
    assert str(caught.value) == (
        f"--to: coco2014 needs 27.4 GB of disk space, found 27.0 GB free in {to}; "
        "choose another disk, or try with --force"
    )
    assert not to.exists() and not served.asked
    monkeypatch.setattr(module, "free_bytes", lambda folder: 10)
    module.ARCHIVES.update(original)
    bring(served, to, force=True)
    assert count(to) == COMPLETE


def test_a_dry_run_counts_what_is_downloaded_already(
    to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to.mkdir(parents=True)
    for name, num_bytes in (("train2014.zip", 13_510_573_713), ("val2014.zip.part", 10**9)):
        with (to / name).open("wb") as file:
            file.truncate(num_bytes)  # a sparse file uses no disk space
    download("coco2014", ("train", "val"), to, dry_run=True)
    *lines, room = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["val2014: 6.6 GB download", "annotations_trainval2014: 252.9 MB download"]
    assert room.startswith("coco2014 needs 26.3 GB of disk space")
    assert count(to) == {"train2014.zip": 1, "val2014.zip.part": 1}


KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    from latent_t2i.pipeline import download

    start = json.load(sys.stdin)
    download.ARCHIVES = {name: tuple(entry) for name, entry in start["archives"].items()}
    owner = {"download": download, "Path": Path, "zip": download.zipfile.ZipFile}[start["owner"]]
    original, calls = getattr(owner, start["name"]), []

    def kill(*args, **kwargs):
        calls.append(args)
        if len(calls) == start["calls"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, start["name"], kill)
    download.download("coco2014", ("train", "val"), Path(start["to"]), start["url"])
"""


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        ("zip", "extract", 8),
        ("download", "_unpack", 2),  # train2014 is unpacked, its zip deleted
        ("Path", "replace", 5),  # while files are moved into annotations, which exists already
        ("Path", "unlink", 1),  # unpacked, the zip not yet deleted
    ],
)
def test_a_killed_run_is_resumed(
    served: Server, to: Path, owner: str, name: str, calls: int
) -> None:
    (to / "annotations").mkdir(parents=True)
    (to / "annotations" / "of the user.json").write_text("{}")
    start = {"archives": module.ARCHIVES, "to": str(to), "url": served.url}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED)],
        input=json.dumps(start | {"owner": owner, "name": name, "calls": calls}),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {"train2014": 12, "val2014": 7}.items() >= {
        folder: number for folder, number in count(to).items() if folder.endswith("2014")
    }.items()
    requests = served.counts
    bring(served, to)
    assert contents(to) == published(served) | {"annotations/of the user.json": b"{}"}
    assert served.counts == requests | dict.fromkeys(served.counts, 1), "no zip comes twice"


def test_two_runs_at_once_share_the_work(served: Server, to: Path) -> None:
    with ThreadPoolExecutor(2) as pool:  # the lock belongs to a file, so threads act as processes
        for done in [pool.submit(bring, served, to) for _ in range(2)]:
            done.result()
    assert count(to) == COMPLETE
    assert all(number == 1 for number in served.counts.values()), served.counts


def test_command(served: Server, to: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["coco2014", "--to", str(to), "--base-url", served.url]
    assert main([*flags, "--images", "val"]) == 0
    assert count(to) == {"val2014": 7, "annotations": 6}
    served.faults = {TRAIN: ["503", "404"]}  # curl waits for a busy server
    assert main(flags) == 2
    error = (
        f"error: {served.url}/{TRAIN}: curl failed with exit code 22 at byte 0; the same command"
    )
    assert error in capfd.readouterr().err


@pytest.mark.parametrize("preset", ["coco64", "coco256"])
def test_presets_name_the_downloaded_files(preset: str) -> None:
    source = parse(PipelineConfig, "pipeline", ["--config", preset]).source
    assert DEFAULT_FOLDER.parts[-2:] == ("data", "coco")
    assert source.images == "data/coco/train2014"
    assert source.captions == "data/coco/annotations/captions_train2014.json"
