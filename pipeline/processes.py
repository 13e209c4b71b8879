"""Several processes on one set: each writes the shards of its own numbers, the last one ends it.

They need no connection, only the folder: started by `accelerate launch`, by Slurm or by hand with
RANK and WORLD_SIZE, on one machine or on many. What must happen once (the provenance, the scale of
int8 text, the manifest) happens under a lock, which the system takes from a process that dies. The
price is that each of them lists the source for itself.
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
    """Processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether work of this number is this process's."""
        return number % self.num_processes == self.rank


def find_processes(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Returns this process's place, as `accelerate launch` and torchrun tell it.

    Raises ValueError for a place that there is not.
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
    """Waits until no other process works on a set's folder; leaves nothing behind that was not.

    The lock lies among what a set has while it is unfinished, which goes when the set is finished:
    whoever waited for a lock that is gone takes the next one.
    """
    progress, was_there = folder / PROGRESS_DIR, folder.exists()
    while True:
        try:
            progress.mkdir(parents=True, exist_ok=True)
            file = (progress / LOCK_NAME).open("a")
        except (FileExistsError, FileNotFoundError):
            if _is_in_the_way(progress):
                raise
            continue  # finished by another process in this moment
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), progress / LOCK_NAME):
                continue
            try:
                yield
            finally:
                _tidy(progress, was_there=was_there)
            return


def _tidy(progress: Path, *, was_there: bool) -> None:
    """Removes the lock where it is all there is: in a set that is finished, or was refused."""
    with suppress(FileNotFoundError), _if_empty():
        if [path.name for path in progress.iterdir()] == [LOCK_NAME]:
            (progress / LOCK_NAME).unlink()
            progress.rmdir()
            if not was_there:
                progress.parent.rmdir()


@contextmanager
def _if_empty() -> Iterator[None]:
    """Ends where a folder to be removed is not empty, as by one who waited for the lock."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # POSIX allows either
            raise


def _is_in_the_way(path: Path) -> bool:
    """Whether something is there and no folder; looked up once, since folders come and go."""
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
