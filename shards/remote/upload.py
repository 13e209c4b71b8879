"""Writes files to a folder behind a URL of fsspec, so that each is complete or absent.

    folder = RemoteFolder("s3://bucket/train")
    folder.put("shard-000000.tar", Path("work/shard-000000.tar"))
    folder.list()                                        # {"shard-000000.tar": 10240}

A file is put from the local disk, and its size is compared afterwards. An object store shows no
object before its put has ended; elsewhere (sftp, smb ...) a file gets its name by a rename.
"""

import os
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    error_status,
    find_filesystem,
    is_refused,
    join,
    with_retries,
)

T = TypeVar("T")

OBJECT_STORES = frozenset(
    {"abfs", "abfss", "az", "gcs", "gs", "hf", "oci", "oss", "r2", "s3", "s3a", "tos"}
)
"""Protocols whose puts are atomic, and whose renames copy the object."""
PARTIAL_PATTERN = re.compile(r".+\.[0-9]+-[0-9a-f]{8}\.put")
"""The temporary name of a file elsewhere: final name, process id and random digits."""
NUM_CONNECTIONS = 16
SIGN_IN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "run `gcloud auth application-default login`",
    "hf": "run `hf auth login` with a token that may write, or set HF_TOKEN",
}


class ShortWriteError(OSError):
    """A file that was put has another size at its URL."""


class RemoteFolder:
    """A folder behind a URL. Names are relative to it and may contain slashes.

    All methods raise RemoteError, with the URL, for errors that retries do not change.
    """

    max_files: int | None = None
    """The largest number of files that the store allows in one folder."""

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        """Raises ValueError for a protocol that is unknown, not installed or read-only."""
        self.url = url.rstrip("/")
        self.retry = retry or Retry()
        self.protocol = self.url.partition("://")[0]
        if self.protocol in ("http", "https") or "::" in self.url:
            raise ValueError(
                f"{url}: cannot be written to: use a folder, or a URL of a store, such as "
                "s3://BUCKET/FOLDER"
            )
        self._system, root = find_filesystem(self.url)
        self._root = root.rstrip("/")

    def list(self, name: str = "") -> dict[str, int | None]:
        """Returns the sizes of the files in a folder, and None for folders; {} if it is absent."""
        path = self._path(name)

        def read() -> Any:
            self._system.invalidate_cache()  # of a listing before a put by another process
            return self._system.ls(path, detail=True)

        try:
            entries = self._try(name, read)
        except FileNotFoundError:
            return {}
        sizes = {
            entry["name"].rstrip("/"): None if entry["type"] == "directory" else int(entry["size"])
            for entry in entries
        }
        sizes.pop(path, None)  # an empty object that stands for the folder
        return {found.rpartition("/")[2]: size for found, size in sizes.items()}

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Returns the content of small files. Raises FileNotFoundError if one is missing."""
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return dict(zip(names, pool.map(self._read, names), strict=True))

    def find(self, name: str) -> bytes | None:
        """Returns the content of a small file, or None if it is missing."""
        try:
            return self._read(name)
        except FileNotFoundError:
            return None

    def get(self, name: str, path: Path) -> None:
        """Downloads a file. Raises FileNotFoundError if it is missing."""
        self._try(name, lambda: self._system.get_file(self._path(name), str(path)))

    def put(self, name: str, path: Path) -> None:
        """Puts a local file, and compares the size at the URL."""
        self._send(name, path.stat().st_size, lambda to: self._system.put_file(str(path), to))

    def put_bytes(self, name: str, content: bytes) -> None:
        """Puts a small file."""
        self._send(name, len(content), lambda to: self._system.pipe_file(to, content))

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        path = self._path(name)
        with suppress(FileNotFoundError):
            self._try(name, lambda: self._system.rm_file(path))

    def delete_folder(self, name: str) -> None:
        """Deletes a folder with its files, if it is there.

        Another process may delete it at the same time: each of them repeats it until it is gone.
        """
        path = self._path(name)

        def delete() -> None:
            self._system.invalidate_cache()
            if self._system.exists(path):
                try:
                    self._system.rm(path, recursive=True)
                except FileNotFoundError as error:
                    raise OSError(f"a file was gone during the deletion: {error}") from error

        self._try(name, delete)

    def commit(self, *, now: bool = True) -> None:
        """Makes everything visible that was put and deleted; with `now` false, when it is due.

        Only the Hub collects changes; elsewhere each is visible at once.
        """

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _read(self, name: str) -> bytes:
        path = self._path(name)

        def read() -> bytes:
            self._system.invalidate_cache()  # it may have the size of an earlier file
            content: bytes = self._system.cat_file(path)
            return content

        return self._try(name, read)

    def _send(self, name: str, size: int, write: Callable[[str], Any]) -> None:
        path = self._path(name)

        def send() -> None:
            if self.protocol in OBJECT_STORES:
                write(path)
                self._check_size(path, size)
                return
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            temporary = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.put"
            try:
                write(temporary)
                try:
                    self._check_size(temporary, size)
                    if self._system.exists(path):  # sftp does not rename to a name that is taken
                        self._system.rm_file(path)
                    self._system.mv(temporary, path)
                except FileNotFoundError as error:  # of a process that finishes or puts the same
                    raise OSError(f"another process deleted a file: {error}") from error
            except BaseException:
                with suppress(OSError):
                    self._system.rm_file(temporary)
                raise

        try:
            self._try(name, send)
        except NotImplementedError as error:
            raise ValueError(f"{self.url}: this file system cannot be written to") from error
        except FileNotFoundError as error:
            raise RemoteError(
                f"{join(self.url, name)}: there is no such bucket or repository: create it, or "
                "correct --out"
            ) from error

    def _check_size(self, path: str, size: int) -> None:
        self._system.invalidate_cache()
        found = self._system.info(path)["size"]
        if found != size:
            raise ShortWriteError(f"put {size} bytes, found {found}")

    def _try(self, name: str, action: Callable[[], T]) -> T:
        """Returns `action()`, with retries. Adds how to sign in to errors of access."""
        try:
            return with_retries(join(self.url, name) if name else self.url, action, self.retry)
        except RemoteError as error:
            cause = error.__cause__
            denied = isinstance(cause, PermissionError) or error_status(cause) in (401, 403)
            if not denied and not is_refused(cause):
                raise
            remedy = SIGN_IN.get(self.protocol, f"sign in as the package of {self.protocol} needs")
            raise RemoteError(f"{error}: {remedy}, and check that you may write there") from cause
