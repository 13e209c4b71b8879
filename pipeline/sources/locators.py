"""Locators of images: a file, a byte range of a tar, or a cell of a parquet file.

    read_image_bytes(TarLocator("s3://bucket/00000.tar", 1536, 40_960, "00000.tar/000000000.jpg"))

Locators are small plain values, so that millions can be kept on disk. Parquet is read in whole row
groups through a cache: rows in order read each group once, rows out of order may read a group per
image.
"""

import errno
import importlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from latent_t2i.shards.parsing import printable as printable
from latent_t2i.shards.remote import transport
from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    ShortReadError,
    find_filesystem,
    is_remote,
)
from latent_t2i.shards.remote.transport import without_query as without_query

MAX_IMAGE_BYTES = 2**30
"""Larger image files are refused. An uncompressed TIFF of MAX_PIXELS has 537 MB."""
CACHE_BYTES = 512 * 2**20
"""Upper bound for cached row groups, except that two are always kept."""
MIN_CACHED = 2  # threads may work on both sides of a border between groups

ERRORS_OF_ONE_FILE = (
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENXIO,  # a socket
    errno.EPERM,
)
"""Other numbers, such as too many open files, are errors of the machine, not of the image."""

T = TypeVar("T")


class LocatorError(OSError):
    """An image's bytes cannot be read; the message is the reason in the quarantine."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True, slots=True)
class FileLocator:
    """A file."""

    path: str


@dataclass(frozen=True, slots=True)
class TarLocator:
    """The content of a member of a tar, which may also be a local file."""

    url: str
    offset: int
    num_bytes: int
    name: str
    """The tar's name and the member's."""


@dataclass(frozen=True, slots=True)
class ParquetLocator:
    """A row of a row group. The column may be a field of a struct: `image.bytes`."""

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


class LocatorReader:
    """Reads images and caches parquet row groups. Safe to use from several threads."""

    def __init__(self, *, retry: Retry | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        self._retry = retry
        self._row_groups = RowGroupCache(cache_bytes, retry)

    def read(self, locator: ImageLocator) -> bytes:
        """Returns an image file's content, as `read_image_bytes` does."""
        try:
            if isinstance(locator, FileLocator):
                with open_regular(locator.path, MAX_IMAGE_BYTES) as file:
                    return file.read()
            if isinstance(locator, TarLocator):
                return self._read_range(locator)
            return self._read_cell(locator)
        except FileNotFoundError:
            raise FileNotFoundError("missing file") from None
        except ValueError as error:  # a path with a NUL byte, or a file that is not parquet
            raise LocatorError(f"cannot be read: {error}") from None
        except (LocatorError, RemoteError):
            raise
        except OSError as error:
            if error.errno is not None and error.errno not in ERRORS_OF_ONE_FILE:
                raise
            raise LocatorError(f"cannot be read: {error.strerror or error}") from None

    def _read_range(self, locator: TarLocator) -> bytes:
        if locator.num_bytes > MAX_IMAGE_BYTES:
            raise LocatorError(f"{locator.num_bytes} bytes, expected at most {MAX_IMAGE_BYTES}")
        if is_remote(locator.url):
            return with_retries(locator.url, lambda: _fetch_range(locator), self._retry)
        with open_regular(locator.url) as file:
            file.seek(locator.offset)
            content = file.read(locator.num_bytes)
        if len(content) < locator.num_bytes:
            raise LocatorError(f"ended after {len(content)} of its {locator.num_bytes} bytes")
        return content

    def _read_cell(self, locator: ParquetLocator) -> bytes:
        values = self._row_groups.get(locator.url, locator.row_group, locator.column)
        if locator.row >= len(values):
            raise LocatorError(
                f"row group {locator.row_group} has {len(values)} rows, no row {locator.row}"
            )
        value = values[locator.row].as_py()
        if isinstance(value, dict):
            value = value[locator.column.rpartition(".")[2]]
        if value is None:
            raise LocatorError("no image in this row")
        content: bytes = value
        return content


@cache
def process_reader() -> LocatorReader:
    """Returns the reader that all threads of this process share, with its cache."""
    return LocatorReader()


def read_image_bytes(locator: ImageLocator) -> bytes:
    """Returns an image file's content.

    Raises FileNotFoundError ("missing file") and LocatorError for errors of this image, RemoteError
    and other OSErrors for errors of the network or the machine.
    """
    return process_reader().read(locator)


def open_regular(path: str | Path, max_bytes: int | None = None) -> BinaryIO:
    """Opens a file for reading in binary mode, without waiting for a named pipe.

    Raises LocatorError for a folder, pipe, socket or device, and for a file that is too large, and
    OSError as `open` does.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait otherwise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (max_bytes is None or status.st_size <= max_bytes):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise LocatorError(f"{status.st_size} bytes, expected at most {max_bytes}")
    found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
    raise LocatorError(f"{found}, expected a regular file")


def changed_ns(locator: ImageLocator) -> int | None:
    """Returns when the file that holds an image last changed; None if it is remote or missing.

    It is the time of the last change of the inode, which no program can set: unlike the time of
    the last modification, it also shows a file that was replaced by an older one.
    """
    path = locator.path if isinstance(locator, FileLocator) else locator.url
    if not isinstance(locator, FileLocator) and is_remote(path):
        return None
    try:
        return Path(path).stat().st_ctime_ns
    except (OSError, ValueError):  # a name with a NUL byte, for example
        return None


def locator_name(locator: ImageLocator) -> str:
    """Returns a name that does not depend on the folder or host, for hashes and messages."""
    if isinstance(locator, FileLocator):
        return replace_surrogates(Path(locator.path).name)
    if isinstance(locator, TarLocator):
        return replace_surrogates(locator.name)
    place = f"row group {locator.row_group} row {locator.row}"
    return replace_surrogates(f"{file_name_of(locator.url)} {place}")


def locator_to_json(locator: ImageLocator) -> list[str | int]:
    """Returns a locator as plain values: its kind, then its fields."""
    kind = next(name for name, cls in KINDS.items() if isinstance(locator, cls))
    return [kind, *(getattr(locator, name) for name in locator.__slots__)]


def locator_from_json(values: list[Any]) -> ImageLocator:
    """Returns the locator that `locator_to_json` was given. Raises ValueError for other kinds."""
    kind, *fields = values
    if kind not in KINDS:
        raise ValueError(f"locator of kind {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind](*fields)


def file_name_of(url: str) -> str:
    """Returns the last part of a path or URL, without a query."""
    return without_query(url).rpartition("/")[2]


def replace_surrogates(text: str) -> str:
    """Returns text that UTF-8 can encode: half a surrogate pair becomes `?`."""
    return text.encode("utf-8", "replace").decode()


def with_retries(url: str, read: Callable[[], T], retry: Retry | None = None) -> T:
    """Returns `read()`; for a URL, temporary failures are retried."""
    return transport.with_retries(url, read, retry or Retry()) if is_remote(url) else read()


def _fetch_range(locator: TarLocator) -> bytes:
    if not locator.num_bytes:
        return b""
    system, path = find_filesystem(locator.url)
    end = locator.offset + locator.num_bytes
    content: bytes = system.cat_file(path, start=locator.offset, end=end)
    if len(content) != locator.num_bytes:
        raise ShortReadError(f"found {len(content)} bytes, expected {locator.num_bytes}")
    return content


def import_parquet() -> Any:
    """Returns the module pyarrow.parquet. Raises ValueError if pyarrow is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ValueError(
            "parquet needs pyarrow, which is not installed: pip install 'latent-t2i[parquet]'"
        ) from error


def open_parquet(url: str) -> Any:
    """Returns a pyarrow ParquetFile of a path or URL. The caller closes it with `force=True`."""
    parquet = import_parquet()
    if not is_remote(url):
        open_regular(url).close()  # refuses pipes and devices
        return parquet.ParquetFile(url)
    system, path = find_filesystem(url)
    return parquet.ParquetFile(system.open(path, "rb"), pre_buffer=True)  # fewer, larger requests


def read_row_group(url: str, row_group: int, columns: list[str], retry: Retry | None = None) -> Any:
    """Returns columns of a row group as a pyarrow Table, without reading the other columns."""

    def read() -> Any:
        file = open_parquet(url)
        try:
            return file.read_row_group(row_group, columns=columns)
        finally:
            file.close(force=True)

    return with_retries(url, read, retry)


class RowGroupCache:
    """Least recently used columns of row groups. Safe to use from several threads.

    The first thread that needs a group reads it, and the others wait for it.
    """

    def __init__(self, max_bytes: int, retry: Retry | None = None) -> None:
        self._max_bytes = max_bytes
        self._retry = retry
        self._lock = threading.Lock()
        self._cached: OrderedDict[tuple[str, int, str], Future[Any]] = OrderedDict()

    def get(self, url: str, row_group: int, column: str) -> Any:
        """Returns a column of a row group as a pyarrow ChunkedArray."""
        key = (url, row_group, column)
        with self._lock:
            future = self._cached.get(key)
            is_first = future is None
            if future is None:
                future = self._cached[key] = Future()
            self._cached.move_to_end(key)
        if is_first:
            self._read(key, future)
        return future.result()

    def _read(self, key: tuple[str, int, str], future: Future[Any]) -> None:
        url, row_group, column = key
        try:
            table = read_row_group(url, row_group, [column], self._retry)
        except BaseException as error:
            with self._lock:
                self._cached.pop(key, None)  # so that a later call tries again
            future.set_exception(error)
            raise
        future.set_result(table.column(0))
        with self._lock:
            self._evict()

    def _evict(self) -> None:
        """Removes the least recently used groups above the limit, but none that is being read."""
        sizes = {key: f.result().nbytes for key, f in self._cached.items() if f.done()}
        for key in list(sizes)[:-MIN_CACHED]:
            if sum(sizes.values()) <= self._max_bytes:
                return
            del self._cached[key], sizes[key]
