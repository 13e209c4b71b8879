"""Image bytes from files, tars and parquet, local and remote, and the reasons for failures."""

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latent_t2i.pipeline.sources import locators
from latent_t2i.pipeline.sources.locators import (
    FileLocator,
    ImageLocator,
    LocatorError,
    LocatorReader,
    ParquetLocator,
    RowGroupCache,
    TarLocator,
    locator_from_json,
    locator_name,
    locator_to_json,
)
from latent_t2i.shards.remote.transport import RemoteError
from tests.hostile import write_special
from tests.servers import QUICK, serve, serve_s3

CONTENT = bytes(range(256)) * 40
LOCATORS: list[ImageLocator] = [
    FileLocator("/data/a/é.jpg"),
    FileLocator("/data/\udcff.jpg"),
    TarLocator("s3://bucket/00000.tar", 1536, 40_960, "00000.tar/000000000.jpg"),
    ParquetLocator("hf://datasets/a/b/train.parquet", 3, 12, "image.bytes"),
]


def read(locator: ImageLocator) -> bytes:
    """Returns an image's bytes, without waits between attempts."""
    return LocatorReader(retry=QUICK).read(locator)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.tar").write_bytes(CONTENT)
    return tmp_path / "files"


def images(num_images: int) -> list[bytes]:
    return [bytes([number]) * 1000 for number in range(num_images)]


def write_parquet(path: Path, rows: list[Any], *, rows_per_group: int = 2, **kwargs: Any) -> Path:
    table = pa.table({"image": pa.array(rows, **kwargs)})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


@pytest.mark.parametrize("locator", LOCATORS)
def test_locators_survive_json(locator: ImageLocator) -> None:
    assert locator_from_json(json.loads(json.dumps(locator_to_json(locator)))) == locator


def test_a_locator_of_another_kind() -> None:
    with pytest.raises(ValueError, match="locator of kind 'zip', expected one of file, tar, parq"):
        locator_from_json(["zip", "a.zip"])


def test_names_do_not_depend_on_the_location() -> None:
    names = [locator_name(locator) for locator in LOCATORS]
    assert names == [
        "é.jpg",
        "?.jpg",
        "00000.tar/000000000.jpg",
        "train.parquet row group 3 row 12",
    ]
    signed = ParquetLocator("https://host/a.parquet?key=b/c", 0, 1, "image")
    assert locator_name(signed) == "a.parquet row group 0 row 1"


def test_a_file(folder: Path) -> None:
    assert locators.read_image_bytes(FileLocator(str(folder / "a.tar"))) == CONTENT


@pytest.mark.parametrize(
    ("locator", "reason"),
    [
        (FileLocator("."), "a folder, expected a regular file"),
        (FileLocator("a.tar/b"), "cannot be read: Not a directory"),
        (FileLocator("x" * 300), "cannot be read: File name too long"),
        (FileLocator("a\0b"), "cannot be read: embedded null byte"),
        (TarLocator("a.tar", 10_000, 1000, "a.tar/b"), "ended after 240 of its 1000 bytes"),
    ],
)
def test_reasons_have_no_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, locator: ImageLocator, reason: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(LocatorError) as error:
        read(locator)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "locator",
    [FileLocator("no"), TarLocator("no", 0, 1, "no/a"), ParquetLocator("no", 0, 0, "image")],
)
def test_missing_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, locator: ImageLocator
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError, match=r"^missing file$"):
        read(locator)


def test_special_and_huge_files_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, reason in write_special(Path()).items():
        with pytest.raises(LocatorError) as error:
            read(FileLocator(name))
        assert str(error.value) == reason
    with pytest.raises(LocatorError, match="2147483648 bytes, expected at most 1073741824"):
        read(TarLocator("sparse.jpg", 0, 2**31, "a.tar/a.jpg"))
    with pytest.raises(LocatorError, match="a pipe or a device"):
        read(ParquetLocator("pipe.jpg", 0, 0, "image"))


def test_errors_of_the_machine_are_not_the_image_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as error:
        read(FileLocator("a"))
    assert not isinstance(error.value, LocatorError)


def test_a_member_of_a_local_tar(folder: Path) -> None:
    locator = TarLocator(str(folder / "a.tar"), 300, 40, "a.tar/b")
    assert read(locator) == CONTENT[300:340]
    assert read(replace(locator, num_bytes=0)) == b""


def test_a_member_of_a_tar_on_a_server(folder: Path) -> None:
    with serve(folder) as server:
        locator = TarLocator(f"{server.url}/a.tar", 300, 40, "a.tar/b")
        server.faults["a.tar"] = ["503", "hang up"]
        assert read(locator) == CONTENT[300:340]
        assert read(replace(locator, num_bytes=0)) == b""
        assert server.counts == {"a.tar": 3}
        with pytest.raises(FileNotFoundError, match=r"^missing file$"):
            read(replace(locator, url=f"{server.url}/b.tar"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [("503...", "gave up after 4 attempts; .*503"), ("403...", "a.tar: HTTP status 403")],
)
def test_a_server_that_keeps_failing(folder: Path, fault: str, message: str) -> None:
    with serve(folder) as server:
        server.faults["a.tar"] = [fault]
        with pytest.raises(RemoteError, match=message) as error:
            read(TarLocator(f"{server.url}/a.tar?key=secret", 300, 40, "a.tar/b"))
        assert "secret" not in str(error.value)


def test_a_server_without_ranges(folder: Path) -> None:
    with serve(folder, ranges=False) as server, pytest.raises(RemoteError, match="10240 bytes, ex"):
        read(TarLocator(f"{server.url}/a.tar", 300, 40, "a.tar/b"))


def test_a_member_of_a_tar_in_a_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(folder, monkeypatch) as url:
        assert read(TarLocator(f"{url}/a.tar", 300, 40, "a.tar/b")) == CONTENT[300:340]
        with pytest.raises(FileNotFoundError, match=r"^missing file$"):
            read(TarLocator(f"{url}/b.tar", 300, 40, "b.tar/b"))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_row_of_parquet(tmp_path: Path, kind: Any) -> None:
    path = write_parquet(tmp_path / "a.parquet", images(5), type=kind)
    found = [read(ParquetLocator(str(path), n // 2, n % 2, "image")) for n in range(5)]
    assert found == images(5)


def test_a_row_of_a_struct(tmp_path: Path) -> None:
    rows = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    path = str(write_parquet(tmp_path / "a.parquet", rows, rows_per_group=3))
    assert read(ParquetLocator(path, 0, 0, "image.bytes")) == b"a"
    for row in (1, 2):
        with pytest.raises(LocatorError, match=r"^no image in this row$"):
            read(ParquetLocator(path, 0, row, "image.bytes"))
    with pytest.raises(LocatorError, match=r"^row group 0 has 3 rows, no row 3$"):
        read(ParquetLocator(path, 0, 3, "image.bytes"))


def test_a_file_that_is_not_parquet(folder: Path) -> None:
    with pytest.raises(LocatorError, match=r"^cannot be read: Parquet magic bytes not found"):
        read(ParquetLocator(str(folder / "a.tar"), 0, 0, "image"))


def test_a_row_of_parquet_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    write_parquet(tmp_path / "files" / "a.parquet", images(4))
    with serve_s3(tmp_path / "files", monkeypatch) as url:
        assert read(ParquetLocator(f"{url}/a.parquet", 1, 1, "image")) == images(4)[3]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which each row group that is read is added."""
    groups: list[int] = []
    original = locators.read_row_group

    def counted(url: str, row_group: int, *rest: Any) -> Any:
        groups.append(row_group)
        return original(url, row_group, *rest)

    monkeypatch.setattr(locators, "read_row_group", counted)
    return groups


def test_rows_in_order_read_each_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_parquet(tmp_path / "a.parquet", images(60), rows_per_group=10))
    groups = count_reads(monkeypatch)
    rows = [ParquetLocator(path, n // 10, n % 10, "image") for n in range(60)]
    reader = LocatorReader(cache_bytes=0)  # only the last two are kept
    assert [reader.read(row) for row in rows] == images(60)
    assert groups == list(range(6))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(LocatorReader().read, rows)) == images(60)
    assert sorted(groups) == sorted([*range(6), *range(6)])


def test_old_row_groups_are_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_parquet(tmp_path / "a.parquet", images(60), rows_per_group=10))
    groups = count_reads(monkeypatch)
    cached = RowGroupCache(35_000)  # three groups of 10 kB
    for row_group in (0, 1, 2, 0, 3, 0, 2, 1):
        cached.get(path, row_group, "image")
    assert groups == [0, 1, 2, 3, 1]


def test_a_group_that_failed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    cached = RowGroupCache(10**6)
    with pytest.raises(FileNotFoundError):
        cached.get(str(path), 0, "image")
    write_parquet(path, images(2))
    assert cached.get(str(path), 0, "image").to_pylist() == images(2)


def test_waiting_threads_get_the_error_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    cached, go_on = RowGroupCache(10**6), threading.Event()

    def fail(*arguments: Any) -> Any:
        go_on.wait(10)
        raise RemoteError("away")

    monkeypatch.setattr(locators, "read_row_group", fail)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cached.get, "a", 0, "image") for _ in range(4)]
        go_on.set()
        for future in waiting:
            with pytest.raises(RemoteError, match="away"):
                future.result(10)


def test_other_file_systems_of_fsspec() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/a.tar", CONTENT)
    assert read(TarLocator("memory:///a.tar", 300, 40, "a.tar/b")) == CONTENT[300:340]
    system.rm("/a.tar")
