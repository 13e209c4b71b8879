"""Where an image's bytes lie: a file, a stretch of a tar, or a row of a parquet file.

    read_image_bytes(TarLocator("s3://bucket/00000.tar", 1536, 40_960, "00000.tar/000000000.jpg"))

A place is small, so that millions can be kept, and plain values, so that they can be kept on disk.
Reading is safe from several threads. What is the image's own fault is a LocatorError or "missing
file"; a network that stays away after all attempts is a RemoteError, and no reason to leave an
image out. Rows come through a cache of row groups: in order, each group is read once; out of order,
each image may cost a whole one.
"""

import errno
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from latent_t2i.shards.remote import transport
from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    ShortReadError,
    find_filesystem,
    is_remote,
)
from latent_t2i.shards.remote.transport import without_query as without_query

RETRY = Retry()
KEPT_BYTES = 512 * 2**20
"""Row groups are kept up to this size in all, though always the last two."""
LEAST_KEPT = 2  # threads at work on both sides of a border

OWN_FAULTS = (
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
)
"""Errors of one file; others, such as too many open files, are the machine's."""

T = TypeVar("T")


class LocatorError(OSError):
    """An image's bytes cannot be had; the text is the reason, without a machine's folders."""


@dataclass(frozen=True, slots=True)
class FileLocator:
    """A file of its own."""

    path: str


@dataclass(frozen=True, slots=True)
class TarLocator:
    """A member of a tar, by where its content begins; `url` may also be a local path."""

    url: str
    offset: int
    num_bytes: int
    name: str
    """The tar's name and the member's."""


@dataclass(frozen=True, slots=True)
class ParquetLocator:
    """A row of a row group; the column may be a field of a struct: `image.bytes`."""

    url: str
    row_group: int
    row: int
    column: str


ImageLocator = FileLocator | TarLocator | ParquetLocator
KINDS: dict[str, type[FileLocator] | type[TarLocator] | type[ParquetLocator]] = {
    "file": FileLocator,
    "tar": TarLocator,
    "parquet": ParquetLocator,
}


def read_image_bytes(place: ImageLocator) -> bytes:
    """Returns an image file's content.

    Raises FileNotFoundError ("missing file") and LocatorError for what is wrong with this image,
    RemoteError and other OSErrors for what is wrong with the network or the machine.
    """
    try:
        if isinstance(place, FileLocator):
            return Path(place.path).read_bytes()
        if isinstance(place, TarLocator):
            return _read_range(place.url, place.offset, place.num_bytes)
        return _read_cell(place)
    except FileNotFoundError:
        raise FileNotFoundError("missing file") from None
    except ValueError as error:  # a name with a NUL byte, or not a parquet file
        raise LocatorError(f"cannot be read: {error}") from None
    except (LocatorError, RemoteError):
        raise
    except OSError as error:
        if error.errno is not None and error.errno not in OWN_FAULTS:
            raise
        raise LocatorError(f"cannot be read: {error.strerror or error}") from None


def locator_name(place: ImageLocator) -> str:
    """Returns a name that is the same wherever the files lie: for hashes and reasons."""
    if isinstance(place, FileLocator):
        return clean(Path(place.path).name)
    if isinstance(place, TarLocator):
        return clean(place.name)
    return clean(f"{last_name(place.url)} row group {place.row_group} row {place.row}")


def locator_to_json(place: ImageLocator) -> list[str | int]:
    """Returns a place as plain values: its kind, then its parts."""
    kind = next(name for name, cls in KINDS.items() if isinstance(place, cls))
    return [kind, *(getattr(place, name) for name in place.__slots__)]


def locator_from_json(values: list[Any]) -> ImageLocator:
    """Returns the place that `locator_to_json` gave. Raises ValueError for anything else."""
    kind, *parts = values
    if kind not in KINDS:
        raise ValueError(f"a place of kind {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind](*parts)


def last_name(url: str) -> str:
    """Returns a file's name without folders, host and query."""
    return without_query(url).rpartition("/")[2]


def clean(text: str) -> str:
    """Returns text as UTF-8 can hold it: half a surrogate pair becomes `?`."""
    return text.encode("utf-8", "replace").decode()


def with_retries(url: str, read: Callable[[], T]) -> T:
    """Returns `read()`; for a URL, temporary failures are retried."""
    return transport.with_retries(url, read, RETRY) if is_remote(url) else read()


def _read_range(url: str, offset: int, num_bytes: int) -> bytes:
    if is_remote(url):
        return with_retries(url, lambda: _fetch(url, offset, num_bytes))
    with Path(url).open("rb") as file:
        file.seek(offset)
        content = file.read(num_bytes)
    if len(content) < num_bytes:
        raise LocatorError(f"ended after {len(content)} of its {num_bytes} bytes")
    return content


def _fetch(url: str, offset: int, num_bytes: int) -> bytes:
    if not num_bytes:
        return b""
    system, path = find_filesystem(url)
    content: bytes = system.cat_file(path, start=offset, end=offset + num_bytes)
    if len(content) != num_bytes:
        raise ShortReadError(f"{len(content)} bytes where {num_bytes} were asked for")
    return content


def import_parquet() -> Any:
    """Returns pyarrow's parquet module. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ValueError(
            "parquet needs pyarrow, which is not installed: pip install 'latent-t2i[parquet]'"
        ) from error


def open_parquet(url: str) -> Any:
    """Returns a pyarrow ParquetFile of a local path or a URL, to be closed with `force=True`."""
    parquet = import_parquet()
    if not is_remote(url):
        return parquet.ParquetFile(url)
    system, path = find_filesystem(url)
    return parquet.ParquetFile(system.open(path, "rb"), pre_buffer=True)


def read_row_group(url: str, row_group: int, columns: list[str]) -> Any:
    """Returns some columns of a row group as a pyarrow Table; no other is read."""

    def read() -> Any:
        file = open_parquet(url)
        try:
            return file.read_row_group(row_group, columns=columns)
        finally:
            file.close(force=True)

    return with_retries(url, read)


class RowGroups:
    """The row groups last used, a column each, up to so many bytes; safe from several threads.

    A group that several threads ask for is read by the first of them, and the others wait.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, str], Future[Any]] = OrderedDict()

    def get(self, url: str, row_group: int, column: str) -> Any:
        """Returns a column of a row group, a pyarrow ChunkedArray."""
        key = (url, row_group, column)
        with self._lock:
            future = self._kept.get(key)
            mine = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
        if mine:
            self._read(key, future)
        return future.result()

    def _read(self, key: tuple[str, int, str], future: Future[Any]) -> None:
        url, row_group, column = key
        try:
            table = read_row_group(url, row_group, [column])
        except BaseException as error:
            with self._lock:
                self._kept.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(table.column(0))
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        """Lets go of the longest unused while there is too much; one that is being read stays."""
        sizes = {key: f.result().nbytes for key, f in self._kept.items() if f.done()}
        for key in list(sizes)[:-LEAST_KEPT]:
            if sum(sizes.values()) <= self._most_bytes:
                return
            del self._kept[key], sizes[key]


ROW_GROUPS = RowGroups(KEPT_BYTES)


def _read_cell(place: ParquetLocator) -> bytes:
    values = ROW_GROUPS.get(place.url, place.row_group, place.column)
    if place.row >= len(values):
        raise LocatorError(
            f"row group {place.row_group} has {len(values)} rows, no row {place.row}"
        )
    value = values[place.row].as_py()
    if isinstance(value, dict):
        value = value[place.column.rpartition(".")[2]]
    if value is None:
        raise LocatorError("no image in this row")
    content: bytes = value
    return content
