"""The order of several weighted sets: each is visited at its own rate, interleaved in proportion.

    order = MixedOrder(parts=((100, 40), (60,)), weights=(1, 0.5), batch_size=16, seed=0)
    order.records(step)              # numbered across the sets

Set k with n records has round(w * n) visits per epoch. They continue through the set's own endless
order (order.py), so each pass over a set visits each of its records once, in whichever epochs it
lies. Visit i of m has a random time in the i-th of m equal parts of the epoch; visits come in the
order of their times. The start of a batch is found by bisection and its visits are enumerated, so
the cost of a step does not depend on the sizes of the sets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.bucket_order import MASK, TICKS, Times
from latent_t2i.shards.order import Epochs, Order, mixed_seed

MAX_VISITS = 2**31
"""Visits of a set per epoch, so that times are exact in 64 bits."""
Words = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedOrder(Epochs):
    """The endless sequence of records of a run on several sets with weights."""

    parts: tuple[NDArray[np.int64], ...]
    """Number of records of each shard, by set; any sequences of integers are accepted."""
    weights: tuple[float, ...]
    """Visits of each record per epoch, on average, by set."""

    def __post_init__(self) -> None:
        parts = tuple(np.asarray(sizes, np.int64) for sizes in self.parts)
        object.__setattr__(self, "parts", parts)
        for number, visits in enumerate(self.counts):
            if not 1 <= visits <= MAX_VISITS:
                raise ValueError(
                    f"data.weights: set {number + 1} of {len(self.parts)}: {self.weights[number]:g}"
                    f" x {self.sizes[number]} records = {visits} visits per epoch, expected "
                    f"1 to {MAX_VISITS}"
                )
        super().__post_init__()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of records of each set."""
        return tuple(int(sizes.sum()) for sizes in self.parts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Visits of each set per epoch."""
        pairs = zip(self.sizes, self.weights, strict=True)
        return tuple(round(weight * size) for size, weight in pairs)

    @property
    def num_records(self) -> int:
        """Number of records in all sets."""
        return sum(self.sizes)

    @cached_property
    def num_visits(self) -> int:
        """Number of visits of an epoch, including those that `drop` skips."""
        return sum(self.counts)

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """The order of each set, independent of the others."""
        return tuple(
            Order(
                sizes=sizes,
                batch_size=self.batch_size,
                seed=mixed_seed(self.seed, "sets", number),
                shuffle=self.shuffle,
                window_shards=self.window_shards,
            )
            for number, sizes in enumerate(self.parts)
        )

    def visits(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the record numbers at positions `start` to `stop` of an epoch."""
        records = np.empty(stop - start, np.int64)
        for number, rows, first in self.split(epoch, start, stop):
            found = self.orders[number].run_visits(first, first + len(rows))
            records[rows] = self._starts[number] + found
        return records

    def split(
        self, epoch: int, start: int, stop: int
    ) -> Iterator[tuple[int, NDArray[np.int64], int]]:
        """Yields each set that positions `start` to `stop` visit, the rows, and its first visit.

        A set's rows hold consecutive visits of its own order.
        """
        key = mixed_seed(self.seed, "sets", epoch, 0)
        sets, indices = interleave_span(self.counts, key, start, stop)
        for number, count in enumerate(self.counts):
            rows = np.flatnonzero(sets == number)
            if len(rows):
                yield number, rows, epoch * count + int(indices[rows[0]])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first record of each set."""
        return np.cumsum([0, *self.sizes])


def interleave_span(
    counts: tuple[int, ...], key: int, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the set (N,) of each position from `start` to `stop`, and the visit's index in it.

    The positions are those of `bucket_order.interleave`, found together.
    """
    times = Times(num_batches=counts, key=key)
    time, earlier = times.find(start)
    first = [index for _, index in times.last_batches(time)]
    # As in `find`, positions are within one per set of their share of the epoch.
    span = stop - start + 2 * len(counts) + 1
    last = [
        min(count, index + ceil(span * count / sum(counts)) + 2)
        for index, count in zip(first, counts, strict=True)
    ]
    ranges = [np.arange(*bounds) for bounds in zip(first, last, strict=True)]
    found = np.concatenate([visit_times(times, *pair) for pair in enumerate(ranges)])
    sets = np.repeat(np.arange(len(counts)), [len(part) for part in ranges])
    indices = np.concatenate(ranges)
    order = np.lexsort((sets, found))
    order = order[found[order] >= time][earlier : earlier + stop - start]
    assert len(order) == stop - start
    return sets[order], indices[order]


def visit_times(times: Times, number: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns `times.of(number, index)` for all indices (N,)."""
    counts = times.num_batches
    whole, rest = divmod(TICKS * sum(counts), counts[number])
    start, stop = (i * whole + i * rest // counts[number] for i in (indices, indices + 1))
    words = indices.astype(np.uint64) * np.uint64(len(counts)) + np.uint64(number)
    mixed = _mix(np.uint64(times.key & MASK) + _mix(words))
    return start + (mixed % (stop - start).astype(np.uint64)).astype(np.int64)


def _mix(words: Words) -> Words:
    """Returns `bucket_order._mix` of all words (N,)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
