"""A training step's data: records gathered from the shards, by a thread.

A batch holds nothing random but the choice of captions and views. The other random numbers are
drawn on the device (draws.py), so they take neither time of the thread nor of the copy to a GPU.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_t2i.shards.loader import Loader, num_buffers, prefetch
from latent_t2i.shards.order import share
from latent_t2i.shards.reader import RawBatch


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(RawBatch):
    """One process's share of a step: the gathered records, and what their random numbers need."""

    positions: Tensor  # (B, 2) int64: the step, and the position in the global batch


def make_positions(step: int, positions: slice | range) -> Tensor:
    """Returns the positions (B, 2) of a batch."""
    numbers = torch.arange(positions.start, positions.stop)
    return torch.stack([torch.full_like(numbers, step), numbers], dim=1)


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Makes one process's batches from its loader."""

    loader: Loader
    batch_size: int  # global
    rank: int
    num_processes: int
    pin_memory: bool

    def buffer(self) -> Batch:
        """Returns an uninitialised batch of the largest shape in the set."""
        raw = self.loader.buffer(pin_memory=self.pin_memory)
        positions = torch.empty((len(raw), 2), dtype=torch.int64, pin_memory=self.pin_memory)
        return Batch(**vars(raw), positions=positions)

    def fill(self, step: int, out: Batch) -> Batch:
        """Writes this process's share of a step into `out`.

        Returns `out`, or views of its memory if the step's bucket has a smaller shape.
        """
        mine = share(self.batch_size, self.rank, self.num_processes)
        out.positions.copy_(make_positions(step, mine))
        return self.loader.fill(step, out)

    def batch(self, step: int) -> Batch:
        """Returns this process's share of a step, in newly allocated memory."""
        return self.fill(step, self.buffer())

    def batches(
        self, start: int, stop: int, *, stream: torch.cuda.Stream | None = None
    ) -> Generator[Batch]:
        """Yields the batches of steps `start` to `stop`, each valid until the next is requested.

        `stream` is the CUDA stream that copies the batches to the device, if one does.
        """
        buffers = [self.buffer() for _ in range(num_buffers(self.pin_memory))]
        # On a CPU the steps use all cores. A second team of OpenMP threads would slow them down.
        one_core = not self.pin_memory
        return prefetch(
            self.fill, buffers, start=start, stop=stop, stream=stream, one_core=one_core
        )
