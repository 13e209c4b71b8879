"""A bounded local folder for the shards of one remote set; several processes may share it.

    CACHE/<manifest's hash>/manifest.json   empty_text.npy   shard-000003.tar ...

A shard is downloaded under a hidden name, checked against its size and hash, and renamed, so a file
with a shard's name is that shard. Space is freed under a folder lock, so all files together, also
unfinished ones, never exceed the bound. The cost: a process may evict a shard that another needs.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Literal

from latent_t2i.shards.checks import check_hash
from latent_t2i.shards.files import sync_folder
from latent_t2i.shards.remote.transport import (
    Retry,
    check_sha256,
    fetch_document,
    fetch_small_files,
    iterate,
    join,
    open_stream,
    without_query,
)
from latent_t2i.shards.schema import MANIFEST_NAME, FormatError, Manifest, ShardEntry

HASH_TRIES = 3
"""Number of download attempts before a hash mismatch is reported."""
FOLDER_LOCK = ".lock"
IN_USE_LOCK = ".in-use"
ID_LENGTH = 16

Outcome = Literal["here", "elsewhere", "no room"]
"""Result of an attempt to get a shard; `elsewhere`: another process is downloading it."""


def default_cache_dir() -> Path:
    """Returns the default folder, in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "latent-t2i" / "shards"


def open_store(
    location: str,
    cache_dir: Path,
    cache_bytes: int,
    *,
    verify: bool = False,
    retry: Retry | None = None,
) -> "Store":
    """Downloads a set's manifest and small files to the cache, and returns its store.

    Shards are hashed when they are downloaded. `verify` also hashes those that are already there,
    and deletes damaged ones. To make room for this set within `cache_bytes`, other sets that no
    process uses are deleted, the least recently used first.

    Raises RemoteError and FormatError for a location without a finished set.
    """
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        tables = [*cache_dir.expanduser().glob("*/shards.npy")]  # of earlier runs
        manifest = fetch_document(Manifest, location, Path(temporary), copies=tables, retry=retry)
        folder = cache_dir.expanduser() / manifest.sha256[:ID_LENGTH]
        # The store marks the folder as in use, so that no other process deletes it from here on.
        store = Store(location, folder, manifest, cache_bytes, retry or Retry())
        with locked(folder):
            _remove_leftovers(folder)
            if manifest.shard_table is not None:
                _copy(Path(temporary) / manifest.shard_table.name, folder)
            fetch_small_files(location, folder, manifest, retry=retry)
            _copy(Path(temporary) / MANIFEST_NAME, folder)
    store.manifest = Manifest.load(folder)  # which maps the shard table from this folder
    make_room_among_sets([store])
    for shard in store.present() if verify else ():
        store.remove_damaged(shard)
    return store


class Store:
    """The shards of a set that are on the local disk, by index."""

    def __init__(
        self, location: str, folder: Path, manifest: Manifest, cache_bytes: int, retry: Retry
    ) -> None:
        self.location = location
        self.folder = folder
        self.manifest = manifest
        self.cache_bytes = cache_bytes
        self.stopped = threading.Event()
        """Setting it stops a download and its retries."""
        self.retry = replace(retry, pause=self.stopped.wait)
        self.hashed: set[int] = set()
        """Shards whose hash was checked by this process."""
        self._release = weakref.finalize(self, _share(folder / IN_USE_LOCK).close)

    def close(self) -> None:
        """Stops the current download, and allows other processes to delete the set."""
        self.stopped.set()
        self._release()

    @property
    def whole_bytes(self) -> int:
        """The size of the whole set with its manifest."""
        manifest = (self.folder / MANIFEST_NAME).stat().st_size
        return self.manifest.num_bytes + manifest

    @property
    def room_bytes(self) -> int:
        """The part of the bound that remains for shards."""
        small = sum(entry.bytes for entry in self.manifest.small_files)
        return self.cache_bytes - small - (self.folder / MANIFEST_NAME).stat().st_size

    def has(self, shard: int) -> bool:
        """Returns whether a shard is on disk with the right size."""
        entry = self.manifest.shards[shard]
        try:
            return (self.folder / entry.name).stat().st_size == entry.bytes
        except FileNotFoundError:
            return False

    def present(self) -> set[int]:
        """Returns the shards on disk."""
        return set(self.manifest.shards.find(path.name for path in self.folder.iterdir()))

    def get(self, shard: int, spare: Sequence[int], drop: Callable[[int], bool]) -> Outcome:
        """Downloads a shard, and evicts others if there is no room for it.

        Args:
            shard: Index of the shard.
            spare: Shards that may be evicted, in this order.
            drop: Called before a shard is evicted; returns False to keep it.

        Raises:
            RemoteError: The location cannot be read.
            FormatError: The remote file is not the manifest's shard.
        """
        entry = self.manifest.shards[shard]
        partial = self.folder / _hidden(entry)
        with locked(self.folder):
            if self.has(shard):
                return "here"
            # The hidden file is also the lock of the download, so a killed process leaves no lock.
            file = _claim(partial)
            if file is None:
                return "elsewhere"
            if not self._make_room(spare, drop):
                partial.unlink()
                file.close()
                return "no room"
        with file:
            try:
                self._download(entry, file)
                partial.rename(self.folder / entry.name)
                self.hashed.add(shard)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        sync_folder(self.folder)
        return "here"

    def used_bytes(self) -> int:
        """Returns the size of all shards on disk; unfinished ones count in full."""
        names = (path.name for path in self.folder.iterdir())
        shards = self.manifest.shards
        found = shards.find(name.removeprefix(".").removesuffix(".partial") for name in names)
        return int(shards.bytes[sorted(set(found))].sum())

    def remove_damaged(self, shard: int) -> None:
        """Deletes a shard if its hash differs from the manifest's."""
        entry = self.manifest.shards[shard]
        try:
            check_hash(self.folder, entry)
            self.hashed.add(shard)
        except FormatError:
            (self.folder / entry.name).unlink(missing_ok=True)

    def trim(self, spare: Sequence[int], drop: Callable[[int], bool]) -> None:
        """Evicts shards down to the bound, which may be lower than in an earlier run."""
        with locked(self.folder):
            self._make_room(spare, drop)

    def _make_room(self, spare: Sequence[int], drop: Callable[[int], bool]) -> bool:
        excess = self.used_bytes() - self.room_bytes
        if excess > 0:
            _remove_leftovers(self.folder)
            excess = self.used_bytes() - self.room_bytes
        if excess <= 0:
            return True
        present = self.present()  # not a stat for each of a million shards
        candidates = [shard for shard in spare if shard in present]
        if excess > self.manifest.shards.bytes[candidates].sum():
            return False
        for shard in candidates:
            if drop(shard):
                entry = self.manifest.shards[shard]
                (self.folder / entry.name).unlink(missing_ok=True)
                excess -= entry.bytes
            if excess <= 0:
                return True
        return False

    def _download(self, entry: ShardEntry, file: IO[bytes]) -> None:
        """Downloads a shard to an open file, again after a hash mismatch (a faulty proxy, say)."""
        url = join(self.location, entry.name)
        # Once more for the network, and once for a proxy that stored a damaged file.
        tries = min(HASH_TRIES, self.retry.attempts)
        for _ in range(tries):
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()
            with open_stream(url, size=entry.bytes, retry=self.retry) as stream:
                for chunk in iterate(stream):
                    digest.update(chunk)
                    self._write(entry, file, chunk)
                    if self.stopped.is_set():
                        raise InterruptedError(f"{without_query(url)}: the download was stopped")
            if digest.hexdigest() == entry.sha256:
                file.flush()
                os.fsync(file.fileno())
                return
        check_sha256(url, entry, digest.hexdigest(), tries=tries)

    def _write(self, entry: ShardEntry, file: IO[bytes], chunk: bytes) -> None:
        try:
            file.write(chunk)
        except OSError as error:  # it does not name the file
            raise OSError(error.errno, error.strerror, str(self.folder / entry.name)) from error


def _copy(path: Path, folder: Path) -> None:
    """Copies a file to a folder so that it is complete or absent."""
    partial = folder / f".{path.name}.partial"
    shutil.copyfile(path, partial)
    partial.rename(folder / path.name)


def _hidden(entry: ShardEntry) -> str:
    """Returns the name of a shard while it is downloaded."""
    return f".{entry.name}.partial"


def _claim(path: Path) -> IO[bytes] | None:
    """Opens a file and locks it; returns None if another process holds the lock."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    if not _is_still_at(path, file):
        file.close()
        return None
    return file


def _share(path: Path) -> IO[bytes]:
    """Marks a set's folder as in use for as long as the returned file is open."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("ab")
        except FileNotFoundError:
            continue  # the folder was deleted in between
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_still_at(path, file):
            os.utime(path)  # the time of the set's last use
            return file
        file.close()


def _is_still_at(path: Path, file: IO[bytes]) -> bool:
    """Returns whether an open file still exists; it may be deleted before it is locked."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a store's folder, without which nothing is deleted or begun there."""
    with (folder / FOLDER_LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Deletes unfinished downloads of killed processes."""
    for path in folder.glob(".*.partial"):
        file = _claim(path)
        if file is not None:
            path.unlink()
            file.close()


def make_room_among_sets(mine: Sequence[Store]) -> None:
    """Deletes unused other sets, the least recently used first, to make room for these stores.

    Together, all files stay within the largest bound of these stores.
    """
    folders = {store.folder for store in mine}
    cache_bytes = max(store.cache_bytes for store in mine)
    room_bytes = max(0, cache_bytes - sum(store.whole_bytes for store in mine))
    marks = [
        path
        for path in mine[0].folder.parent.glob(f"*/{IN_USE_LOCK}")
        if path.parent not in folders
    ]
    sizes = {mark: _folder_bytes(mark.parent) for mark in marks}
    for mark in sorted(marks, key=_used_at):
        if sum(sizes.values()) <= room_bytes:
            return
        if _remove_unused(mark):
            del sizes[mark]


def _remove_unused(mark: Path) -> bool:
    try:
        with mark.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doomed = Path(tempfile.mkdtemp(prefix=".removed-", dir=mark.parent.parent))
            mark.parent.rename(doomed)  # first, so that no process opens a half-deleted set
    except (BlockingIOError, FileNotFoundError):
        return False  # in use, or just deleted by another process
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _used_at(mark: Path) -> float:
    try:
        return mark.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _folder_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return 0  # another process is deleting it
