"""The order in which records are visited, and by which rank: a function of the seed and the step.

    order = Order(sizes=(...), batch_size=256, seed=0)
    order.records(step)             # the global batch
    order.cursor(step)              # (epoch, position): the whole state to resume from

Position p of a global batch belongs to rank p // (batch_size / ranks), so 1, 2 or 8 processes see
the same batches, and a run resumes in mid-epoch without repeating or skipping a record. The
permutation of an epoch is evaluated for the records of a batch only (permutation.py), so the cost
of a step does not depend on the size of the set.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.permutation import Permutation

Shuffle = Literal["full", "blocks", "none"]
LastBatch = Literal["fill", "drop"]
Use = Literal["order", "draws", "dropout", "choice", "buckets", "validation", "sets"]
USES = get_args(Use)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A position in a run: the whole state of a loader."""

    epoch: int
    position: int
    """Number of records of this epoch that were visited before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Epochs(ABC):
    """An endless sequence of epochs of records, visited in steps of `batch_size`."""

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
        if self.last_batch == "drop" and self.num_visits < self.batch_size:
            raise ValueError(
                f"last_batch: drop leaves no batch of {self.num_visits} records at a batch_size "
                f"of {self.batch_size}; use fill, or a batch_size of at most {self.num_visits}"
            )

    @property
    @abstractmethod
    def num_visits(self) -> int:
        """Number of visits of an epoch, including those that `drop` skips."""

    @abstractmethod
    def visits(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the record numbers at positions `start` to `stop` of an epoch."""

    @property
    def epoch_records(self) -> int:
        """Number of records that an epoch visits."""
        if self.last_batch == "drop":
            return self.num_visits // self.batch_size * self.batch_size
        return self.num_visits

    def num_steps(self, num_epochs: int) -> int:
        """Returns the number of steps in `num_epochs` epochs, rounded up."""
        return math.ceil(num_epochs * self.epoch_records / self.batch_size)

    def num_epochs(self, step: int) -> float:
        """Returns the number of epochs before a step, fractions included."""
        return step * self.batch_size / self.epoch_records

    def cursor(self, step: int) -> Cursor:
        """Returns the epoch and position where a step begins."""
        epoch, position = divmod(step * self.batch_size, self.epoch_records)
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
        start = step * self.batch_size
        return self.run_visits(start, start + self.batch_size)

    def run_visits(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the record numbers of visits `start` to `stop` of the run, over all epochs."""
        return np.concatenate([self.visits(*part) for part in self.by_epoch(start, stop)])

    def by_epoch(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Splits visits `start` to `stop` of the run; yields epoch, first position and last + 1."""
        while start < stop:  # a batch may be larger than an epoch
            epoch, position = divmod(start, self.epoch_records)
            end = min(position + stop - start, self.epoch_records)
            yield epoch, position, end
            start += end - position

    def __getstate__(self) -> dict[str, Any]:
        # Only the fields are sent to other processes.
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Order(Epochs):
    """The endless sequence of records of a run: each record once per epoch."""

    sizes: NDArray[np.int64]  # (num_shards,)
    """Number of records of each shard; any sequence of integers is accepted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.asarray(self.sizes, np.int64))
        super().__post_init__()

    @cached_property
    def num_records(self) -> int:
        """Number of records in all shards."""
        return int(self.sizes.sum())

    @property
    def num_visits(self) -> int:
        """Number of visits of an epoch: one per record."""
        return self.num_records

    def visits(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the record numbers at positions `start` to `stop` of an epoch."""
        if self.shuffle == "none":
            return np.arange(start, stop)
        if self.shuffle == "full":
            return self._permutation(self.num_records, epoch)(np.arange(start, stop))
        parts = []
        while start < stop:
            window = self.window(epoch, start)
            end = min(stop, window.stop)
            parts.append(self._visits_in(epoch, window, np.arange(start, end) - window.start))
            start = end
        return np.concatenate(parts)

    def _visits_in(
        self, epoch: int, window: "Window", places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Returns the records at places within a window of `blocks`."""
        chosen = self._permutation(window.stop - window.start, epoch, window.number)(places)
        shards = self._windows(epoch).shards(window.number)
        ends = np.cumsum(self.sizes[shards])
        which = np.searchsorted(ends, chosen, side="right")
        # A record's number within its shard, counted from the shard's first record.
        within = chosen - (ends - self.sizes[shards])[which]
        return self._starts[shards[which]] + within

    def window(self, epoch: int, position: int) -> "Window":
        """Returns the part of an epoch, around a position, that shares no shard with the others.

        With `none` it is a shard, with `full` the epoch. `last_batch` may end the epoch within it.
        """
        if self.shuffle == "full":
            return Window(number=0, start=0, stop=self.num_records)
        windows = self._windows(epoch)
        number = windows.find(position)
        start, stop = windows.start(number), windows.start(number + 1)
        return Window(number=number, start=start, stop=stop)

    def window_spans(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns where each shard's window starts and stops (num_shards,) in an epoch."""
        if self.shuffle == "full":
            zeros = np.zeros(len(self.sizes), np.int64)
            return zeros, zeros + self.num_records
        windows = self._windows(epoch)
        numbers, where = np.unique(windows.numbers(), return_inverse=True)
        bounds = np.array([windows.start(number) for number in (*numbers.tolist(), len(numbers))])
        return bounds[:-1][where], bounds[1:][where]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first record of each shard."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def _irregular(self) -> tuple[int, NDArray[np.int64]]:
        """The most common number of records of a shard, and the shards that have another."""
        counts, frequencies = np.unique(self.sizes, return_counts=True)
        regular = int(counts[frequencies.argmax()])
        return regular, np.flatnonzero(self.sizes != regular)

    @cached_property
    def _windows(self) -> Callable[[int], "_Windows"]:
        """Returns an epoch's windows; the last two epochs are cached."""
        return lru_cache(maxsize=2)(self._make_windows)

    def _make_windows(self, epoch: int) -> "_Windows":
        regular, irregular = self._irregular
        # Without a shuffle, the shards are in their own order: a window of one shard each.
        is_shuffled = self.shuffle == "blocks"
        order = self._permutation(len(self.sizes), epoch, -1) if is_shuffled else None
        slots = irregular if order is None else order.inverse(irregular)
        sorting = np.argsort(slots)
        return _Windows(
            order=order,
            num_slots=len(self.sizes),
            per_window=self.window_shards if is_shuffled else 1,
            regular=regular,
            slots=slots[sorting],
            excess=np.cumsum((self.sizes - regular)[irregular][sorting]),
        )

    def _permutation(self, size: int, *numbers: int) -> Permutation:
        return Permutation(size, mixed_seed(self.seed, "order", *(n + 1 for n in numbers)))


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of an epoch that reads from some shards, which no other part of the epoch reads."""

    number: int
    start: int
    """Position of its first record in the epoch."""
    stop: int


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """The windows of an epoch: `per_window` slots each, with one shard in every slot.

    Nearly all shards have the same number of records. The place of a slot follows from its number,
    corrected by the few other shards before it, so the epoch is never laid out as a whole.
    """

    order: Permutation | None
    """Sends slots to shards; None: slot n holds shard n."""
    num_slots: int
    per_window: int
    regular: int
    slots: NDArray[np.int64]
    """Slots of the shards of another size, ascending."""
    excess: NDArray[np.int64]
    """By how much these shards, up to and including each, exceed the regular size."""

    def start(self, number: int) -> int:
        """Returns the position of a window's first record; one past the last: the epoch's end."""
        slot = min(number * self.per_window, self.num_slots)
        before = int(np.searchsorted(self.slots, slot))
        return slot * self.regular + (int(self.excess[before - 1]) if before else 0)

    def find(self, position: int) -> int:
        """Returns the window that a position is in."""
        num_windows = -(-self.num_slots // self.per_window)
        return bisect_right(range(num_windows), position, key=self.start) - 1

    def shards(self, number: int) -> NDArray[np.int64]:
        """Returns the shards of a window."""
        first = number * self.per_window
        slots = np.arange(first, min(first + self.per_window, self.num_slots))
        return slots if self.order is None else self.order(slots)

    def numbers(self) -> NDArray[np.int64]:
        """Returns the window of each shard (num_shards,)."""
        shards = np.arange(self.num_slots)
        slots = shards if self.order is None else self.order.inverse(shards)
        return slots // self.per_window


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
