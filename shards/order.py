"""In which order records are visited, and by whom: a function of the seed and the place alone.

    order = Order(sizes=(...), batch_size=256, seed=0)
    order.records(step)             # the global batch
    order.cursor(step)              # (epoch, position), all there is to resume from

An epoch is a permutation of all records by (seed, epoch); position p of a global batch belongs to
rank p // (batch_size / ranks). So 1, 2 or 8 processes see the same batches, and going on in the
middle of an epoch reads nothing twice and skips nothing. The price: the permutation is made whole,
8 bytes a record and 0.1 s a million, once per epoch.
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
    """A place in a run: the whole state of a loader."""

    epoch: int
    position: int
    """Records of this epoch that were visited before."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless sequence of records that a run visits, in steps of `batch_size`."""

    sizes: tuple[int, ...]
    """Records of each shard."""
    batch_size: int
    """Of the global batch."""
    seed: int
    shuffle: Shuffle = "full"
    window_shards: int = 16
    """How many shards `blocks` mixes with each other."""
    last_batch: LastBatch = "fill"
    """An epoch's last, partial batch: filled up from the next epoch, or dropped."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.window_shards < 1:
            raise ValueError(
                "batch_size, window_shards: expected 1 or more, found "
                f"{self.batch_size}, {self.window_shards}"
            )
        if self.last_batch == "drop" and self.num_records < self.batch_size:
            raise ValueError(
                f"last_batch: drop leaves nothing of {self.num_records} records in batches of "
                f"{self.batch_size}; expected fill, or a batch_size of at most {self.num_records}"
            )

    @cached_property
    def num_records(self) -> int:
        """Over all shards."""
        return sum(self.sizes)

    @property
    def epoch_records(self) -> int:
        """How many records an epoch visits."""
        if self.last_batch == "drop":
            return self.num_records // self.batch_size * self.batch_size
        return self.num_records

    def num_steps(self, num_epochs: int) -> int:
        """Returns the steps of so many epochs; one that ends within a step is filled up."""
        return math.ceil(num_epochs * self.epoch_records / self.batch_size)

    def num_epochs(self, step: int) -> float:
        """Returns how many epochs the steps before this one are."""
        return step * self.batch_size / self.epoch_records

    def cursor(self, step: int) -> Cursor:
        """Returns where a step begins."""
        return Cursor(**dict(zip(("epoch", "position"), self._place(step), strict=True)))

    def step(self, cursor: Cursor) -> int:
        """Returns the step that begins at a cursor.

        Raises ValueError where none does: the cursor is of another batch size or data set.
        """
        visited = cursor.epoch * self.epoch_records + cursor.position
        step, rest = divmod(visited, self.batch_size)
        if rest or cursor.position >= self.epoch_records:
            raise ValueError(
                f"{cursor}: no step of {self.batch_size} records begins there, in epochs of "
                f"{self.epoch_records}: it was made with another batch size or other shards"
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
        """Returns the records (epoch_records,) that an epoch visits, in order."""
        if self.shuffle == "none":
            return np.arange(self.epoch_records)
        return self._permutation(epoch)[: self.epoch_records]

    @cached_property
    def _permutation(self) -> Callable[[int], NDArray[np.int64]]:
        """Each order remembers two epochs of its own: those of several buckets are used in turn."""
        window = self.window_shards if self.shuffle == "blocks" else len(self.sizes)
        return lru_cache(maxsize=2)(partial(epoch_order, self.sizes, self.seed, window))

    def __getstate__(self) -> dict[str, Any]:
        """What is worth giving to another process: not what is remembered."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def _place(self, step: int) -> tuple[int, int]:
        return divmod(step * self.batch_size, self.epoch_records)


def epoch_order(
    sizes: tuple[int, ...], seed: int, window_shards: int, epoch: int
) -> NDArray[np.int64]:
    """Returns the permutation of all records in which an epoch visits them.

    Shards come in random order, `window_shards` at a time, whose records are mixed: a slow disk
    reads from few files at once, and with a window of all shards the order is any permutation.
    """
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
    """Returns which caption and which view of each record of a global batch, (B,) in [0, 1)."""
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "choice", step)))
    caption_u, view_u = generator.random((2, batch_size))
    return caption_u, view_u


def share(batch_size: int, rank: int, num_processes: int) -> slice:
    """Returns which positions of a global batch belong to a rank.

    Raises ValueError where the batch cannot be divided evenly.
    """
    size, rest = divmod(batch_size, num_processes)
    if rest:
        raise ValueError(
            f"batch_size: {batch_size} records over {num_processes} processes are "
            f"{batch_size / num_processes:g} each; expected a multiple of {num_processes}"
        )
    return slice(rank * size, (rank + 1) * size)


def mixed_seed(seed: int, use: Use, *numbers: int) -> int:
    """Returns a 64-bit seed for one use, mixed so that near seeds and numbers share nothing."""
    sequence = np.random.SeedSequence(seed, spawn_key=(USES.index(use), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])
