"""The bound of a loader: one copy of a batch's bytes from a random offset of 1 GiB of memory.

A loader that returns its own memory cannot be faster. One that gathers records from all over a file
has more to do.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.loaders.contents import BATCH_SIZE, Batch, Content

SOURCE_BYTES = 1 << 30
ALIGNMENT = 64


class Copy:
    """Copies memory instead of loading records."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes nothing: the source is in memory."""

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields the same buffer forever, refilled each time."""
        size = BATCH_SIZE * content.delivered_bytes
        source = torch.ones(SOURCE_BYTES, dtype=torch.uint8)
        buffer = torch.empty(size, dtype=torch.uint8)
        while True:
            start = random.randrange((SOURCE_BYTES - size) // ALIGNMENT) * ALIGNMENT
            buffer.copy_(source[start : start + size])
            yield Batch(buffer, buffer, buffer)
