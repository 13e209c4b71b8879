"""COCO brought and unpacked: the plan, what is refused, and that no kill leaves half a folder."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latent_t2i.configs.cli import parse
from latent_t2i.model.paths import output_root
from latent_t2i.pipeline import download as module
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.download import BASE_URL, RELEASES, Archive, download, main
from latent_t2i.shards.remote.transport import RemoteError
from tests.servers import QUICK, Server, serve

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("captions", "instances", "person_keypoints")
NUM_IMAGES = {"train": 12, "val": 7}
PHOTO_BYTES = 30_000
WHOLE = {"train2014": 12, "val2014": 7, "annotations": 6}
"""The files of each folder."""


def write_release(folder: Path, year: int) -> dict[str, Archive]:
    """Writes small zips of COCO's form and returns what is to be known of them."""
    contents = {
        part: {
            f"{part}{year}/COCO_{part}{year}_{number:012d}.jpg": np.random.default_rng(
                [year, number]
            ).bytes(PHOTO_BYTES)
            for number in range(num)
        }
        for part, num in NUM_IMAGES.items()
    }
    contents["annotations"] = {
        f"annotations/{kind}_{part}{year}.json": json.dumps({"year": year}).encode()
        for kind in KINDS
        for part in NUM_IMAGES
    }
    return {
        part: publish(folder, members, RELEASES[f"coco{year}"][part])
        for part, members in contents.items()
    }


def publish(folder: Path, members: dict[str, bytes], archive: Archive) -> Archive:
    """Writes a zip in the place of COCO's, and returns what is to be known of it."""
    path = folder / archive.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return told(archive, path, sum(map(len, members.values())))


def told(archive: Archive, path: Path, unpacked_bytes: int) -> Archive:
    content = path.read_bytes()
    return dataclasses.replace(
        archive,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        num_images=NUM_IMAGES.get(archive.folder.rstrip("0123456789"), 0),
        unpacked_bytes=unpacked_bytes,
    )


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Small releases on a server; the tables say how they are."""
    folder = tmp_path / "served"
    releases = {f"coco{year}": write_release(folder, year) for year in (2014, 2017)}
    monkeypatch.setattr(module, "RELEASES", releases)
    with serve(folder) as server:
        server.version = lambda content: {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        yield server


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "data" / "coco"


def bring(served: Server, to: Path, parts: Any = ("train", "val"), **flags: Any) -> None:
    release = flags.pop("release", "coco2014")
    download(release, parts, to, base_url=served.url, retry=QUICK, **flags)


def count(to: Path) -> dict[str, int]:
    """The number of files in each folder, and 1 for each file, hidden ones too."""
    if not to.exists():
        return {}
    return {path.name: len(list(path.iterdir())) if path.is_dir() else 1 for path in to.iterdir()}


def contents(to: Path) -> dict[str, bytes]:
    files = (path for path in to.rglob("*") if path.is_file())
    return {str(path.relative_to(to)): path.read_bytes() for path in files}


def members_of(served: Server) -> dict[str, bytes]:
    """What the zips of 2014 hold."""
    members: dict[str, bytes] = {}
    for archive in module.RELEASES["coco2014"].values():
        with zipfile.ZipFile(served.folder / archive.path) as file:
            members |= {name: file.read(name) for name in file.namelist()}
    return members


def change_zip(served: Server, part: str, members: dict[str, bytes]) -> None:
    """Serves another zip in the place of one of 2014, and lets the table say that it is right."""
    release = module.RELEASES["coco2014"]
    release[part] = publish(served.folder, members, release[part])


def test_brings_all(served: Server, to: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bring(served, to)
    assert count(to) == WHOLE
    assert contents(to) == members_of(served)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{to}: train2014 (12 files), val2014 (7 files), annotations (6 files): all there"
    )


def test_a_second_time_does_nothing(
    served: Server, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bring(served, to)
    before = {path: path.stat().st_mtime_ns for path in to.rglob("*")}
    asked = list(served.asked)
    capsys.readouterr()
    bring(served, to)
    assert served.asked == asked
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*")} == before
    assert capsys.readouterr().out.endswith("all there, nothing to do\n")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [((), {"annotations": 6}), (("val",), {"val2014": 7, "annotations": 6})],
)
def test_brings_a_part(served: Server, to: Path, parts: Any, expected: dict[str, int]) -> None:
    bring(served, to, parts)
    assert count(to) == expected
    bring(served, to)
    assert count(to) == WHOLE
    assert all(number == 1 for number in served.counts.values())


def test_two_years_share_a_folder_of_annotations(served: Server, to: Path) -> None:
    bring(served, to)
    bring(served, to, ("val",), release="coco2017")
    assert count(to) == WHOLE | {"val2017": 7, "annotations": 12}
    assert json.loads((to / "annotations/captions_val2014.json").read_text()) == {"year": 2014}


def test_a_photograph_that_went_missing_comes_back(served: Server, to: Path) -> None:
    bring(served, to)
    before = contents(to)
    (to / "train2014/COCO_train2014_000000000003.jpg").unlink()
    bring(served, to)
    assert contents(to) == before
    assert served.counts["zips/val2014.zip"] == 1


def test_goes_on_after_breaks(served: Server, to: Path) -> None:
    served.faults = {"zips/train2014.zip": ["drop", "503", "hang up"]}
    bring(served, to)
    assert count(to) == WHOLE


def test_keeps_zips_when_asked(served: Server, to: Path) -> None:
    bring(served, to, keep_zips=True)
    zips = dict.fromkeys(("train2014.zip", "val2014.zip", "annotations_trainval2014.zip"), 1)
    assert count(to) == WHOLE | zips
    bring(served, to)
    assert count(to) == WHOLE | zips, "they are the user's from then on"


def test_a_zip_of_the_users_is_used_and_stays(served: Server, to: Path) -> None:
    to.mkdir(parents=True)
    shutil.copy(served.folder / "zips/train2014.zip", to)
    bring(served, to)
    assert count(to) == WHOLE | {"train2014.zip": 1}
    assert served.counts["zips/train2014.zip"] == 0


def test_a_wrong_zip_of_the_users_is_refused_and_stays(served: Server, to: Path) -> None:
    to.mkdir(parents=True)
    shutil.copy(served.folder / "zips/val2014.zip", to / "train2014.zip")
    with pytest.raises(ValueError, match=r"train2014\.zip: expected \d+ bytes, found \d+: move it"):
        bring(served, to)
    assert count(to) == {"train2014.zip": 1}


def test_a_corrupt_zip_leaves_no_folder(served: Server, to: Path) -> None:
    archive = module.RELEASES["coco2014"]["train"]
    path = served.folder / archive.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="sha256: expected"):
        bring(served, to)
    assert served.counts[archive.path] == 2
    module.RELEASES["coco2014"]["train"] = told(archive, path, 1)  # published like that
    with pytest.raises(ValueError, match=r"train2014\.zip: member 'train2014/COCO_.*': "):
        bring(served, to)
    assert "train2014" not in count(to)
    assert not [name for name in count(to) if name.startswith(".")]


def test_a_zip_that_leads_elsewhere_is_refused(served: Server, to: Path) -> None:
    change_zip(served, "train", {f"train2014/{n}.jpg": b"a" for n in range(12)} | {"../evil": b""})
    with pytest.raises(ValueError, match=r"member '\.\./evil' is a path that leads out"):
        bring(served, to)
    assert "train2014" not in count(to)
    assert not (to / "evil").exists() and not (to.parent / "evil").exists()


def test_a_zip_that_lacks_files_is_refused(served: Server, to: Path) -> None:
    change_zip(served, "train", {f"train2014/{n}.jpg": b"a" for n in range(11)} | {"other/x": b""})
    with pytest.raises(ValueError, match=r"train2014/ in it lacks 1 of 12 images"):
        bring(served, to)
    assert "train2014" not in count(to)


def test_annotations_are_told_by_name(served: Server, to: Path) -> None:
    change_zip(served, "annotations", {f"annotations/{n}.json": b"{}" for n in range(6)})
    with pytest.raises(ValueError, match=r"annotations/ in it lacks captions_train2014.json, capt"):
        bring(served, to, ())


def test_files_outside_are_told(
    served: Server, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {f"train2014/{number}.jpg": b"a" for number in range(12)}
    change_zip(served, "train", members | {"__MACOSX/._1.jpg": b"", "README": b""})
    bring(served, to)
    assert count(to) == WHOLE
    assert "train2014.zip: 2 files outside train2014/ left out" in capsys.readouterr().out


def free(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=num_bytes)
    monkeypatch.setattr(module, "shutil", SimpleNamespace(disk_usage=lambda folder: usage))


def make_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the table have COCO's own sizes."""
    monkeypatch.setattr(module, "RELEASES", {name: dict(RELEASES[name]) for name in RELEASES})


def test_a_disk_too_small_is_refused_with_the_arithmetic(
    served: Server, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_large(monkeypatch)
    free(27 * 10**9, monkeypatch)
    with pytest.raises(ValueError) as caught:
        bring(served, to)
    assert str(caught.value) == (
        f"--to {to}: 20.4 GB to fetch + 21.9 GB unpacked - 14.8 GB as zips are deleted in turn "
        "= 27.5 GB needed at one time, 27.0 GB free: too little. --force starts all the same"
    )
    assert not to.exists() and not served.asked


def test_kept_zips_need_room_for_all(
    to: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(40 * 10**9, monkeypatch)
    download("coco2014", ("train", "val"), to, keep_zips=True, dry_run=True)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "20.4 GB to fetch + 21.9 GB unpacked",
        "= 42.3 GB needed at one time, 40.0 GB free",
    ]


def test_what_is_there_needs_no_room(
    to: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(20 * 10**9, monkeypatch)
    to.mkdir(parents=True)
    with (to / "train2014.zip").open("wb") as file:
        file.truncate(RELEASES["coco2014"]["train"].num_bytes)  # takes no room
    with (to / "val2014.zip.part").open("wb") as file:
        file.truncate(10**9)
    (to / "annotations").mkdir()
    for name in RELEASES["coco2014"]["annotations"].names:
        (to / "annotations" / name).touch()
    download("coco2014", ("train", "val"), to, dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        f"coco2014 to {to}",
        "  train2014   13.5 GB zipped, 13.5 GB are here, about 14.0 GB unpacked",
        "  val2014     6.6 GB zipped, 1.0 GB are here, about 6.9 GB unpacked",
        "  annotations is there",
        "5.6 GB to fetch + 20.9 GB unpacked",
        "= 26.5 GB needed at one time, 20.0 GB free",
    ]


def test_force_tries_it_on_a_small_disk(
    served: Server, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(10, monkeypatch)
    bring(served, to, force=True)
    assert count(to) == WHOLE


def test_the_zip_itself_tells_the_room_it_takes(
    served: Server, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = module.RELEASES["coco2014"]
    for part, archive in table.items():
        table[part] = dataclasses.replace(archive, unpacked_bytes=0)
    free(table["train"].num_bytes + 1, monkeypatch)
    with pytest.raises(ValueError, match=r"train2014 is .* unpacked, free there .*: too little"):
        bring(served, to)
    assert count(to) == {"train2014.zip": 1, "train2014.zip.json": 1}


def test_a_dry_run_changes_nothing(
    served: Server, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bring(served, to, dry_run=True)
    assert not to.parent.exists() and not served.asked
    assert "train2014 " in capsys.readouterr().out


KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    from latent_t2i.pipeline import download, fetch, unpack

    start = json.load(sys.stdin)
    download.RELEASES["coco2014"] = {
        part: download.Archive(**known) for part, known in start["archives"].items()
    }
    owner, name, calls = start["at"]
    owner = {"fetch": fetch, "unpack": unpack, "download": download, "Path": Path}[owner]
    original, seen = getattr(owner, name), []

    def kill(*args, **kwargs):
        seen.append(name)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, kill)
    download.download("coco2014", ["train", "val"], Path(start["to"]), base_url=start["url"])
"""


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        ("fetch", "_open", 1),  # before anything came
        ("fetch", "_append", 1),  # the version is known, nothing is there
        ("fetch", "_read", 2),  # in the middle
        ("fetch", "hash_file", 1),  # all is there
        ("fetch", "_flush", 1),  # and right
        ("unpack", "_extract", 1),
        ("unpack", "_extract", 8),
        ("Path", "replace", 3),  # while files are moved into annotations, which is there
        ("unpack", "tidy", 1),
        ("download", "_let_go", 1),  # unpacked, the zip not yet deleted
        ("fetch", "_open", 2),
    ],
)
def test_killed_it_goes_on(served: Server, to: Path, owner: str, name: str, calls: int) -> None:
    (to / "annotations").mkdir(parents=True)
    (to / "annotations" / "of the user.json").write_text("{}")
    table = module.RELEASES["coco2014"]
    archives = {part: dataclasses.asdict(archive) for part, archive in table.items()}
    start = {"archives": archives, "to": str(to), "url": served.url, "at": [owner, name, calls]}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED)],
        input=json.dumps(start),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    whole = [archive for archive in table.values() if archive.folder in count(to)]
    assert all(count(to)[archive.folder] == WHOLE[archive.folder] for archive in whole[:-1])
    asked = served.counts
    bring(served, to)
    assert contents(to) == members_of(served) | {"annotations/of the user.json": b"{}"}
    for archive in whole[:-1]:  # the last is annotations, which was there before
        assert served.counts[archive.path] == asked[archive.path]


def test_a_killed_download_goes_on_by_range(served: Server, to: Path) -> None:
    served.faults = {"zips/train2014.zip": ["drop", "404"]}
    with pytest.raises(RemoteError, match="404"):
        bring(served, to)
    assert count(to) == {"train2014.zip.part": 1, "train2014.zip.json": 1}
    half = (to / "train2014.zip.part").stat().st_size
    assert half == module.RELEASES["coco2014"]["train"].num_bytes // 2
    bring(served, to)
    assert count(to) == WHOLE


def test_two_at_once_share_the_work(served: Server, to: Path) -> None:
    with ThreadPoolExecutor(2) as pool:  # the lock is the file's, so threads are like processes
        for done in [pool.submit(bring, served, to) for _ in range(2)]:
            done.result()
    assert count(to) == WHOLE
    assert all(number == 1 for number in served.counts.values()), served.counts


def test_command(served: Server, to: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["coco2014", "--images", "val", "--to", str(to), "--base-url", served.url]
    assert main(flags) == 0
    assert count(to) == {"val2014": 7, "annotations": 6}
    assert main([*flags, "--images", "none"]) == 0
    served.faults = {"zips/train2014.zip": ["404"]}
    assert main([*flags, "--images", "train", "train"]) == 2
    url = f"{served.url}/zips/train2014.zip"
    assert capsys.readouterr().err == f"error: {url}: HTTP status 404\n"


def test_an_interrupt_says_how_to_go_on(
    served: Server, to: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_bring", interrupt)
    assert main(["coco2014", "--to", str(to), "--base-url", served.url]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: release"),
        (["coco2015"], "invalid choice: 'coco2015'"),
        (["coco2014", "--images", "test"], "invalid choice: 'test'"),
        (["coco2014", "--images", "none", "val"], "none goes with nothing else, found none val"),
        (["coco2014", "--base-url", "ftp://host"], "expected http:// or https://, found 'ftp://h"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_known_of_coco() -> None:
    known = {
        archive.name: (archive.num_images or len(archive.names))
        for release in RELEASES.values()
        for archive in release.values()
    }
    assert known == {
        "train2014.zip": 82_783,
        "val2014.zip": 40_504,
        "annotations_trainval2014.zip": 6,
        "train2017.zip": 118_287,
        "val2017.zip": 5_000,
        "annotations_trainval2017.zip": 6,
    }
    sums = {archive.sha256 for release in RELEASES.values() for archive in release.values()}
    assert len(sums) == 6 and all(len(bytes.fromhex(text)) == 32 for text in sums)
    assert BASE_URL.startswith("http://images.cocodataset.org")


@pytest.mark.parametrize("preset", ["coco64", "coco256"])
def test_the_presets_find_what_is_brought(preset: str) -> None:
    source = parse(PipelineConfig, "pipeline", ["--config", preset]).source
    to = module._parse_arguments(["coco2014"]).to
    assert to == output_root() / "data" / "coco"
    assert source.images == "data/coco/train2014"
    release = RELEASES["coco2014"]
    assert release["train"].folder == Path(source.images).name
    assert source.captions is not None
    assert Path(source.captions).name in release["annotations"].names
    assert Path(source.captions).parent.name == release["annotations"].folder
