"""One large file over HTTP: gone on with where it broke off, and never two files glued together.

    fetch(RemoteFile(url=URL, num_bytes=NUM, sha256=SUM), Path("data/train2014.zip"))

What has come so far lies beside as NAME.part; NAME.json keeps what the server calls that version of
the file, its ETag or its date, and a further part is asked for only of the same version. A server
that knows no ranges, has another version now or names none sends the file from its beginning. The
file gets its name once its size and its SHA-256 are right; the price is to read it all once more.
"""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_t2i.shards.remote.transport import RemoteError, Retry, describe, refusal

BUFFER_BYTES = 1 << 18
HASHED_BYTES = 1 << 22
WAIT_S = 60.0
"""For a connection, and for each piece of data."""
OUT_OF_RANGE = 416
NUM_DOWNLOADS = 2
"""So often a file of the wrong content is fetched before that is told."""
HEADERS = {"User-Agent": "latent-t2i", "Accept-Encoding": "identity"}

MakeBar = Callable[[str, int, int], Any]
"""From a task, the bytes in all and those done to a progress bar."""


class LostError(OSError):
    """A connection that broke off, or a server that cannot for now: worth another try."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file and all that is known of it."""

    url: str
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The last part of its URL."""
        return self.url.rpartition("/")[2]


def fetch(file: RemoteFile, path: Path, *, retry: Retry, make_bar: MakeBar) -> None:
    """Brings a file to `path`, or what is missing of it.

    Raises RemoteError once all attempts failed, or at once for what is not there or not allowed,
    and ValueError for a file that is not the one that was to be fetched.
    """
    part, found = part_of(path), ""
    for _ in range(NUM_DOWNLOADS):
        with make_bar(file.name, file.num_bytes, size_of(part)) as bar:
            _download(file, path, retry, bar)
        found = hash_file(part, make_bar)
        if found == file.sha256:
            _flush(part)
            part.rename(path)
            return
        part.unlink()
    raise ValueError(
        f"{file.url}: sha256: expected {file.sha256}, found {found} at the last of "
        f"{NUM_DOWNLOADS} downloads: not the file that was published; it is deleted"
    )


def check(file: RemoteFile, path: Path, *, make_bar: MakeBar) -> None:
    """Raises ValueError if a file that is there is not the one that would be fetched."""
    advice = "move it away, and it is fetched"
    if size_of(path) != file.num_bytes:
        raise ValueError(
            f"{path}: expected {file.num_bytes} bytes, found {size_of(path)}: {advice}"
        )
    if (found := hash_file(path, make_bar)) != file.sha256:
        raise ValueError(f"{path}: sha256: expected {file.sha256}, found {found}: {advice}")


def part_of(path: Path) -> Path:
    """Returns where the bytes lie until a file is whole."""
    return path.with_name(f"{path.name}.part")


def version_of(path: Path) -> Path:
    """Returns where it is kept which version a file is; it also tells that `fetch` brought it."""
    return path.with_name(f"{path.name}.json")


def size_of(path: Path) -> int:
    """Returns a file's size, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def hash_file(path: Path, make_bar: MakeBar) -> str:
    """Returns a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file, make_bar("check", size_of(path), 0) as bar:
        while chunk := file.read(HASHED_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _download(file: RemoteFile, path: Path, retry: Retry, bar: Any) -> None:
    """Fetches until the part has the file's size; gives up when no try gets any further."""
    part = part_of(path)
    furthest, num_failures = size_of(part), 0
    while size_of(part) != file.num_bytes:
        try:
            with closing(_open_rest(file, path)) as response:
                _append(response, file, part, bar)
        except LostError as error:
            position = size_of(part)
            num_failures = num_failures + 1 if position <= furthest else 1
            furthest = max(furthest, position)
            if num_failures >= retry.attempts:
                raise RemoteError(
                    f"{file.url}: gave up at byte {position} after {num_failures} attempts; "
                    f"the last one: {error}; the same command goes on from there"
                ) from error
            tqdm.write(f"{file.name}: at byte {position}: {error}; trying again")
            retry.wait(num_failures)


def _open_rest(file: RemoteFile, path: Path) -> Any:
    """Asks for what is missing; where that cannot be had, drops the part and takes all of it."""
    part, version = part_of(path), _read_version(path)
    position = size_of(part)
    known = version.get("etag") or version.get("last_modified")
    if position and known and position < file.num_bytes:
        response = _open(file.url, {"Range": f"bytes={position}-", "If-Range": known})
        if _goes_on(response, version, position, file.num_bytes):
            return response
        if response.status in (206, OUT_OF_RANGE):
            response.close()
            part.unlink()
            raise LostError("the server has another file now, which is fetched from its beginning")
    else:
        response = _open(file.url, {})
    with ExitStack() as stack:
        stack.callback(response.close)
        _require_size(file, response.headers.get("Content-Length"))
        if position:
            tqdm.write(f"{file.name}: cannot be gone on with: from its beginning again")
        part.unlink(missing_ok=True)
        version_of(path).write_text(json.dumps(_version(response)))
        stack.pop_all()
    return response


def _goes_on(response: Any, version: dict[str, str], position: int, num_bytes: int) -> bool:
    """Whether an answer is what comes after `position`, of the same version.

    A server may ignore If-Range. It has to repeat an ETag, but need not repeat a date.
    """
    if response.status != 206:
        return False
    place = response.headers.get("Content-Range", "")
    if place not in (f"bytes {position}-{num_bytes - 1}/{total}" for total in (num_bytes, "*")):
        return False
    now = _version(response)
    if "etag" in version:
        return now.get("etag") == version["etag"]
    return now.get("last_modified", version["last_modified"]) == version["last_modified"]


def _version(response: Any) -> dict[str, str]:
    """What the server calls this version: a weak ETag tells too little to put parts together."""
    etag = response.headers.get("ETag", "")
    named = {
        "etag": "" if etag.startswith("W/") else etag,
        "last_modified": response.headers.get("Last-Modified", ""),
    }
    return {key: text for key, text in named.items() if text}


def _read_version(path: Path) -> dict[str, str]:
    """The version of the part that is there; empty if that is not known."""
    try:
        version = json.loads(version_of(path).read_text())
    except (FileNotFoundError, ValueError):  # ValueError: killed while writing it
        return {}
    assert isinstance(version, dict)
    return version


def _require_size(file: RemoteFile, length: str | None) -> None:
    """Raises ValueError before anything is fetched of a file that has another size."""
    if length is not None and int(length) != file.num_bytes:
        raise ValueError(
            f"{file.url}: expected {file.num_bytes} bytes, found {length}: not the file that was "
            "published"
        )


def _append(response: Any, file: RemoteFile, part: Path, bar: Any) -> None:
    """Writes an answer behind what is there. Raises LostError if it ends early."""
    with part.open("ab") as out:
        position = out.tell()
        bar.update(position - bar.n)
        while chunk := _read(response):
            position += len(chunk)
            if position > file.num_bytes:
                break
            out.write(chunk)
            bar.update(len(chunk))
    if position > file.num_bytes:
        part.unlink()
        raise ValueError(f"{file.url}: expected {file.num_bytes} bytes, found more; it is deleted")
    if position < file.num_bytes:
        raise LostError(f"ended after {position} of {file.num_bytes} bytes")


def _open(url: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(url, headers=HEADERS | headers)
    try:
        return urllib.request.urlopen(request, timeout=WAIT_S)
    except urllib.error.HTTPError as error:
        if error.code == OUT_OF_RANGE and "Range" in headers:
            return error  # the file there is shorter than the part here
        with error:
            raise _judge(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        raise _judge(url, error) from error


def _read(response: Any) -> bytes:
    # Only here are errors taken for the network's: a full disk is no reason to try again.
    try:
        chunk: bytes = response.read(BUFFER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise LostError(describe(error)) from error
    return chunk


def _judge(url: str, error: Exception) -> OSError:
    """Returns what to raise: LostError if another try may help, else RemoteError."""
    inner = getattr(error, "reason", None)  # urllib wraps what the socket raised
    cause = inner if isinstance(inner, Exception) else error
    reason = refusal(cause)
    return RemoteError(f"{url}: {reason}") if reason else LostError(describe(cause))


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
