"""What each step sees: order, draws and batches, all functions of (seed, step).

The order of an epoch is a permutation by (seed, epoch); epochs follow each other without a gap, so
position p of step s is number s * batch_size + p of one endless sequence. Every random number of a
step is drawn for the global batch from one CPU generator seeded by (seed, step), and a process
takes its own contiguous slice. Hence any number of processes sees the same batches and the same
noise, and resuming needs no state but the step. The draws cost 0.3 ms for 64 latents of 8 x 8 x 8,
in a background thread.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import itemgetter
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion import ObjectiveConfig, sample_timesteps
from shards.reader import ShardSet

NUM_AHEAD = 2
Use = Literal["order", "draws", "dropout"]
USES = get_args(Use)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless sequence of records that a run visits."""

    num_records: int
    batch_size: int
    seed: int
    shuffle: bool

    def records(self, step: int) -> NDArray[np.int64]:
        """Returns the record numbers (batch_size,) of a step's global batch."""
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if not self.shuffle:
            return index % self.num_records
        epochs, positions = np.divmod(index, self.num_records)
        records = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            records[here] = epoch_order(self.num_records, self.seed, int(epoch))[positions[here]]
        return records


@lru_cache(maxsize=2)
def epoch_order(num_records: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the permutation (num_records,) in which an epoch visits the records."""
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "order", epoch)))
    return generator.permutation(num_records)


def mixed_seed(seed: int, use: Use, *numbers: int) -> int:
    """Returns a 64-bit seed for one use, mixed so that near seeds and numbers share nothing."""
    sequence = np.random.SeedSequence(seed, spawn_key=(USES.index(use), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


@dataclass(frozen=True, kw_only=True)
class Draws:
    """All random numbers of a step, along the first axis by position in the batch."""

    caption_u: Tensor  # (B,) float64 in [0, 1): which caption
    view_u: Tensor  # (B,) float64 in [0, 1): which view
    drop: Tensor  # (B,) bool: train on the empty prompt
    timesteps: Tensor  # (B,) int64
    posterior_noise: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32


def draw(
    seed: int,
    step: int,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    objective: ObjectiveConfig,
) -> Draws:
    """Draws the random numbers of a step's global batch."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, "draws", step))
    shape = (batch_size, *latent_shape)
    u = torch.rand(4, batch_size, dtype=torch.float64, generator=generator)
    return Draws(
        caption_u=u[0],
        view_u=u[1],
        drop=u[2] < objective.caption_dropout,
        timesteps=sample_timesteps(u[3], objective),
        posterior_noise=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's share of a step: moments or latents, text, and the draws to train them with."""

    latent: Tensor  # (b, 2C or C, h, w) float16
    text: Tensor  # (b, T, D) float16
    drop: Tensor  # (b,) bool
    timesteps: Tensor  # (b,) int64
    posterior_noise: Tensor  # (b, C, h, w) float32
    noise: Tensor  # (b, C, h, w) float32

    def __len__(self) -> int:
        return len(self.latent)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Returns the batch with `change` applied to each tensor."""
        return Batch(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device; copies from pinned memory do not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> "list[Batch]":
        """Returns the batch in pieces of `size` examples."""
        return [self.map(itemgetter(slice(i, i + size))) for i in range(0, len(self), size)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Makes one process's batches from the shards."""

    shards: ShardSet
    order: Order
    latent_shape: tuple[int, int, int]
    objective: ObjectiveConfig
    rank: int
    num_processes: int
    pin_memory: bool

    def batch(self, step: int) -> Batch:
        """Returns this process's share of a step."""
        draws = draw(
            self.order.seed,
            step,
            self.order.batch_size,
            self.latent_shape,
            self.objective,
        )
        size = self.order.batch_size // self.num_processes
        mine = slice(self.rank * size, (self.rank + 1) * size)
        gathered = self.shards.gather(
            self.order.records(step)[mine],
            draws.caption_u[mine].numpy(),
            draws.view_u[mine].numpy(),
        )
        batch = Batch(
            latent=gathered.latent,
            text=gathered.text,
            drop=draws.drop[mine],
            timesteps=draws.timesteps[mine],
            posterior_noise=draws.posterior_noise[mine],
            noise=draws.noise[mine],
        )
        return batch.map(Tensor.pin_memory) if self.pin_memory else batch

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Yields the batches of steps `start` to `stop`, made ahead in a background thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = min(start + NUM_AHEAD, stop)
            pending = deque(pool.submit(self.batch, step) for step in range(start, ahead))
            for step in range(start, stop):
                batch = pending.popleft().result()
                if step + NUM_AHEAD < stop:
                    pending.append(pool.submit(self.batch, step + NUM_AHEAD))
                yield batch

    def suspects(self, step: int) -> list[str]:
        """Returns the keys of a step's global batch with non-finite latents or text.

        All its keys where every input is finite: then the numbers overflowed on the way.
        """
        whole = replace(self, rank=0, num_processes=1, pin_memory=False)
        batch, records = whole.batch(step), whole.order.records(step)
        finite = [t.flatten(1).isfinite().all(dim=1).numpy() for t in (batch.latent, batch.text)]
        bad = ~(finite[0] & finite[1])
        return self.shards.keys(records[bad] if bad.any() else records)
