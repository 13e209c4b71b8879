"""Reads the files of a set from a local folder or from any URL of fsspec, with retries.

    with open_stream(join("https://host/train", "shard-000000.tar"), size=entry.bytes) as stream:
        stream.read(4096)

Lost connections, busy servers and truncated responses are retried with exponential backoff. Reading
resumes at the same byte; a server without ranges sends the file from its start again.
"""

import hashlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import tenacity

from latent_t2i.shards.parsing import printable, read_limited
from latent_t2i.shards.schema import Document, FileEntry, FormatError, Manifest

T = TypeVar("T")
DocumentT = TypeVar("DocumentT", bound=Document)

BLOCK_BYTES = 8 * 2**20
"""Size of a request if a file is read in ranges."""
BUFFER_BYTES = 2**20

# Errors of protocol packages besides OSError. They are looked up once a package is loaded.
LOST = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("gcsfs.retry", "HttpError"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
)
REFUSED = (("botocore.exceptions", "BotoCoreError"), ("google.auth.exceptions", "GoogleAuthError"))
NOT_LOST = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
"""ValueError: some of the errors above are one too, for an invalid URL or certificate."""
BUSY_STATUS = (408, 425, 429)
"""HTTP statuses below 500 that a retry may change."""
WAIT_FOR_CONNECTION_S = 30
WAIT_FOR_DATA_S = 60


class RemoteError(OSError):
    """A remote file could not be read; the message names it, the attempts and the last error."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = printable(message)

    def __str__(self) -> str:
        return self.message  # tar readers append to `args`


class ShortReadError(OSError):
    """A file ended before its size; often a connection that was lost without an error."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Number of attempts of a failed read or write, and the waits between them."""

    attempts: int = 8
    """Number of attempts without progress before the read or write fails."""
    first_wait_s: float = 0.5
    """Doubled after each failure. Half of each wait is random, to spread out many processes."""
    longest_wait_s: float = 30.0
    pause: Callable[[float], Any] = time.sleep


def with_retries(
    url: str, read: Callable[[], T], retry: Retry | None = None, *, position: int | None = None
) -> T:
    """Returns `read()`, repeated while it fails with an error that a retry may change.

    `url` and `position` (in bytes) are for error messages. Raises FileNotFoundError and, for other
    final errors, RemoteError at once, and RemoteError after the last attempt.
    """
    retry = retry or Retry()
    half = {"multiplier": retry.first_wait_s / 2, "max": retry.longest_wait_s / 2}
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(retry.attempts),
        wait=tenacity.wait_exponential(**half) + tenacity.wait_random_exponential(**half),
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, _errors()) and not refusal(e)),
        sleep=retry.pause,
        reraise=True,
    )
    try:
        return retrying(read)
    except _errors() as error:
        shown, reason = without_query(url), refusal(error)
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{shown}: {reason}") from error
        if reason:
            raise RemoteError(f"{shown}: {reason}") from error
        at = "" if position is None else f" at byte {position}"
        raise RemoteError(
            f"{shown}: gave up{at} after {retry.attempts} attempts; the last error: "
            f"{describe(error)}"
        ) from error


def is_remote(location: str) -> bool:
    """Returns whether a location is a URL rather than a local folder."""
    return "://" in location


def without_query(url: str) -> str:
    """Returns an http URL without its query, which may contain a signature; others unchanged."""
    return url.partition("?")[0] if _is_http(url) else url


def join(location: str, name: str) -> str:
    """Returns the path or URL of a file in a location; an http URL keeps its query."""
    base, mark, query = location.partition("?") if _is_http(location) else (location, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def open_stream(
    url: str, *, size: int | None = None, retry: Retry | None = None
) -> io.BufferedReader:
    """Opens a file for reading from start to end; `size` is in bytes, where it is known.

    Reading raises RemoteError if the file is missing, not accessible, or all attempts failed, and
    FormatError if it is longer than `size`.
    """
    return io.BufferedReader(Stream(url, size=size, retry=retry), BUFFER_BYTES)


def iterate(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yields the rest of a stream in chunks."""
    while chunk := stream.read(BUFFER_BYTES):
        yield chunk


def read_file(url: str, *, size: int | None = None, retry: Retry | None = None) -> bytes:
    """Returns the content of a small file. Raises FormatError if it is too large to be one."""
    with open_stream(url, size=size, retry=retry) as stream:
        return read_limited(stream, without_query(url))


def fetch_document(
    kind: type[DocumentT],
    location: str,
    folder: Path,
    *,
    copies: Sequence[Path] = (),
    retry: Retry | None = None,
) -> DocumentT:
    """Downloads a manifest, with its shard table, or a list of buckets to a folder and checks it.

    A file among `copies` is copied instead of downloaded, if it is the same. Raises FormatError
    like `Document.load`, with the location in place of the folder.
    """

    def fetch(entry: FileEntry) -> None:
        if not copy_file(folder, entry, copies):
            fetch_file(location, folder, entry, retry=retry)

    content = read_file(join(location, kind.FILE_NAME), retry=retry)
    (folder / kind.FILE_NAME).write_bytes(content)
    try:
        return kind.load(folder, fetch)
    except FormatError as error:
        raise FormatError(str(error).replace(str(folder), without_query(location))) from error


def copy_file(folder: Path, entry: FileEntry, copies: Iterable[Path]) -> bool:
    """Copies a file of a set from the first equal one of `copies`; returns whether there is one."""
    for path in copies:
        try:
            if path.name == entry.name and path.stat().st_size == entry.bytes:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == entry.sha256:
                    (folder / entry.name).write_bytes(content)
                    return True
        except FileNotFoundError:
            continue  # another process has just deleted it
    return False


def fetch_small_files(
    location: str, folder: Path, manifest: Manifest, *, retry: Retry | None = None
) -> None:
    """Downloads the files that are read when a set is opened to a local folder.

    Raises FormatError if the hash of a file differs from the manifest's.
    """
    for entry in manifest.small_files:
        fetch_file(location, folder, entry, retry=retry)


def fetch_file(
    location: str, folder: Path, entry: FileEntry, *, retry: Retry | None = None
) -> None:
    """Downloads a small file of a set to a local folder, unless it is there already.

    Raises FormatError if its hash differs from the manifest's.
    """
    path = folder / entry.name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256:
        return
    url = join(location, entry.name)
    content = read_file(url, size=entry.bytes, retry=retry)
    check_sha256(url, entry, hashlib.sha256(content).hexdigest())
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.rename(path)


def check_sha256(url: str, entry: FileEntry, found: str, *, tries: int = 1) -> None:
    """Raises FormatError if the sha256 of a download differs from the manifest's."""
    if found != entry.sha256:
        times = f" in each of {tries} downloads" if tries > 1 else ""
        raise FormatError(
            f"{without_query(url)}: sha256: expected {entry.sha256}, found {found}{times}: "
            "the manifest was written for another file"
        )


class Stream(io.RawIOBase):
    """A file that is read from start to end, over as many connections as necessary."""

    def __init__(self, url: str, *, size: int | None = None, retry: Retry | None = None) -> None:
        self._url = url
        self._size = size
        self._retry = retry
        self._position = 0
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Reads into the buffer and returns the number of bytes, 0 at the end."""
        want = len(buffer)
        if self._size is not None:
            want = min(want, self._size - self._position)
        if want == 0:
            return 0
        try:
            chunk = with_retries(
                self._url, lambda: self._read(want), self._retry, position=self._position
            )
        except FileNotFoundError as error:
            raise RemoteError(str(error)) from error
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        if self._position == self._size:
            self._expect_end()
        return len(chunk)

    def close(self) -> None:
        """Closes the connection."""
        self._drop()
        super().close()

    def _read(self, want: int) -> bytes:
        try:
            if self._file is None:
                self._file, to_skip = open_at(self._url, self._position)
                pass_over(self._file, to_skip)
            chunk = self._file.read(want)
            if not chunk and self._size is not None:
                raise ShortReadError(f"ended after {self._position} bytes, expected {self._size}")
        except _errors():
            self._drop()
            raise
        return chunk

    def _expect_end(self) -> None:
        """Raises FormatError if the file continues after its size."""
        assert self._file is not None
        try:
            more = self._file.read(1)
        except _errors():
            return  # all bytes of the file are here
        if more:
            raise FormatError(
                f"{without_query(self._url)}: too long: expected {self._size} bytes, found more"
            )

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def open_at(url: str, offset: int) -> tuple[BinaryIO, int]:
    """Opens a file near `offset`; returns it and the number of bytes to skip up to `offset`.

    Raises the errors of fsspec and of the protocol's package, and ValueError if that is missing.
    """
    if _is_http(url):
        return _open_http(url, offset)
    if is_remote(url):
        system, path = find_filesystem(url)
        file = system.open(path, "rb", block_size=BLOCK_BYTES)
    else:
        file = Path(url).open("rb")  # noqa: SIM115 - the caller closes it
    file.seek(offset)
    return file, 0


def pass_over(file: BinaryIO, num_bytes: int) -> None:
    """Skips bytes by reading them. Raises ShortReadError if there are fewer."""
    left = num_bytes
    while left:
        chunk = file.read(min(left, BUFFER_BYTES))
        if not chunk:
            raise ShortReadError(f"ended after {num_bytes - left} of the {num_bytes} bytes before")
        left -= len(chunk)


def find_filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec filesystem of a URL, and the path in it.

    Raises ValueError for an unknown protocol, or if the protocol's package is not installed.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: this protocol needs a package: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    return system, path


def refusal(error: Exception) -> str:
    """Returns the reason if an error is final; an empty string if a retry may change it."""
    if isinstance(error, FileNotFoundError):
        return "not found: there is no such file at this address"
    status = error_status(error)
    is_denied = status is not None and 400 <= status < 500 and status not in BUSY_STATUS
    return describe(error) if is_denied or is_refused(error) or isinstance(error, NOT_LOST) else ""


def is_refused(error: BaseException | None) -> bool:
    """Returns whether an error says that credentials or settings are missing or wrong."""
    return isinstance(error, _loaded(REFUSED)) and not isinstance(error, _loaded(LOST))


def describe(error: Exception) -> str:
    """Returns a short description of an error: its HTTP status, or its type and text."""
    status, message = error_status(error), getattr(error, "message", "")
    if status is not None:
        return f"HTTP status {status}" + (f" ({message})" if message else "")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def error_status(error: BaseException | None) -> int | None:
    """Returns the HTTP status of an error of aiohttp, gcsfs or httpx."""
    for owner, name in (
        (error, "status"),
        (getattr(error, "response", None), "status_code"),
        (error, "code"),
    ):
        status = getattr(owner, name, None)
        if isinstance(status, int):
            return status
    return None


def _open_http(url: str, offset: int) -> tuple[BinaryIO, int]:
    """Opens a single long response, because one request per range would wait for each other.

    A server without ranges sends the whole file.
    """
    system, path = find_filesystem(url)
    headers = system.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    timeout = sys.modules["aiohttp"].ClientTimeout(
        total=None, sock_connect=WAIT_FOR_CONNECTION_S, sock_read=WAIT_FOR_DATA_S
    )
    # With any `size`, fsspec skips a HEAD request that would hide the real error.
    file = system.open(path, "rb", block_size=0, size=1, headers=headers, timeout=timeout)
    return cast(BinaryIO, file), 0 if file.r.status == 206 else offset


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _errors() -> tuple[type[Exception], ...]:
    return (OSError, *_loaded(LOST), *_loaded(REFUSED))


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    modules = ((sys.modules.get(module), name) for module, name in names)
    return tuple(getattr(module, name) for module, name in modules if hasattr(module, name))
