"""Measures how long opening a set and its first batch take, and how many bytes they read.

    python -m bench.loaders.opening FOLDER

The shards are first evicted from the page cache. The pages in the cache afterwards are those that
were read from the disk. A file system without a disk (tmpfs) cannot evict; then `evicted` is false.
"""

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.loaders.contents import BATCH_SIZE
from latent_t2i.shards.loader import MapLoader, batches
from latent_t2i.shards.reader import open_shards


def main(folder: Path) -> dict[str, Any]:
    """Returns the figures of a set with a cold and then a warm page cache."""
    torch.set_num_threads(1)
    torch.empty(1).clone()
    paths = sorted(folder.glob("*.tar"))
    measure(folder)  # imports, and what torch sets up on first use
    for path in paths:
        evict(path)
    left = resident_bytes(paths)
    cold = measure(folder, paths)
    for path in paths:
        path.read_bytes()
    warm = measure(folder)
    return {
        "shards": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "evicted": left == 0,
        "cold": cold,
        "warm": warm,
    }


def measure(folder: Path, paths: list[Path] | None = None) -> dict[str, float]:
    """Opens a set and reads one batch; with `paths`, counts the bytes read from them."""
    began = time.perf_counter()
    shards = open_shards(folder, verify="none")
    opened = time.perf_counter()
    read = {"opening_bytes": resident_bytes(paths)} if paths else {}
    counted = time.perf_counter()
    loader = MapLoader(shards=shards, order=shards.order(batch_size=BATCH_SIZE, seed=0))
    next(batches(loader, start=0, stop=1))
    done = time.perf_counter()
    read |= {"first_batch_bytes": resident_bytes(paths)} if paths else {}
    return {"opening_s": opened - began, "first_batch_s": done - counted + opened - began, **read}


def evict(path: Path) -> None:
    """Evicts a file from the page cache, if the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident_bytes(paths: list[Path]) -> int:
    """Returns how many bytes of the files are in the page cache."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            address = np.frombuffer(mapped, np.uint8)
            if mincore(address.ctypes.data, len(mapped), flags.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            del address  # a mapping with a view cannot be closed
            pages += int((flags & 1).sum())
    return pages * mmap.PAGESIZE


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
