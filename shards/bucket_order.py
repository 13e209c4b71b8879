"""The order in which a bucketed set is visited: each batch comes from one bucket.

    order = BucketOrder(sizes=((100, 40), (60,)), batch_size=16, seed=0)
    order.locate(step)               # (bucket, step of that bucket's own order)

Each bucket has its own order (order.py). An epoch takes the batches of all buckets in a random
sequence by (seed, epoch), which is evaluated for one step at a time: the cost of a step does not
depend on the size of the set.

With `fill`, every record was visited n times by the end of epoch n. The last batch of each bucket
is filled from the bucket's next epoch, so a bucket smaller than a batch contributes several epochs
at once and is skipped in the epochs that these cover. `drop` skips the last, partial batch of each
bucket, and buckets smaller than a batch altogether.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.order import Cursor, LastBatch, Order, Shuffle, mixed_seed

MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class BucketOrder:
    """The endless sequence of batches of a run, each from one bucket."""

    sizes: tuple[NDArray[np.int64], ...]
    """Number of records of each shard, by bucket; any sequences of integers are accepted."""
    batch_size: int
    """Size of the global batch."""
    seed: int
    shuffle: Shuffle = "full"
    """With `none`, the buckets come one after the other too."""
    window_shards: int = 16
    """Number of shards of a bucket that `blocks` shuffles together."""
    last_batch: LastBatch = "fill"
    """Whether the last, partial batch of a bucket is filled from its next epoch, or dropped."""

    def __post_init__(self) -> None:
        sizes = tuple(np.asarray(part, np.int64) for part in self.sizes)
        object.__setattr__(self, "sizes", sizes)
        if not any(order.last_batch == self.last_batch for order in self.orders):
            largest = int(self.counts.max())
            raise ValueError(
                f"last_batch: drop leaves no batch: the largest bucket has {largest} records and "
                f"batch_size is {self.batch_size}; use fill, or a batch_size of at most {largest}"
            )

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of records of each bucket (num_buckets,)."""
        return np.array([sizes.sum() for sizes in self.sizes], np.int64)

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """The order within each bucket; unused for buckets that `drop` skips altogether."""
        return tuple(
            Order(
                sizes=sizes,
                batch_size=self.batch_size,
                seed=mixed_seed(self.seed, "buckets", bucket),
                shuffle=self.shuffle,
                window_shards=self.window_shards,
                last_batch=self.last_batch if sizes.sum() >= self.batch_size else "fill",
            )
            for bucket, sizes in enumerate(self.sizes)
        )

    @property
    def num_records(self) -> int:
        """Number of records in all buckets."""
        return int(self.counts.sum())

    @property
    def epoch_records(self) -> int:
        """Number of records that an epoch visits; with `fill`, on average."""
        if self.last_batch == "drop":
            return int(self.batches_before(1).sum()) * self.batch_size
        return self.num_records

    def batches_before(self, epoch: int) -> NDArray[np.int64]:
        """Returns the number of batches of each bucket (num_buckets,) before an epoch."""
        if self.last_batch == "drop":
            return epoch * (self.counts // self.batch_size)
        return -(-epoch * self.counts // self.batch_size)

    def num_steps(self, num_epochs: int) -> int:
        """Returns the number of steps in `num_epochs` epochs."""
        return int(self.batches_before(num_epochs).sum())

    def num_epochs(self, step: int) -> float:
        """Returns the number of epochs before a step, fractions included."""
        epoch, position = self._epoch_and_index(step)
        return epoch + position / (self.num_steps(epoch + 1) - self.num_steps(epoch))

    def locate(self, step: int) -> tuple[int, int]:
        """Returns a step's bucket and its step within that bucket's own order."""
        epoch, position = self._epoch_and_index(step)
        before = self.batches_before(epoch)
        num_batches = tuple((self.batches_before(epoch + 1) - before).tolist())
        if self.shuffle == "none":
            ends = np.cumsum(num_batches)
            bucket = int(np.searchsorted(ends, position, side="right"))
            index = position - int(ends[bucket]) + num_batches[bucket]
        else:
            key = mixed_seed(self.seed, "buckets", epoch, 0)
            bucket, index = interleave(num_batches, key, position)
        return bucket, int(before[bucket]) + index

    def records(self, step: int) -> NDArray[np.int64]:
        """Returns the record numbers (batch_size,) of a step, numbered across buckets."""
        bucket, local_step = self.locate(step)
        first = int(self.counts[:bucket].sum())
        return first + self.orders[bucket].records(local_step)

    def cursor(self, step: int) -> Cursor:
        """Returns the epoch and position where a step begins."""
        epoch, position = self._epoch_and_index(step)
        return Cursor(epoch=epoch, position=position * self.batch_size)

    def step(self, cursor: Cursor) -> int:
        """Returns the step that begins at a cursor.

        Raises ValueError if there is none, because batch size or data set are others.
        """
        position, rest = divmod(cursor.position, self.batch_size)
        step = self.num_steps(cursor.epoch) + position
        if rest or step >= self.num_steps(cursor.epoch + 1):
            raise ValueError(
                f"{cursor}: no step of {self.batch_size} records begins at this position: the "
                "cursor belongs to another batch size or to other shards"
            )
        return step

    def _epoch_and_index(self, step: int) -> tuple[int, int]:
        """Returns a step's epoch and its index within the epoch."""
        # With `drop`, an epoch may be shorter than its share of steps, but it has at least one.
        latest = step * self.batch_size // self.num_records if self.last_batch == "fill" else step
        epoch = bisect_right(range(latest + 2), step, key=self.num_steps) - 1
        return epoch, step - self.num_steps(epoch)


@lru_cache(maxsize=8)  # the loaders of a run ask for a step several times
def interleave(num_batches: tuple[int, ...], key: int, position: int) -> tuple[int, int]:
    """Returns the bucket of the batch at a position of an epoch, and its index in that bucket.

    Batch i of a bucket with n batches has a random time in the i-th of n equal parts of the epoch,
    and the batches of all buckets come in the order of their times. So all parts of an epoch have
    the buckets in proportion, a bucket's batches keep their order, and the batch at a position is
    found by bisection, without laying out the epoch.
    """
    times = Times(num_batches=num_batches, key=key)
    time, rest = times.find(position)
    # Batches at the same time come in the order of the buckets.
    return [batch for batch in times.last_batches(time) if times.of(*batch) == time][rest]


TICKS = 2**16
"""Resolution of the times: ticks for each batch of an epoch."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """The times of all batches of an epoch, in whole ticks."""

    num_batches: tuple[int, ...]
    key: int

    @cached_property
    def _end(self) -> int:
        return TICKS * sum(self.num_batches)

    def of(self, bucket: int, index: int) -> int:
        """Returns the time of a batch."""
        num = self.num_batches[bucket]
        start, stop = (self._end * i // num for i in (index, index + 1))
        return start + _mix(self.key + _mix(index * len(self.num_batches) + bucket)) % (
            stop - start
        )

    def last_batches(self, time: int) -> list[tuple[int, int]]:
        """Returns the batch of each bucket in whose part of the epoch a time is."""
        time = min(time, self._end - 1)
        indices = [((time + 1) * num - 1) // self._end for num in self.num_batches]
        return [(b, i) for b, i in enumerate(indices) if self.num_batches[b]]

    def count(self, time: int) -> int:
        """Returns the number of batches up to a time, inclusively."""
        return sum(i + (self.of(b, i) <= time) for b, i in self.last_batches(time))

    def find(self, position: int) -> tuple[int, int]:
        """Returns the time of the batch at a position, and the earlier batches at that time."""
        # In a share of the epoch, every bucket has its share of batches to within one.
        reach = (len(self.num_batches) + 1) * TICKS
        low, high = max(0, position * TICKS - reach), position * TICKS + reach
        time = low + bisect_right(range(low, high), position, key=self.count)
        return time, position - (self.count(time - 1) if time else 0)


def _mix(word: int) -> int:
    """Returns a pseudo-random word of 64 bits (SplitMix64; Steele et al. 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)
