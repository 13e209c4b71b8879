"""Several processes on one set: each writes its share of the shards, the last one merges them.

They share only the output folder: start them with `accelerate launch`, with Slurm, or by hand with
RANK and WORLD_SIZE, on one machine or several. File locks, which the system releases if a process
dies, refuse a second process of a rank and serialise what is written once. The cost: each process
lists the source.
"""

import errno
import fcntl
import itertools
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from latent_t2i.shards.schema import PROGRESS_DIR

LOCK_NAME = "lock"
RUN_NAME = "run.lock"
"""Every process that writes the set holds a shared lock on this file."""
SHARED_NAMES = {LOCK_NAME, RUN_NAME}
MAX_ATTEMPTS = 100
"""A folder that cannot be created this often is not being deleted by another process."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of `flock` on file systems without locks."""
MOUNTS = Path("/proc/self/mountinfo")
LOCAL_LOCKS = {
    "lustre": ("localflock",),
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("local_lock=all", "local_lock=flock"),
}
"""Mount options with which a file system's locks are not visible to other machines."""
REMEDY = "mount it with locks (Lustre: -o flock; NFS: version 4, without nolock and local_lock)"


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """This process among those that share the work."""

    rank: int = 0
    num_processes: int = 1
    local_rank: int = 0
    num_local: int = 1
    """Number of processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints the plan and the progress."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Returns whether this process writes the shard with this number."""
        return number % self.num_processes == self.rank


def find_processes(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Returns this process's rank, from the variables that `accelerate launch` and torchrun set.

    Raises ValueError for a rank outside 0 to WORLD_SIZE - 1.
    """
    rank = _number(environment, "RANK", 0)
    num_processes = _number(environment, "WORLD_SIZE", 1)
    if not 0 <= rank < num_processes:
        raise ValueError(f"RANK: expected 0 to {num_processes - 1} (WORLD_SIZE - 1), found {rank}")
    return ProcessInfo(
        rank=rank,
        num_processes=num_processes,
        local_rank=_number(environment, "LOCAL_RANK", 0),
        num_local=max(_number(environment, "LOCAL_WORLD_SIZE", 1), 1),
    )


class Owner:
    """This process while it owns a rank of a set."""

    def __init__(self, run: IO[str]) -> None:
        self._run = run

    def is_alone(self) -> bool:
        """Returns whether no other process writes the set. Call it under the folder's lock."""
        try:
            fcntl.flock(self._run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._run, fcntl.LOCK_SH)  # a failed upgrade loses the shared lock
        return True


@contextmanager
def own_rank(folder: Path, rank: int) -> Iterator[Owner]:
    """Makes this process the owner of one rank of a set, until it ends.

    Raises ValueError, naming process and host, if another process owns this rank. Prints a warning
    if a process on another machine would not be noticed.
    """
    if (mount := find_local_locks(folder)) is not None:
        print(
            f"warning: {folder}: {mount} locks files on this machine only, so a second run of this "
            "set on another machine is not refused; one of the same command does no harm: start "
            f"the set once only, or {REMEDY}",
            file=sys.stderr,
        )
    with _lock(folder, f"rank-{rank}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as own:
        own.truncate(0)
        own.write(f"process {os.getpid()} on {socket.gethostname()}")
        own.flush()
        with _lock(folder, RUN_NAME, fcntl.LOCK_SH) as run:
            yield Owner(run)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Waits for and holds the exclusive lock of a folder."""
    with _lock(folder, LOCK_NAME, fcntl.LOCK_EX):
        yield


@contextmanager
def _lock(folder: Path, name: str, mode: int) -> Iterator[IO[str]]:
    """Locks and yields a file in a folder's progress folder.

    The progress folder is deleted when the set is finished: a process that waited for a deleted
    file locks the new one instead. Folders that only locks used are removed again.
    """
    progress, existed = folder / PROGRESS_DIR, folder.exists()
    for attempt in itertools.count(1):
        try:
            progress.mkdir(parents=True, exist_ok=True)
            file = (progress / name).open("a+")  # "w" would erase the owner's name before the lock
        except (FileExistsError, FileNotFoundError):
            if attempt == MAX_ATTEMPTS or _is_no_folder(progress):
                raise
            continue  # another process has just finished the set
        with file:
            _flock(file, mode, folder)
            if not _is_at(file.fileno(), progress / name):
                continue
            try:
                yield file
            finally:
                # Shared files stay: other processes hold them or wait for them.
                if name not in SHARED_NAMES and _is_at(file.fileno(), progress / name):
                    (progress / name).unlink()
                fcntl.flock(file, fcntl.LOCK_UN)
                _remove_if_unused(progress, existed=existed)
            return


def _flock(file: IO[str], mode: int, folder: Path) -> None:
    try:
        fcntl.flock(file, mode)
    except BlockingIOError:
        file.seek(0)
        owner = file.read() or "another process"
        raise ValueError(
            f"{folder}: {owner} is writing this set: wait until it ends, or stop it; to divide the "
            "work among processes, give each its own RANK, and all the same WORLD_SIZE"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise ValueError(
            f"{folder}: the file system does not support file locks ({error.strerror}), without "
            "which two runs could write one set at once: choose an --out on another file system, "
            f"or {REMEDY}"
        ) from None


def find_local_locks(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """Returns type and option of a folder's mount if other machines do not see its locks.

    `mounts` is in the format of Linux's /proc/PID/mountinfo, and the last line that fits counts.
    """
    if not mounts.exists():  # not Linux
        return None
    found, longest = None, 0
    for line in mounts.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), before.split()[4])
        kind, _, options = after.split(" ", 2)
        if folder.absolute().is_relative_to(point) and len(point) >= longest:
            longest = len(point)
            named = {*options.split(",")} & {*LOCAL_LOCKS.get(kind, ())}
            found = f"{kind} with {min(named)}" if named else None
    return found


def _remove_if_unused(progress: Path, *, existed: bool) -> None:
    """Removes the progress folder if no process uses it: the set is finished or was refused.

    A process may begin to use it meanwhile. So lock files are deleted only while this process holds
    them, and no other does; whoever opened one before finds that it is gone, and tries again.
    """
    with suppress(FileNotFoundError, BlockingIOError), _ignore_not_empty(), ExitStack() as held:
        names = {path.name for path in progress.iterdir()}
        if not names <= SHARED_NAMES:
            return
        for name in sorted(names):
            file = held.enter_context((progress / name).open("r+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file.fileno(), progress / name):
                return
        if {path.name for path in progress.iterdir()} != names:
            return  # an owner has come, which holds no other lock yet
        for name in names:
            (progress / name).unlink()
        progress.rmdir()
        if not existed:
            progress.parent.rmdir()


@contextmanager
def _ignore_not_empty() -> Iterator[None]:
    """Ignores that a folder is not empty: another process has just created its lock file there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # POSIX allows either
            raise


def _is_no_folder(path: Path) -> bool:
    """Returns whether `path` exists and is no folder, from one look-up: folders come and go."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.lstrip("-").isdecimal():
        raise ValueError(f"{name}: expected a whole number, found {text!r}")
    return int(text)
