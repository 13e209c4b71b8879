"""Zips to folders: all of one or nothing, nothing beside it, every damaged byte found."""

import random
import shutil
import stat
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from latent_t2i.pipeline import unpack as module
from latent_t2i.pipeline.unpack import open_zip, tidy, unpack

NAMES = [f"{number:03d}.jpg" for number in range(40)]


def quiet_bar(task: str, total: int, done: int) -> Any:
    return tqdm(total=total, initial=done, disable=True)


def make_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def photographs() -> dict[str, bytes]:
    return {f"photos/{name}": random.Random(name).randbytes(5000) for name in NAMES}


def install(path: Path, folder: str, final: Path, num_threads: int = 2) -> None:
    with open_zip(path, folder) as contents:
        unpack(contents, final, num_threads=num_threads, make_bar=quiet_bar)


def read(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("num_threads", [1, 3, 64])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_unpacks_a_folder(tmp_path: Path, num_threads: int, method: int) -> None:
    members = {**photographs(), "photos/": b"", "photos/deep/er/a.jpg": b"deep", "else/a.txt": b""}
    path = make_zip(tmp_path / "a.zip", members, method)
    install(path, "photos", tmp_path / "final", num_threads)
    expected = {name.removeprefix("photos/"): content for name, content in members.items()}
    assert read(tmp_path / "final") == {
        name: content for name, content in expected.items() if name and name != "else/a.txt"
    }
    assert left(tmp_path) == {"a.zip", "final"}


def test_counts_what_is_in_the_folder_and_beside(tmp_path: Path) -> None:
    members = {"photos/a.jpg": bytes(1), "photos/b.jpg": bytes(4097), "else/a.txt": b"", "c": b""}
    with open_zip(make_zip(tmp_path / "a.zip", members), "photos") as contents:
        assert set(contents.members) == {"a.jpg", "b.jpg"}
        assert contents.num_outside == 2
        assert contents.num_bytes == 3 * 4096


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../evil", "leads out of the folder"),
        ("photos/../../evil", "leads out of the folder"),
        ("photos\\..\\..\\evil", "leads out of the folder"),
        ("/etc/evil", "an absolute path"),
        ("C:/evil", "an absolute path"),
        ("C:\\evil", "an absolute path"),
    ],
)
def test_refuses_names_that_lead_elsewhere(tmp_path: Path, name: str, fault: str) -> None:
    path = make_zip(tmp_path / "a.zip", photographs() | {name: b"evil"})
    with pytest.raises(ValueError, match=f"member .*evil' is .*{fault}"):
        install(path, "photos", tmp_path / "deep" / "final")
    assert left(tmp_path) == {"a.zip"}


def test_refuses_links(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("photos/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc")
    with pytest.raises(ValueError, match="member 'photos/link' is a link"):
        install(path, "photos", tmp_path / "final")


def test_refuses_encrypted_members(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"photos/a.jpg": b"a"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"member 'photos/a.jpg' is encrypted"):
        install(path, "photos", tmp_path / "final")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_a_name_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("photos/a.jpg", b"a")
        file.writestr("photos/a.jpg", b"b")
    with pytest.raises(ValueError, match=r"'photos/a.jpg' stands twice"):
        install(path, "photos", tmp_path / "final")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04"])
def test_refuses_what_is_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: no zip that can be read"):
        install(tmp_path / "a.zip", "photos", tmp_path / "final")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_is_found(tmp_path: Path, method: int) -> None:
    path = make_zip(tmp_path / "a.zip", photographs(), method)
    content = bytearray(path.read_bytes())
    content[content.index(b"photos/017.jpg") + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip: member 'photos/017.jpg': "):
        install(path, "photos", tmp_path / "final")
    assert left(tmp_path) == {"a.zip"}


def test_an_error_stops_the_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, extracted = threading.Event(), []

    def extract(file: Any, info: zipfile.ZipInfo, path: Path) -> None:
        if path.name == NAMES[1]:
            failed.set()
            raise OSError("No space left on device")
        assert failed.wait(10)
        time.sleep(0.01)
        extracted.append(path.name)

    monkeypatch.setattr(module, "_extract", extract)
    path = make_zip(tmp_path / "a.zip", photographs())
    with pytest.raises(OSError, match="No space left"):
        install(path, "photos", tmp_path / "final")
    assert len(extracted) < len(NAMES) // 2, "of the 20 of the other thread"
    assert left(tmp_path) == {"a.zip"}


def test_a_folder_that_is_there_is_completed(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", photographs() | {"photos/deep/a.jpg": b"deep"})
    final = tmp_path / "final"
    final.mkdir()
    (final / NAMES[3]).write_bytes(b"half a pho")
    (final / "of the user").write_bytes(b"stays")
    install(path, "photos", final)
    expected = {name.removeprefix("photos/"): content for name, content in photographs().items()}
    assert read(final) == expected | {"deep/a.jpg": b"deep", "of the user": b"stays"}
    assert left(tmp_path) == {"a.zip", "final"}


def test_files_that_are_there_are_replaced_before_others_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / NAMES[-1]).write_bytes(b"half a pho")
    moved = []
    original = Path.replace

    def replace(source: Path, target: Path) -> Path:
        moved.append(target.name)
        return original(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    install(make_zip(tmp_path / "a.zip", photographs()), "photos", final)
    assert moved == [NAMES[-1], *NAMES[:-1]]


def test_tidy_removes_what_a_kill_left(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for name in ("final", ".final.partial", ".final.more", "..final.more.partial", ".other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"a")
    tidy(final)
    assert left(tmp_path) == {"final", ".other"}
    shutil.rmtree(final)
    tidy(final)  # nothing there is no error
