"""Reading a set of shards from where it lies: a folder, a URL that fsspec knows, or a command.

    with open_stream(join("https://host/train", "shard-000000.tar"), size=entry.bytes) as stream:
        stream.read(4096)

`pipe:COMMAND` reads what COMMAND/NAME prints: `pipe:ssh host cat /data/train`. fsspec speaks the
protocols; credentials and endpoints are its own settings. Here a lost connection, a busy server, a
short file and a failed command are tried again, with longer and longer waits; reading goes on where
it broke off if the place can seek, else it begins anew and what was read before is passed over. The
price of a full stop is that a file that is not there is named at once, and never waited for.
"""

import hashlib
import io
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from latent_t2i.shards.schema import MANIFEST_NAME, FileEntry, FormatError, Manifest

BLOCK_BYTES = 8 * 2**20
"""Asked for at a time where a file is read by ranges."""
BUFFER_BYTES = 2**20
PIPE = "pipe:"

# What protocol packages raise beside OSError; they are looked up once the package is loaded.
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
"""A ValueError that is also one of the above: an impossible URL, an untrusted certificate."""
BUSY_STATUS = (408, 425, 429)
"""HTTP answers below 500 that another try may change."""
WAIT_FOR_CONNECTION_S = 30
WAIT_FOR_DATA_S = 60


class RemoteError(OSError):
    """A place could not be read; the message names it, the attempts and the last cause."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message  # readers of tar files add to `args`


class ShortReadError(OSError):
    """A file ended before its size; often a connection that broke off without a sign."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often, and with what waits, reading is tried again when it fails without progress."""

    attempts: int = 8
    first_wait_s: float = 0.5
    """Doubled each time; up to half of a wait is left off by chance, so that processes that failed
    together do not come back together."""
    longest_wait_s: float = 30.0
    pause: Callable[[float], object] = time.sleep

    def wait(self, num_failures: int) -> None:
        """Waits after so many failures in a row."""
        wait_s = min(self.first_wait_s * 2 ** (num_failures - 1), self.longest_wait_s)
        self.pause(wait_s * random.uniform(0.5, 1.0))


def is_remote(location: str) -> bool:
    """Returns whether a location is a URL or a command rather than a folder."""
    return location.startswith(PIPE) or "://" in location


def join(location: str, name: str) -> str:
    """Returns where a file of a set lies; an http URL keeps its query."""
    if location.startswith(PIPE):
        return f"{location.rstrip('/')}/{shlex.quote(name)}"
    base, mark, query = location.partition("?") if _is_http(location) else (location, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def open_stream(
    url: str, *, size: int | None = None, retry: Retry | None = None
) -> io.BufferedReader:
    """Returns a file to read front to back, of `size` bytes where that is known.

    Reading raises RemoteError once all attempts failed, or at once for what is not there or not
    allowed, and FormatError for a file longer than `size`.
    """
    return io.BufferedReader(Stream(url, size=size, retry=retry), BUFFER_BYTES)


def iterate(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yields what is left of a stream in pieces."""
    while chunk := stream.read(BUFFER_BYTES):
        yield chunk


def read_file(url: str, *, size: int | None = None, retry: Retry | None = None) -> bytes:
    """Returns a small file's content."""
    with open_stream(url, size=size, retry=retry) as stream:
        return stream.read()


def fetch_manifest(location: str, folder: Path, *, retry: Retry | None = None) -> Manifest:
    """Reads and checks a set's manifest, and leaves it in a local folder.

    Raises FormatError as `Manifest.load` does, naming the location.
    """
    content = read_file(join(location, MANIFEST_NAME), retry=retry)
    (folder / MANIFEST_NAME).write_bytes(content)
    try:
        return Manifest.load(folder)
    except FormatError as error:
        raise FormatError(str(error).replace(str(folder), location)) from error


def fetch_small_files(
    location: str, folder: Path, manifest: Manifest, *, retry: Retry | None = None
) -> None:
    """Brings the files beside the shards into a local folder, unless they are there.

    Raises FormatError for one whose hash is not the manifest's.
    """
    for entry in manifest.small_files:
        path = folder / entry.name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256:
            continue
        url = join(location, entry.name)
        content = read_file(url, size=entry.bytes, retry=retry)
        check_sha256(url, entry, hashlib.sha256(content).hexdigest())
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.rename(path)


def check_sha256(url: str, entry: FileEntry, found: str, *, tries: int = 1) -> None:
    """Raises FormatError where what was read is not what the manifest says."""
    if found != entry.sha256:
        times = f" in each of {tries} downloads" if tries > 1 else ""
        raise FormatError(
            f"{url}: sha256: expected {entry.sha256}, found {found}{times}: "
            "not the file that the manifest was written with"
        )


class Stream(io.RawIOBase):
    """A file read front to back, over as many connections as it takes."""

    def __init__(self, url: str, *, size: int | None = None, retry: Retry | None = None) -> None:
        self._url = url
        self._size = size
        self._retry = retry or Retry()
        self._position = 0
        self._num_failures = 0
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        """True: that is all it can."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Reads up to the buffer's size and returns how many bytes, 0 at the end."""
        want = len(buffer)
        if self._size is not None:
            want = min(want, self._size - self._position)
        if want == 0:
            return 0
        chunk = self._read(want)
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        if self._position == self._size:
            self._expect_end()
        return len(chunk)

    def close(self) -> None:
        """Ends the connection."""
        self._drop()
        super().close()

    def _read(self, want: int) -> bytes:
        while True:
            try:
                if self._file is None:
                    self._file, to_skip = open_at(self._url, self._position)
                    pass_over(self._file, to_skip)
                chunk = self._file.read(want)
                if not chunk and self._size is not None:
                    raise ShortReadError(
                        f"ended after {self._position} bytes, expected {self._size}"
                    )
                self._num_failures = 0
                return chunk
            except _errors() as error:
                self._drop()
                self._give_up_or_wait(error)

    def _give_up_or_wait(self, error: Exception) -> None:
        self._num_failures += 1
        reason = refusal(error)
        if reason:
            raise RemoteError(f"{self._url}: {reason}") from error
        if self._num_failures >= self._retry.attempts:
            raise RemoteError(
                f"{self._url}: gave up at byte {self._position} after {self._num_failures} "
                f"attempts; the last one: {describe(error)}"
            ) from error
        self._retry.wait(self._num_failures)

    def _expect_end(self) -> None:
        """Raises FormatError for more bytes than there should be."""
        assert self._file is not None
        try:
            more = self._file.read(1)
        except _errors():
            return  # all that was wanted is here
        if more:
            raise FormatError(f"{self._url}: too long: expected {self._size} bytes, found more")

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def open_at(url: str, offset: int) -> tuple[BinaryIO, int]:
    """Opens a location's file; returns it and how many bytes of it come before `offset`.

    Raises what fsspec and the protocol's package raise, and ValueError where that is missing.
    """
    if _is_http(url):
        return _open_http(url, offset)
    if url.startswith(PIPE):
        file = cast(BinaryIO, Pipe(url))
    elif is_remote(url):
        system, path = find_filesystem(url)
        file = system.open(path, "rb", block_size=BLOCK_BYTES)
    else:
        file = Path(url).open("rb")  # noqa: SIM115 - the caller closes it
    if not offset or not file.seekable():
        return file, offset
    file.seek(offset)
    return file, 0


def pass_over(file: BinaryIO, num_bytes: int) -> None:
    """Reads bytes that were read before. Raises ShortReadError if there are not so many."""
    left = num_bytes
    while left:
        chunk = file.read(min(left, BUFFER_BYTES))
        if not chunk:
            raise ShortReadError(f"ended after {num_bytes - left} of the {num_bytes} bytes before")
        left -= len(chunk)


def find_filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's filesystem of a URL, and the path within it.

    Raises ValueError for an unknown protocol and for one whose package is not installed.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: a package is missing for this protocol: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    return system, path


def refusal(error: Exception) -> str:
    """Returns what a final answer says; nothing for an error that another try may change."""
    if isinstance(error, FileNotFoundError):
        return "not found"
    status = _status(error)
    denied = status is not None and 400 <= status < 500 and status not in BUSY_STATUS
    refused = isinstance(error, _loaded(REFUSED)) and not isinstance(error, _loaded(LOST))
    final = denied or refused or isinstance(error, NOT_LOST)
    return describe(error) if final else ""


def describe(error: Exception) -> str:
    """Returns an error as a few words: its HTTP status, or its kind and its text."""
    status, message = _status(error), getattr(error, "message", "")
    if status is not None:
        return f"HTTP status {status}" + (f" ({message})" if message else "")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Pipe:
    """What a command prints, as a file; a command that fails is an OSError at its end."""

    def __init__(self, url: str) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the pipe
        self._process = subprocess.Popen(
            url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, stderr=self._messages
        )

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes, none at the end."""
        assert self._process.stdout is not None
        chunk = self._process.stdout.read(size)
        if not chunk and (code := self._process.wait()):
            self._messages.seek(0)
            lines = self._messages.read().decode(errors="replace").splitlines()
            raise OSError(": ".join([f"exit code {code}", *lines[-1:]]))
        return chunk

    def seekable(self) -> bool:
        """False."""
        return False

    def close(self) -> None:
        """Ends the command."""
        assert self._process.stdout is not None
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()
        self._messages.close()


def _open_http(url: str, offset: int) -> tuple[BinaryIO, int]:
    """Opens one long answer: by ranges, each block would wait for the one before it.

    A server that knows no ranges sends the whole file again.
    """
    system, path = find_filesystem(url)
    headers = system.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    patience = sys.modules["aiohttp"].ClientTimeout(
        total=None, sock_connect=WAIT_FOR_CONNECTION_S, sock_read=WAIT_FOR_DATA_S
    )
    # A size, whatever it is, spares fsspec a request that hides what went wrong.
    file = system.open(path, "rb", block_size=0, size=1, headers=headers, timeout=patience)
    return cast(BinaryIO, file), 0 if file.r.status == 206 else offset


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _errors() -> tuple[type[Exception], ...]:
    return (OSError, *_loaded(LOST), *_loaded(REFUSED))


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    modules = ((sys.modules.get(module), name) for module, name in names)
    return tuple(getattr(module, name) for module, name in modules if hasattr(module, name))


def _status(error: Exception) -> int | None:
    """Returns the HTTP status that an error carries, as aiohttp, gcsfs or httpx name it."""
    for owner, name in (
        (error, "status"),
        (getattr(error, "response", None), "status_code"),
        (error, "code"),
    ):
        status = getattr(owner, name, None)
        if isinstance(status, int):
            return status
    return None
