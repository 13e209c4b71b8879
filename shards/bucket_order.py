"""In which order the records of several buckets are visited: each batch is of one of them.

    order = BucketOrder(sizes=((100, 40), (60,)), batch_size=16, seed=0)
    order.place(step)               # (bucket, step of that bucket's own order)

Each bucket has an order of its own (order.py), and an epoch takes as many batches of each as have
to be, in a shuffled sequence by (seed, epoch); so all is a function of the seed and the step, and
ranks and resuming are as there. By the end of epoch n `fill` has visited every record n times, and
in each bucket as much of the next epoch as its last batch had room for: of a bucket smaller than a
batch that is several epochs, and it is left out until they have passed. `drop` leaves out an
epoch's last, partial batch of each bucket, and so smaller buckets altogether.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.order import Cursor, LastBatch, Order, Shuffle, mixed_seed


@dataclass(frozen=True, kw_only=True)
class BucketOrder:
    """The endless sequence of batches that a run visits, each of one bucket."""

    sizes: tuple[tuple[int, ...], ...]
    """Records of each shard of each bucket."""
    batch_size: int
    """Of the global batch."""
    seed: int
    shuffle: Shuffle = "full"
    """`none`: the buckets come one after the other too."""
    window_shards: int = 16
    """How many shards of its bucket `blocks` mixes with each other."""
    last_batch: LastBatch = "fill"
    """A bucket's last, partial batch of an epoch: filled up from its next epoch, or dropped."""

    def __post_init__(self) -> None:
        if not any(order.last_batch == self.last_batch for order in self.orders):
            largest = int(self.counts.max())
            raise ValueError(
                f"last_batch: drop leaves nothing of buckets of at most {largest} records in "
                f"batches of {self.batch_size}; expected fill, or a batch_size of at most {largest}"
            )

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Records of each bucket (num_buckets,)."""
        return np.array([sum(sizes) for sizes in self.sizes], np.int64)

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """Each bucket's own order. That of a bucket that is dropped altogether is never asked."""
        return tuple(
            Order(
                sizes=sizes,
                batch_size=self.batch_size,
                seed=mixed_seed(self.seed, "buckets", bucket),
                shuffle=self.shuffle,
                window_shards=self.window_shards,
                last_batch=self.last_batch if sum(sizes) >= self.batch_size else "fill",
            )
            for bucket, sizes in enumerate(self.sizes)
        )

    @property
    def num_records(self) -> int:
        """Over all buckets."""
        return int(self.counts.sum())

    @property
    def epoch_records(self) -> int:
        """How many records an epoch visits; with `fill`, on average."""
        if self.last_batch == "drop":
            return int(self.batches_before(1).sum()) * self.batch_size
        return self.num_records

    def batches_before(self, epoch: int) -> NDArray[np.int64]:
        """Returns how many batches of each bucket (num_buckets,) come before an epoch."""
        if self.last_batch == "drop":
            return epoch * (self.counts // self.batch_size)
        return -(-epoch * self.counts // self.batch_size)

    def num_steps(self, num_epochs: int) -> int:
        """Returns the steps of so many epochs."""
        return int(self.batches_before(num_epochs).sum())

    def num_epochs(self, step: int) -> float:
        """Returns how many epochs the steps before this one are."""
        epoch, position = self._place(step)
        return epoch + position / (self.num_steps(epoch + 1) - self.num_steps(epoch))

    def place(self, step: int) -> tuple[int, int]:
        """Returns which bucket a step is of, and which step of that bucket's own order it is."""
        epoch, position = self._place(step)
        before = self.batches_before(epoch)
        num_batches = tuple((self.batches_before(epoch + 1) - before).tolist())
        if self.shuffle == "none":
            buckets, turns = in_turn(num_batches)
        else:
            buckets, turns = shuffled(num_batches, self.seed, epoch)
        bucket = int(buckets[position])
        return bucket, int(before[bucket] + turns[position])

    def records(self, step: int) -> NDArray[np.int64]:
        """Returns the record numbers (batch_size,) of a step, counted on from bucket to bucket."""
        bucket, local_step = self.place(step)
        first = int(self.counts[:bucket].sum())
        return first + self.orders[bucket].records(local_step)

    def cursor(self, step: int) -> Cursor:
        """Returns where a step begins."""
        epoch, position = self._place(step)
        return Cursor(epoch=epoch, position=position * self.batch_size)

    def step(self, cursor: Cursor) -> int:
        """Returns the step that begins at a cursor.

        Raises ValueError where none does: the cursor is of another batch size or data set.
        """
        position, rest = divmod(cursor.position, self.batch_size)
        step = self.num_steps(cursor.epoch) + position
        if rest or step >= self.num_steps(cursor.epoch + 1):
            raise ValueError(
                f"{cursor}: no step of {self.batch_size} records begins there in that epoch: it "
                "was made with another batch size or other shards"
            )
        return step

    def _place(self, step: int) -> tuple[int, int]:
        """Returns the epoch that a step is of, and which of its steps."""
        # With `drop` an epoch may be short of a step's share, but it has at least one.
        latest = step * self.batch_size // self.num_records if self.last_batch == "fill" else step
        epoch = bisect_right(range(latest + 2), step, key=self.num_steps) - 1
        return epoch, step - self.num_steps(epoch)


@lru_cache(maxsize=2)
def shuffled(
    num_batches: tuple[int, ...], seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the bucket of each step of an epoch, and the how-manieth of its bucket it is."""
    buckets, turns = in_turn(num_batches)
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "buckets", epoch, 0)))
    mixed = generator.permutation(buckets)
    by_bucket = np.argsort(mixed, kind="stable")  # the steps of bucket 0 in order, then of bucket 1
    placed = np.empty_like(turns)
    placed[by_bucket] = turns
    return mixed, placed


@lru_cache(maxsize=2)
def in_turn(num_batches: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `shuffled`, the buckets one after the other."""
    buckets = np.repeat(np.arange(len(num_batches)), num_batches)
    turns = np.concatenate([np.arange(num) for num in num_batches])
    return buckets, turns
