"""Maps many files side by side into one range of addresses, so that one gather reaches them all.

    region = Region(num_files=3, file_bytes=largest)
    region.open(2, path)
    region.gather(np.array([2, 2]), parts)

A batch from a thousand shards is then one indexed copy per field instead of a thousand. The range
consists of slots of equal size, one per mapped file. Their number is bounded, because the system
bounds the mappings of a process, and because page tables take 0.2 % of what is mapped.

The cost: an mmap at a fixed address, which Python's `mmap` lacks; it is called through ctypes on
Linux and macOS. A file that is truncated while it is mapped ends the process with SIGBUS.
"""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.source import Part, Slots

MAP_FIXED = 0x10  # on Linux, macOS and the BSDs; not in Python's mmap module
PROT_NONE = 0
MAX_SLOTS = 16_384
MAX_MAPPED_BYTES = 2**40
"""Bound for all slots of a process, so that its page tables stay below two GiB."""
MAP_COUNT = Path("/proc/sys/vm/max_map_count")
CARRIERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""Bytes are copied as the widest integers that divide them, because torch copies those fastest."""


def default_slots(file_bytes: int) -> int:
    """Returns how many files of a size a new region may map at a time, at least 1.

    It is half of what the regions in use leave: a process may open several sets.
    """
    used_bytes = sum(len(region.bytes) for region in _LIVE)
    bounds = [MAX_SLOTS, (MAX_MAPPED_BYTES - used_bytes) // 2 // file_bytes]
    if MAP_COUNT.exists():
        limit = int(MAP_COUNT.read_text()) * 3 // 4  # the rest is for libraries and allocators
        bounds.append((limit - sum(region.slots.num for region in _LIVE)) // 2)
    return max(1, min(bounds))


class Region:
    """A range of addresses with a slot per mapped file; reading an empty slot ends the process."""

    def __init__(self, num_files: int, file_bytes: int, num_slots: int | None = None) -> None:
        """Reserves slots for files of up to `file_bytes`; `num_slots` is at most `num_files`."""
        self._slot_bytes = -(-file_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.slots = Slots(num_files, num_slots or default_slots(self._slot_bytes))
        self._lock = threading.Lock()
        self._matrices: dict[tuple[int, int], Tensor] = {}
        # Reserving addresses takes no memory and reads nothing.
        size = self.slots.num * self._slot_bytes
        self._reserved = mmap.mmap(
            -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=PROT_NONE
        )
        self._base = np.frombuffer(self._reserved, np.uint8).ctypes.data
        whole = (ctypes.c_uint8 * size).from_address(self._base)
        whole._reserved = self._reserved  # type: ignore[attr-defined]  # keeps it alive
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(whole)
        _LIVE.add(self)

    def open(self, file: int, path: Path, *, replace: bool = True) -> None:
        """Maps a file read-only, in the place of another one if there is no room.

        Without `replace`, nothing happens if there is no room. Raises OSError if the system
        refuses.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with self._lock:
                slot = self.slots.take(file, replace=replace)
                if slot is None:
                    return
                try:
                    self._place(slot, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, path)
                except OSError:
                    self.slots.release(slot)
                    raise
        finally:
            os.close(descriptor)  # more files may be mapped than a process may have open

    def close(self, file: int) -> None:
        """Unmaps a file, if it is mapped; the addresses of its slot stay reserved."""
        with self._lock:
            slot = int(self.slots.of[file])
            if slot >= 0:
                self.slots.release(slot)
                # Not munmap: another mapping of the process could then be placed in the gap.
                self._place(slot, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, None)

    def for_each(self, function: Callable[[int], None], files: Sequence[int]) -> None:
        """Calls a function that opens a file for several files, one after the other."""
        for file in files:
            function(file)

    def start(self, file: int) -> int:
        """Returns where a mapped file starts in `bytes`."""
        return int(self.slots.of[file]) * self._slot_bytes

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Returns some bytes of a mapped file."""
        return self.bytes[self.start(file) + offset :][:size].tobytes()

    def gather(self, files: NDArray[np.int64], parts: Sequence[Part]) -> None:
        """Copies an item per part from each of some mapped files (B,) to the parts' tensors."""
        starts = self.slots.of[files] * self._slot_bytes
        for part in parts:
            if part.rows is not None:
                self._copy_rows(starts + part.offsets, part)
                continue
            matrix = self._matrix(part.item_bytes, part.unit)
            target = part.out.view(len(part.out), -1).view(matrix.dtype)
            rows = torch.from_numpy((starts + part.offsets) // part.unit)
            torch.index_select(matrix, 0, rows, out=target)

    def _copy_rows(self, places: NDArray[np.int64], part: Part) -> None:
        """Copies the items at some places (B,) to the part's rows, one by one."""
        # torch's indexed copy writes to consecutive rows only, so it would need a second copy.
        assert part.rows is not None
        target = part.out.view(len(part.out), -1).view(torch.uint8).numpy()
        for row, place in zip(part.rows.tolist(), places.tolist(), strict=True):
            target[row] = self.bytes[place : place + part.item_bytes]

    def _matrix(self, item_bytes: int, unit: int) -> Tensor:
        """Returns the region as a matrix with an item of `item_bytes` in each row.

        A row starts at each multiple of `unit`, so rows overlap.
        """
        if (item_bytes, unit) not in self._matrices:
            width = next(width for width in CARRIERS if unit % width == item_bytes % width == 0)
            shape = ((len(self.bytes) - item_bytes) // unit + 1, item_bytes // width)
            carrier = torch.from_numpy(self.bytes).view(CARRIERS[width])
            self._matrices[item_bytes, unit] = carrier.as_strided(shape, (unit // width, 1))
        return self._matrices[item_bytes, unit]

    def _place(
        self, slot: int, protection: int, flags: int, descriptor: int, path: Path | None
    ) -> None:
        """Maps a whole slot; beyond the end of a file its addresses cannot be read."""
        start = self._base + slot * self._slot_bytes
        found = _libc_mmap(start, self._slot_bytes, protection, flags | MAP_FIXED, descriptor, 0)
        if found != start:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


_LIVE: "weakref.WeakSet[Region]" = weakref.WeakSet()


def _load_mmap() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return function


_libc_mmap = _load_mmap()
