"""Maps many files side by side into one range of addresses, so that one gather reaches them all.

    region = Region([size of each file])
    region.map(3, path)
    region.bytes[region.starts[3] : region.starts[3] + size]

A batch from a thousand shards is then one indexed copy instead of a thousand. The cost: an mmap at
a fixed address, which Python's `mmap` lacks; it is called through ctypes on Linux and macOS.

A file that is truncated while it is mapped ends the process with SIGBUS, as with any mapping.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAP_FIXED = 0x10  # on Linux, macOS and the BSDs; not in Python's mmap module
PROT_NONE = 0


class Region:
    """Address ranges for files of given sizes; reading an unmapped one ends the process."""

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64]) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        pages = -(-self.sizes // mmap.PAGESIZE)
        ends = np.cumsum(pages) * mmap.PAGESIZE
        self.starts: NDArray[np.int64] = ends - pages * mmap.PAGESIZE
        self.is_mapped = np.zeros(len(self.sizes), np.bool_)
        # Reserving addresses takes no memory and reads nothing.
        self._reserved = mmap.mmap(
            -1, int(ends[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=PROT_NONE
        )
        self._base = np.frombuffer(self._reserved, np.uint8).ctypes.data
        whole = (ctypes.c_uint8 * int(ends[-1])).from_address(self._base)
        whole._reserved = self._reserved  # type: ignore[attr-defined]  # keeps it alive
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(whole)

    def map(self, index: int, path: Path) -> None:
        """Maps a file read-only. Raises OSError if the system refuses."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self._place(index, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, path)
        finally:
            os.close(descriptor)  # a set may have more shards than a process may have open files
        self.is_mapped[index] = True

    def unmap(self, index: int) -> None:
        """Unmaps a file; its addresses stay reserved."""
        self.is_mapped[index] = False
        # Not munmap: another mapping of the process could then be placed in the gap.
        self._place(index, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, None)

    def _place(
        self, index: int, protection: int, flags: int, descriptor: int, path: Path | None
    ) -> None:
        start, size = self._base + int(self.starts[index]), int(self.sizes[index])
        found = _libc_mmap(start, size, protection, flags | MAP_FIXED, descriptor, 0)
        if found != start:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


def _load_mmap() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return function


_libc_mmap = _load_mmap()
