"""Images that occur more than once in a set, found by the hash of the source's file in the JSON.

Reading a hash costs a page of its shard, so of a large set evenly spaced records are compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.reader import ShardSet, open_shards

MAX_COMPARED = 1_000_000
CHUNK_RECORDS = 1 << 16
MAX_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The records that repeat the image of an earlier one."""

    num: int
    num_compared: int
    num_records: int
    examples: tuple[tuple[str, str], ...]
    """Keys of the first ones, each with the key of the record that it repeats."""

    def count(self) -> str:
        """Returns the number of records as text."""
        among = f"{self.num_compared:,} of {self.num_records:,}"
        compared = f" (compared: {among})" if self.num_compared < self.num_records else ""
        records = "1 record repeats" if self.num == 1 else f"{self.num or 'no'} records repeat"
        return f"{records} the image of another{compared}"

    def __str__(self) -> str:
        pairs = [f"{copy} = {original}" for copy, original in self.examples]
        return ": ".join([self.count(), *([", ".join(pairs)] if pairs else [])])


def find_duplicates(folder: Path) -> Duplicates | None:
    """Compares the images of all records of a set or bucketed set; None if it has no hashes."""
    if holds_buckets(folder):
        return compare_images(open_buckets(folder, verify="none").sets)
    return compare_images([open_shards(folder, verify="none")])


def compare_images(sets: Sequence[ShardSet]) -> Duplicates | None:
    """Compares the images of the records of some sets; None if one has no hashes of its images."""
    total = sum(map(len, sets))
    every = -(-total // MAX_COMPARED)
    starts = [0, *accumulate(map(len, sets))]
    hashes: list[NDArray[np.bytes_]] = []
    numbers: list[NDArray[np.int64]] = []  # over all sets
    for start, part in zip(starts, sets, strict=False):
        for records, found in read_image_hashes(part, every):
            if found is None:
                return None
            hashes.append(found)
            numbers.append(start + records)
    compared = np.concatenate(numbers)
    _, first, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    original = first[inverse]
    (copies,) = np.nonzero(original != np.arange(len(compared)))
    pairs = [(compared[copy], compared[original[copy]]) for copy in copies[:MAX_EXAMPLES]]
    return Duplicates(
        num=len(copies),
        num_compared=len(compared),
        num_records=total,
        examples=tuple((_key(sets, starts, a), _key(sets, starts, b)) for a, b in pairs),
    )


def read_image_hashes(
    shards: ShardSet, every: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bytes_] | None]]:
    """Yields the numbers of every `every`-th record and their images' hashes, chunk by chunk.

    None stands for records without hashes.
    """
    step = every * CHUNK_RECORDS
    for start in range(0, len(shards), step):
        records = np.arange(start, min(start + step, len(shards)), every)
        yield records, shards.image_hashes(records)


def _key(sets: Sequence[ShardSet], starts: Sequence[int], number: np.int64) -> str:
    """Returns the key of a record by its number over all sets."""
    which = int(np.searchsorted(starts, number, side="right")) - 1
    (key,) = sets[which].keys(np.array([number - starts[which]]))
    return key
