"""Images that occur more than once in a set, found by the hash of the source's file in the JSON.

Reading a hash costs a page of its shard, so of a large set evenly spaced records are compared.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.reader import ShardSet

MAX_COMPARED = 1_000_000
CHUNK_RECORDS = 1 << 16
MAX_EXAMPLES = 3


def read_image_hashes(
    shards: ShardSet, every: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bytes_] | None]]:
    """Yields the numbers of every `every`-th record and their images' hashes, chunk by chunk.

    None stands for a set whose records have no hashes.
    """
    step = every * CHUNK_RECORDS
    for start in range(0, len(shards), step):
        numbers = np.arange(start, min(start + step, len(shards)), every)
        yield numbers, shards.image_hashes(numbers)


def describe_duplicates(sets: Sequence[ShardSet]) -> str:
    """Returns how many records repeat the image of an earlier record of the sets, with examples."""
    total = sum(map(len, sets))
    every = -(-total // MAX_COMPARED)
    hashes: list[NDArray[np.bytes_]] = []
    places: list[NDArray[np.int64]] = []  # numbers over all sets
    starts = [0, *accumulate(map(len, sets))]
    for start, part in zip(starts, sets, strict=False):
        for numbers, found in read_image_hashes(part, every):
            if found is None:
                return "unknown, the records have no hashes of their images"
            hashes.append(found)
            places.append(start + numbers)
    numbers = np.concatenate(places)
    _, first, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    originals = first[inverse]
    (repeated,) = np.nonzero(originals != np.arange(len(numbers)))
    sample = f", of {len(numbers):,} compared" if every > 1 else ""
    if not len(repeated):
        return f"none{sample}"
    examples = [
        " = ".join(_key(sets, starts, int(numbers[index])) for index in (originals[copy], copy))
        for copy in repeated[:MAX_EXAMPLES]
    ]
    more = " ..." if len(repeated) > MAX_EXAMPLES else ""
    return f"{len(repeated):,} records{sample}: {', '.join(examples)}{more}"


def _key(sets: Sequence[ShardSet], starts: Sequence[int], number: int) -> str:
    """Returns the key of a record by its number over all sets."""
    which = int(np.searchsorted(starts, number, side="right")) - 1
    (key,) = sets[which].keys(np.array([number - starts[which]]))
    return key
