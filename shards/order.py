"""The order in which records are visited, and by which rank: a function of the seed and the step.

    order = Order(sizes=(...), batch_size=256, seed=0)
    order.records(step)             # the global batch
    order.cursor(step)              # (epoch, position): the whole state to resume from

Position p of a global batch belongs to rank p // (batch_size / ranks), so 1, 2 or 8 processes see
the same batches, and a run resumes in mid-epoch without repeating or skipping a record. The cost:
the permutation of an epoch is held in memory, 8 bytes and 0.1 us per record.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["full", "blocks", "none"]
LastBatch = Literal["fill", "drop"]
Use = Literal["order", "draws", "dropout", "choice", "buckets", "validation"]
USES = get_args(Use)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A position in a run: the whole state of a loader."""

    epoch: int
    position: int
    """Number of records of this epoch that were visited before."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless sequence of records of a run, in steps of `batch_size`."""

    sizes: tuple[int, ...]
    """Number of records of each shard."""
    batch_size: int
    """Size of the global batch."""
    seed: int
    shuffle: Shuffle = "full"
    window_shards: int = 16
    """Number of shards that `blocks` shuffles together."""
    last_batch: LastBatch = "fill"
    """Whether the last, partial batch of an epoch is filled from the next epoch, or dropped."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.window_shards < 1:
            raise ValueError(
                "batch_size, window_shards: expected 1 or more, found "
                f"{self.batch_size}, {self.window_shards}"
            )
        if self.last_batch == "drop" and self.num_records < self.batch_size:
            raise ValueError(
                f"last_batch: drop leaves no batch of {self.num_records} records at a batch_size "
                f"of {self.batch_size}; use fill, or a batch_size of at most {self.num_records}"
            )

    @cached_property
    def num_records(self) -> int:
        """Number of records in all shards."""
        return sum(self.sizes)

    @property
    def epoch_records(self) -> int:
        """Number of records that an epoch visits."""
        if self.last_batch == "drop":
            return self.num_records // self.batch_size * self.batch_size
        return self.num_records

    def num_steps(self, num_epochs: int) -> int:
        """Returns the number of steps in `num_epochs` epochs, rounded up."""
        return math.ceil(num_epochs * self.epoch_records / self.batch_size)

    def num_epochs(self, step: int) -> float:
        """Returns the number of epochs before a step, fractions included."""
        return step * self.batch_size / self.epoch_records

    def cursor(self, step: int) -> Cursor:
        """Returns the epoch and position where a step begins."""
        epoch, position = self._place(step)
        return Cursor(epoch=epoch, position=position)

    def step(self, cursor: Cursor) -> int:
        """Returns the step that begins at a cursor.

        Raises ValueError if there is none, because batch size or data set are others.
        """
        visited = cursor.epoch * self.epoch_records + cursor.position
        step, rest = divmod(visited, self.batch_size)
        if rest or cursor.position >= self.epoch_records:
            raise ValueError(
                f"{cursor}: no step of {self.batch_size} records begins at this position, in "
                f"epochs of {self.epoch_records} records: the cursor belongs to another batch size "
                "or to other shards"
            )
        return step

    def records(self, step: int) -> NDArray[np.int64]:
        """Returns the record numbers (batch_size,) of a step's global batch."""
        epoch, position = self._place(step)
        parts: list[NDArray[np.int64]] = []
        missing = self.batch_size
        while missing:  # a batch may be larger than an epoch
            parts.append(self.epoch(epoch)[position : position + missing])
            missing -= len(parts[-1])
            epoch, position = epoch + 1, 0
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Returns the record numbers (epoch_records,) of an epoch, in order."""
        if self.shuffle == "none":
            return np.arange(self.epoch_records)
        return self._permutation(epoch)[: self.epoch_records]

    @cached_property
    def _permutation(self) -> Callable[[int], NDArray[np.int64]]:
        """Returns an epoch's permutation; the last two are cached."""
        # A cache per order, because the orders of several buckets are used in turn.
        window = self.window_shards if self.shuffle == "blocks" else len(self.sizes)
        return lru_cache(maxsize=2)(partial(epoch_order, self.sizes, self.seed, window))

    def __getstate__(self) -> dict[str, Any]:
        # Cached permutations are not sent to other processes.
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def _place(self, step: int) -> tuple[int, int]:
        return divmod(step * self.batch_size, self.epoch_records)


def epoch_order(
    sizes: tuple[int, ...], seed: int, window_shards: int, epoch: int
) -> NDArray[np.int64]:
    """Returns an epoch's permutation of all records.

    The shards come in random order, `window_shards` at a time, and the records of a window are
    shuffled together. A small window reads from few files at once; a window of all shards gives a
    full shuffle.
    """
    # PCG64 by name, because default_rng may use another generator in a later NumPy.
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "order", epoch)))
    if window_shards >= len(sizes):
        return generator.permutation(sum(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = generator.permutation(len(sizes))
    windows = [shards[i : i + window_shards] for i in range(0, len(shards), window_shards)]
    mixed = [
        generator.permutation(
            np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window])
        )
        for window in windows
    ]
    return np.concatenate(mixed)


def choices(
    seed: int, step: int, batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns two draws in [0, 1) per record of a global batch (B,), for caption and view."""
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "choice", step)))
    caption_u, view_u = generator.random((2, batch_size))
    return caption_u, view_u


def share(batch_size: int, rank: int, num_processes: int) -> slice:
    """Returns the positions of a global batch that belong to a rank.

    Raises ValueError if the batch cannot be divided evenly.
    """
    size, rest = divmod(batch_size, num_processes)
    if rest:
        raise ValueError(
            f"batch_size: {batch_size} records cannot be divided among {num_processes} processes "
            f"({batch_size / num_processes:g} each); use a multiple of {num_processes}"
        )
    return slice(rank * size, (rank + 1) * size)


def mixed_seed(seed: int, use: Use, *numbers: int) -> int:
    """Returns a 64-bit seed; seeds of different uses and numbers are independent."""
    # The index in USES enters the seed, so new uses belong at the end: old runs must not change.
    sequence = np.random.SeedSequence(seed, spawn_key=(USES.index(use), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])
