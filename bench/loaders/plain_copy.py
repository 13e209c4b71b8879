"""The bound: what a batch delivers, copied in one piece from a random place of a large array.

One `copy_` of 256 records' delivered bytes from 1 GiB of ordinary memory, touched before, into the
same buffer every time. No loader that hands over its own memory can be faster, and one that gathers
records from all over a file has more to do.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.loaders.contents import BATCH_SIZE, Batch, Content

SOURCE_BYTES = 1 << 30
ALIGNMENT = 64


class Copy:
    """No loader."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes nothing: what is copied is in memory."""

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields the same batch without end, filled anew."""
        size = BATCH_SIZE * content.delivered_bytes
        source = torch.ones(SOURCE_BYTES, dtype=torch.uint8)
        buffer = torch.empty(size, dtype=torch.uint8)
        while True:
            start = random.randrange((SOURCE_BYTES - size) // ALIGNMENT) * ALIGNMENT
            buffer.copy_(source[start : start + size])
            yield Batch(buffer, buffer, buffer)
