"""Writes files that are complete or absent, also if several processes write the same file.

A file is written under a temporary name that is unique to the attempt, flushed to disk, and then
given its final name. The temporary file is locked while its process lives. Nothing here relies on a
lock that other machines see: some network file systems lock files on one machine only.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from latent_t2i.shards.layout import FileEntry
from latent_t2i.shards.parsing import FormatError

ATTEMPT_PATTERN = re.compile(r".+\.[0-9]+-([0-9a-f]{8})-[0-9a-f]{8}\.part")
"""The temporary name of a file: final name, process id, digits of its host, and random digits."""
STALE_S = 3600
"""An unlocked temporary file of another host is stale if nothing was written to it for so long."""
LINK_FAILURES = (
    errno.EEXIST,  # the name is taken
    errno.ENOENT,  # another process finished the set and deleted this file as stale
    errno.EPERM,  # the file system has no hard links: this and the rest
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)


class HashingFile:
    """A file under a temporary name that counts its bytes and computes their sha256."""

    def __init__(self, final: Path) -> None:
        self._file = _open_attempt(final)
        self.path = Path(self._file.name)
        self._hash = hashlib.sha256()
        self._is_muted = False
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        """Writes bytes; returns their number."""
        if self._is_muted:
            return len(data)
        self._hash.update(data)
        self.num_bytes += len(data)
        with _naming(self.path):
            return self._file.write(data)

    def mute(self) -> None:
        """Discards everything written from now on."""
        self._is_muted = True

    def sync(self) -> None:
        """Flushes the file to disk."""
        with _naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, which releases its lock."""
        with _naming(self.path):
            self._file.close()

    def publish(self, final: Path) -> str:
        """Gives the file its final name; returns the sha256 of its bytes on disk.

        If another process was first with the same bytes, its file stays. Raises FormatError if that
        file has other bytes, and OSError if the disk returns other bytes than were written.
        """
        sha256 = self._hash.hexdigest()
        try:
            if hash_on_disk(self.path) != sha256:
                text = "the disk returns other bytes than were written"
                raise OSError(errno.EIO, text, str(final))
            os.link(self.path, final)  # unlike a rename, fails if another process was first
        except OSError as error:
            if error.errno not in LINK_FAILURES:
                raise
            # A file of another size is no finished shard; something truncated it.
            if not final.exists() or final.stat().st_size != self.num_bytes:
                self.path.replace(final)
            elif (found := hash_on_disk(final)) != sha256:
                raise FormatError(
                    f"{final}: sha256: expected {sha256}, found {found}: another process wrote "
                    "another shard under this name; delete it and run the command again"
                ) from error
        sync_folder(final.parent)
        return sha256


def hash_on_disk(path: Path) -> str:
    """Returns the sha256 of a file, read from the disk and not from the page cache if possible."""
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_attempt(final: Path) -> IO[bytes]:
    """Creates a file under a unique temporary name; it is locked for as long as it is open."""
    while True:
        name = f"{final.name}.{os.getpid()}-{_host_digits()}-{secrets.token_hex(4)}.part"
        file = final.with_name(name).open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # 0 if it was deleted as stale before it was locked
            return file
        file.close()


def remove_stale_attempts(folder: Path, *, is_finished: bool = False) -> None:
    """Deletes temporary files of killed processes, which hold no lock any more.

    Those of other hosts are kept for STALE_S, except shards once all shards are finished.
    """
    for path in folder.glob("*.part"):
        attempt = ATTEMPT_PATTERN.fullmatch(path.name)
        if attempt is None:
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock of another host may not be visible here.
            idle_s = time.time() - os.fstat(file.fileno()).st_mtime
            is_unneeded = is_finished and path.suffixes[0] == ".tar"
            if is_unneeded or attempt[1] == _host_digits() or idle_s > STALE_S:
                path.unlink()


def _host_digits() -> str:
    """Returns eight hexadecimal digits that identify this host."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def write_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file, given as a whole or in chunks, so that it is complete or absent."""
    with _written(path, content) as temporary:
        temporary.replace(path)
    sync_folder(path.parent)


def write_first(path: Path, content: bytes) -> bool:
    """Does what `write_file` does unless the file exists; returns whether it was written."""
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in LINK_FAILURES:
                raise
            if path.exists():
                return False
            temporary.replace(path)
    sync_folder(path.parent)
    return True


@contextlib.contextmanager
def _written(path: Path, content: bytes | Iterable[bytes]) -> Iterator[Path]:
    """Yields a temporary file with this content, and deletes it unless it was renamed."""
    with _naming(path), _open_attempt(path) as file:
        temporary = Path(file.name)
        try:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def write_listed(path: Path, chunks: Iterable[bytes]) -> FileEntry:
    """Writes a file; returns its entry for the manifest."""
    digest, sizes = hashlib.sha256(), [0]

    def measured() -> Iterator[bytes]:
        for chunk in chunks:
            digest.update(chunk)
            sizes[0] += len(chunk)
            yield chunk

    write_file(path, measured())
    return FileEntry(name=path.name, bytes=sizes[0], sha256=digest.hexdigest())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to errors of open files, which come without one (a full disk, for example)."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
