"""Compares files with the manifest, at once or in the background."""

import hashlib
import queue
import threading
import weakref
from pathlib import Path

from latent_t2i.shards.schema import FileEntry, FormatError


def check_size(folder: Path, entry: FileEntry) -> None:
    """Raises FormatError if a file is missing or its size differs from the manifest's."""
    path = folder / entry.name
    if not path.is_file():
        raise FormatError(f"{path}: missing, expected a file of {entry.bytes} bytes")
    found = path.stat().st_size
    if found != entry.bytes:
        state = "truncated" if found < entry.bytes else "too long"
        raise FormatError(f"{path}: {state}: expected {entry.bytes} bytes, found {found}")


def check_hash(folder: Path, entry: FileEntry) -> None:
    """Raises FormatError if a file's sha256 differs from the manifest's."""
    with (folder / entry.name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise FormatError(hash_fault(folder / entry.name, entry, found))


def hash_fault(path: str | Path, entry: FileEntry, found: str) -> str:
    """Returns the message for a file whose sha256 differs from the manifest's."""
    return (
        f"{path}: sha256: expected {entry.sha256}, found {found}: the file changed after it was "
        "written"
    )


class BackgroundVerifier:
    """Hashes files in a background thread; a mismatch is raised by the next `check`."""

    def __init__(self, folder: Path, remedy: str = "") -> None:
        self._folder = folder
        self._remedy = remedy
        self._queue: queue.Queue[FileEntry | None] = queue.Queue()
        self._faults: list[str] = []
        self._is_started = False

    def add(self, entry: FileEntry) -> None:
        """Adds a file."""
        if not self._is_started:
            self._is_started = True
            stopped = threading.Event()
            arguments = (self._folder, self._queue, self._faults, stopped)
            # A daemon, so that the process can end before all files are hashed. Its arguments do
            # not include self: the thread would keep the verifier alive and never be stopped.
            threading.Thread(target=_hash_files, args=arguments, name="verify", daemon=True).start()
            weakref.finalize(self, _stop, self._queue, stopped)
        self._queue.put(entry)

    def check(self) -> None:
        """Raises FormatError if a file has another hash than the manifest."""
        if self._faults:
            raise FormatError(self._faults[0] + self._remedy)

    def finish(self) -> None:
        """Waits until all files are hashed, then checks."""
        self._queue.join()
        self.check()


def _hash_files(
    folder: Path,
    files: "queue.Queue[FileEntry | None]",
    faults: list[str],
    stopped: threading.Event,
) -> None:
    while (entry := files.get()) is not None:
        try:
            if not stopped.is_set():
                check_hash(folder, entry)
        except FormatError as error:
            faults.append(str(error))
        except FileNotFoundError:
            pass  # deleted or evicted after it was mapped, which does not change what was read
        except OSError as error:
            faults.append(f"{folder / entry.name}: cannot be read: {error.strerror}")
        finally:
            files.task_done()


def _stop(files: "queue.Queue[FileEntry | None]", stopped: threading.Event) -> None:
    stopped.set()
    files.put(None)
