"""What map and pread access have in common: a bounded number of slots for files, and gathers.

A set may have more files than a process can map or open, so a file is in a slot only while it is
used, and the least recently used file gives up its slot. A gather that needs more files than there
are slots is done in pieces.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Part(NamedTuple):
    """One field of a gather: an item of each record."""

    offsets: NDArray[np.int64]  # (B,) of the items in their files
    item_bytes: int
    unit: int
    """All offsets in all files are multiples of it."""
    out: Tensor  # (B, ...) contiguous
    rows: NDArray[np.int64] | None = None  # (B,)
    """The rows of `out` to copy to, which then may have more; None: all."""

    def piece(self, rows: slice) -> "Part":
        """Returns the part for some of its records."""
        if rows == slice(0, len(self.offsets)):
            return self
        if self.rows is not None:
            return self._replace(offsets=self.offsets[rows], rows=self.rows[rows])
        return self._replace(offsets=self.offsets[rows], out=self.out[rows])


class Slots:
    """Which files are in which slots. The caller serialises the calls."""

    def __init__(self, num_files: int, num_slots: int) -> None:
        self.num = min(num_files, num_slots)
        self.of: NDArray[np.int64] = np.full(num_files, -1)  # slot of each file; -1: in none
        self._file_in: NDArray[np.int64] = np.full(self.num, -1)
        self._used_at = np.zeros(self.num, np.int64)  # 0: free
        self._clock = 1

    def touch(self, files: NDArray[np.int64]) -> NDArray[np.int64]:
        """Marks files (B,) as used now, so that none of them replaces another; returns their slots.

        The slot of a file that is in none is -1.
        """
        slots = self.of[files]
        if self.num < len(self.of):  # otherwise no file is ever replaced
            self._clock += 1
            self._used_at[slots[slots >= 0]] = self._clock
        return slots

    def take(self, file: int, *, replace: bool) -> int | None:
        """Gives a file a free slot, or with `replace` the slot of the least recently used file.

        Returns None if it gets none, or has one already.
        """
        slot = int(self._used_at.argmin())
        if self.of[file] >= 0 or (self._used_at[slot] and not replace):
            return None
        self.release(slot)
        self._used_at[slot] = self._clock
        self._file_in[slot] = file
        self.of[file] = slot
        return slot

    def release(self, slot: int) -> None:
        """Frees a slot."""
        if self._file_in[slot] >= 0:
            self.of[self._file_in[slot]] = -1
        self._file_in[slot] = -1
        self._used_at[slot] = 0

    def pieces(self, files: NDArray[np.int64]) -> Iterator[slice]:
        """Splits a gather from files (B,) into runs that need no more files than there are slots.

        All pieces together are the whole, in order; with enough slots there is one.
        """
        start = 0
        while start < len(files):
            stop = len(files)
            if self.num < min(stop - start, len(self.of)):
                _, first = np.unique(files[start:], return_index=True)
                if len(first) > self.num:  # up to the first record of one file too many
                    stop = start + int(np.sort(first)[self.num])
            yield slice(start, stop)
            start = stop


class Source(Protocol):
    """Reads from files by number; those that are read must be in slots."""

    slots: Slots

    def open(self, file: int, path: Path, *, replace: bool = True) -> None:
        """Puts a file into a slot; without `replace`, only if one is free.

        Raises OSError if the system refuses.
        """

    def close(self, file: int) -> None:
        """Takes a file from its slot, if it is in one."""

    def for_each(self, function: Callable[[int], None], files: Sequence[int]) -> None:
        """Calls a function that opens a file for several files, at once where that is faster."""

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Returns some bytes of a file."""

    def gather(self, files: NDArray[np.int64], parts: Sequence[Part]) -> None:
        """Copies an item per part from each of some files (B,), B > 0, to the parts' tensors."""
