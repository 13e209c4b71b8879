"""Gathers records by positioned reads in a thread pool, for file systems that map badly.

    reader = FileReader(num_files=3)
    reader.open(2, path)
    reader.gather(np.array([2, 2]), parts)

On a network file system, a page fault is a round trip, and they come one after the other. Here the
records of a batch are read at once, each with one call for all fields that lie close together. A
truncated file is an error instead of the end of the process. The cost: on a local disk, the calls
take longer than a gather from mapped files.
"""

import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, uint8

from latent_t2i.shards.parsing import FormatError
from latent_t2i.shards.source import Part, Slots

NUM_THREADS = 32
"""Reads at once. They wait for the network, so the number of cores does not matter."""
MAX_OPEN = 1024
MERGED_GAP_BYTES = 2**17
"""Fields this close are read together: 128 kB take less time than a round trip."""
T = TypeVar("T")


def default_open() -> int:
    """Returns how many files a new reader may keep open, at least 1.

    It is half of what the readers in use leave: a process may open several sets.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_OPEN
    left = limit // 2 - sum(reader.slots.num for reader in _LIVE)
    return max(1, min(MAX_OPEN, left // 2))


class FileReader:
    """Open files, and threads that read from them."""

    def __init__(self, num_files: int, num_slots: int | None = None) -> None:
        self.slots = Slots(num_files, num_slots or default_open())
        self._files: list[tuple[int, Path] | None] = [None] * self.slots.num
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="reads")
        weakref.finalize(self, _close_all, self._files)
        _LIVE.add(self)

    def open(self, file: int, path: Path, *, replace: bool = True) -> None:
        """Opens a file, in the place of another one if too many are open.

        Without `replace`, nothing happens in this case. Raises OSError if the system refuses.
        """
        descriptor = os.open(path, os.O_RDONLY)
        with self._lock:
            slot = self.slots.take(file, replace=replace)
            before: tuple[int, Path] | None = (descriptor, path)
            if slot is not None:
                before, self._files[slot] = self._files[slot], before
        if before:
            _close(before[0])

    def close(self, file: int) -> None:
        """Closes a file, if it is open."""
        with self._lock:
            slot = int(self.slots.of[file])
            if slot >= 0:
                self.slots.release(slot)
                before, self._files[slot] = self._files[slot], None
                assert before
                _close(before[0])

    def for_each(self, function: Callable[[int], None], files: Sequence[int]) -> None:
        """Calls a function that opens a file for several files at once."""
        self._run(function, files)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Returns some bytes of an open file. Raises FormatError if the file ends before them."""
        content = bytearray(size)
        self._read(file, [memoryview(content)], offset)
        return bytes(content)

    def gather(self, files: NDArray[np.int64], parts: Sequence[Part]) -> None:
        """Copies an item per part from each of some open files (B,) to the parts' tensors.

        Raises FormatError if a file ends before an item.
        """
        targets = [_bytes_of(part.out) for part in parts]
        places = np.stack([part.offsets for part in parts], 1)  # (B, parts)
        order = places.argsort(1)

        def read_rows(rows: range) -> None:
            gap = memoryview(bytearray(MERGED_GAP_BYTES))
            for row in rows:
                pieces = []
                for number in order[row].tolist():
                    size = parts[number].item_bytes
                    to = parts[number].rows
                    at = row if to is None else int(to[row])
                    target = targets[number][at * size : (at + 1) * size]
                    pieces.append((int(places[row, number]), target))
                for offset, buffers in merged(pieces, gap):
                    self._read(int(files[row]), buffers, offset)

        num_tasks = min(NUM_THREADS, len(files))
        self._run(read_rows, [range(n, len(files), num_tasks) for n in range(num_tasks)])

    def _run(self, function: Callable[[T], None], tasks: Sequence[T]) -> None:
        """Runs a function on all tasks at once, to the end, and raises the first error."""
        futures = [self._pool.submit(function, task) for task in tasks]
        wait(futures)  # after an error too, because the tasks write to the caller's memory
        for future in futures:
            future.result()

    def _read(self, file: int, buffers: list[memoryview], offset: int) -> None:
        """Fills some buffers with the bytes of a file from an offset on."""
        opened = self._files[self.slots.of[file]]
        assert opened
        descriptor, path = opened
        while buffers:
            try:
                num_read = os.preadv(descriptor, buffers, offset)
            except OSError as error:  # it does not name the file
                raise OSError(error.errno, error.strerror, str(path)) from error
            if not num_read:
                missing = sum(map(len, buffers))
                raise FormatError(
                    f"{path}: truncated while it was read: expected {missing} more bytes at byte "
                    f"{offset}, found the end of the file"
                )
            offset += num_read
            buffers = _after(buffers, num_read)


_LIVE: "weakref.WeakSet[FileReader]" = weakref.WeakSet()


def merged(
    pieces: Sequence[tuple[int, memoryview]], gap: memoryview
) -> Iterator[tuple[int, list[memoryview]]]:
    """Yields the offset and the buffers of each read for some pieces (offset, target) of a file.

    The pieces are ascending. Pieces with a space of at most `len(gap)` bytes between them are read
    together, and the space goes to `gap`.
    """
    start, end, buffers = 0, 0, list[memoryview]()
    for offset, target in pieces:
        space = offset - end
        if buffers and not 0 <= space <= len(gap):
            yield start, buffers
            buffers = []
        if not buffers:
            start = offset
        elif space:
            buffers.append(gap[:space])
        buffers.append(target)
        end = offset + len(target)
    yield start, buffers


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor (B, ...)."""
    return tensor.view(-1).view(uint8).numpy().data.cast("B")


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Returns what remains of some buffers after their first bytes were filled."""
    while buffers and num_bytes >= len(buffers[0]):
        num_bytes -= len(buffers[0])
        buffers = buffers[1:]
    return [buffers[0][num_bytes:], *buffers[1:]] if buffers else []


def _close(descriptor: int) -> None:
    with suppress(OSError):  # the server may be gone; nothing was written
        os.close(descriptor)


def _close_all(files: list[tuple[int, Path] | None]) -> None:
    for opened in files:
        if opened:
            _close(opened[0])
