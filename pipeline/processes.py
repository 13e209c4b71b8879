"""Several processes on one set: each writes its share of the shards, the last one merges them.

They share only the output folder, no connection: start them with `accelerate launch`, with Slurm,
or by hand with RANK and WORLD_SIZE, on one machine or several. The provenance, the scale of int8
text and the manifest are written under a file lock, which the system releases if a process dies.
The trade-off is that each process lists the source for itself.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from latent_t2i.shards.schema import PROGRESS_DIR

LOCK_NAME = "lock"


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


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Waits for and holds the exclusive lock of a set's folder.

    The lock file is in the set's progress folder, which is deleted when the set is finished: a
    process that waited for a deleted file locks the new one instead. Folders that the lock created
    and nothing else used are removed again.
    """
    progress, existed = folder / PROGRESS_DIR, folder.exists()
    while True:
        try:
            progress.mkdir(parents=True, exist_ok=True)
            file = (progress / LOCK_NAME).open("a")
        except (FileExistsError, FileNotFoundError):
            if _is_no_folder(progress):
                raise
            continue  # another process has just finished the set
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), progress / LOCK_NAME):
                continue
            try:
                yield
            finally:
                _remove_if_unused(progress, existed=existed)
            return


def _remove_if_unused(progress: Path, *, existed: bool) -> None:
    """Removes the progress folder if it holds only the lock: the set is finished or was refused."""
    with suppress(FileNotFoundError), _ignore_not_empty():
        if [path.name for path in progress.iterdir()] == [LOCK_NAME]:
            (progress / LOCK_NAME).unlink()
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
