"""Writing files to a URL: complete or absent, and errors that name the URL and the remedy."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.shards.remote.transport import RemoteError
from latent_t2i.shards.remote.upload import RemoteFolder
from tests.object_stores import Store
from tests.servers import QUICK, serve_s3


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RemoteFolder]:
    Store.faults[:] = []
    yield RemoteFolder(f"store://{tmp_path}/train/", QUICK)
    Store.faults[:] = []


def test_files_are_put_listed_read_and_deleted(folder: RemoteFolder, tmp_path: Path) -> None:
    assert folder.list() == {} and folder.find("a") is None
    (tmp_path / "a").write_bytes(b"123")
    folder.put("a", tmp_path / "a")
    folder.put_bytes("b/c", b"4")
    folder.put_bytes("b/c", b"45")  # replaces it
    assert folder.list() == {"a": 3, "b": None} and folder.list("b") == {"c": 2}
    assert folder.read(["a", "b/c"]) == {"a": b"123", "b/c": b"45"}
    folder.delete("a")
    folder.delete("a")
    folder.delete_folder("b")
    folder.delete_folder("b")
    assert folder.list() == {}
    with pytest.raises(FileNotFoundError, match=r"train/a: not found"):
        folder.read(["a"])


def test_a_folder_is_gone_although_another_process_deletes_it_too(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "123":
        folder.put_bytes(f"a/{name}", b"")
    original = Store.rm

    def rm(self: Store, path: str, **kwargs: Any) -> None:
        monkeypatch.setattr(Store, "rm", original)
        (Path(path) / "1").unlink()
        raise FileNotFoundError(f"{path}/1")  # as the other process, which now gives up too

    monkeypatch.setattr(Store, "rm", rm)
    folder.delete_folder("a")
    assert folder.list() == {}


def test_a_put_that_fails_leaves_no_file(folder: RemoteFolder, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    Store.faults[:] = ["half", "short..."]
    with pytest.raises(RemoteError, match=r"train/a: gave up .*: put 4 bytes, found 2"):
        folder.put("a", tmp_path / "a")
    assert folder.list() == {}
    Store.faults[:] = ["short"]
    folder.put("a", tmp_path / "a")
    assert folder.list() == {"a": 4}


def test_a_file_is_put_again_if_another_process_deletes_it_before_its_rename(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    original = Store.put_file

    def put_file(self: Store, lpath: str, rpath: str, **kwargs: Any) -> None:
        monkeypatch.setattr(Store, "put_file", original)
        original(self, lpath, rpath)
        Path(rpath).unlink()

    monkeypatch.setattr(Store, "put_file", put_file)
    folder.put("a", tmp_path / "a")
    assert folder.list() == {"a": 4}


def test_urls_that_cannot_be_written_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("https://host/train", "simplecache::s3://bucket/train"):
        with pytest.raises(ValueError, match=f"{url}: cannot be written to: use a folder, or"):
            RemoteFolder(url)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs://bucket/a: this protocol needs a package: .*gcsfs"):
        RemoteFolder("gs://bucket/a")


def test_errors_of_access_name_the_remedy(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store, path: str, content: bytes) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Store, "pipe_file", refuse)
    message = r"train/a: PermissionError: Access Denied: sign in .* check that you may write there"
    with pytest.raises(RemoteError, match=message):
        folder.put_bytes("a", b"1")


def test_errors_of_s3_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(None, monkeypatch) as url:
        missing = RemoteFolder("s3://no-such-bucket/train", QUICK)
        assert missing.list() == {}
        message = r"s3://no-such-bucket/train/a: there is no such bucket or repository: create it"
        with pytest.raises(RemoteError, match=message):
            missing.put_bytes("a", b"1")
        import s3fs
        from botocore.exceptions import NoCredentialsError

        async def refuse(*args: object, **kwargs: object) -> None:
            raise NoCredentialsError

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
        with pytest.raises(RemoteError, match=r"Unable to locate credentials: set AWS_PROFILE, or"):
            RemoteFolder(url, QUICK).put_bytes("a", b"1")
