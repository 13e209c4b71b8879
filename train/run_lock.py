"""A lock on the run folder, because two trainings of one run would overwrite each other's files.

The main process holds the lock for the whole run. The system releases it when that process ends,
even by SIGKILL, so a lock is never stale.
"""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

LOCK_FILE = ".lock"
_held: set[TextIO] = set()


@contextmanager
def lock_run(folder: Path, processes: PartialState) -> Iterator[None]:
    """Holds the lock of a run's folder. All processes of the run must call it.

    Raises ValueError, in all of them, if another training holds it.
    """
    file, error = _acquire(folder) if processes.is_main_process else (None, None)
    [error] = broadcast_object_list([error])
    if error is not None:
        raise ValueError(error)
    try:
        yield
    finally:
        if file is not None:
            _release(folder, file)


def _close_in_fork() -> None:
    """Closes inherited locks, so that a loader's worker process does not outlive and hold one."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_fork)


def _acquire(folder: Path) -> tuple[TextIO | None, str | None]:
    """Returns the locked file, or the reason why another training is refused.

    Returns neither, after a warning, if the file system has no locks.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK_FILE).open("a+")
        except FileNotFoundError:  # removed by `_release` since the line above
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read(200).strip() or "an unknown process"
            return None, (
                f"{folder}: this run is already being trained by {owner}; stop that process or "
                "wait for it, or start another run with another --name or --out"
            )
        except OSError as error:
            file.close()
            print(
                f"warning: {folder}: its file system does not support locks ({error.strerror}), "
                "so a second training of this run would not be refused",
                file=sys.stderr,
            )
            return None, None
        if _is_file_of(folder, file):
            break
        file.close()
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    file.write(f"process {os.getpid()} on host {socket.gethostname()} since {since}\n")
    file.flush()
    _held.add(file)
    return file, None


def _is_file_of(folder: Path, file: TextIO) -> bool:
    """Returns whether the locked file is still the one in the folder."""
    try:
        return os.path.samestat((folder / LOCK_FILE).stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _release(folder: Path, file: TextIO) -> None:
    """Releases the lock, and removes the folder if the run wrote nothing into it."""
    _held.discard(file)
    with file, contextlib.suppress(OSError):
        file.truncate(0)
        if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            folder.rmdir()
