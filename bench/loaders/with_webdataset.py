"""webdataset as its documentation has it: shuffled shards, a shuffle buffer, decode, map, batched.

It reads this project's own shards. A member for each caption, of which only the chosen is decoded,
was slower: 750 against 1,500 records/s (77 tokens, float16), 1,200 against 2,700 (32, int8), since
the time goes into parsing tar headers.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset

from bench.loaders.contents import BATCH_SIZE, NUM_CAPTIONS, Batch, Content, choose
from bench.loaders.with_shards import RECORDS_PER_SHARD, write_shards

SHUFFLE_BUFFER = 1000
PASSES = 1000
"""Over the shards in one epoch, so that no epoch's end is measured."""
MEMBERS = ("latent.npy", "text.npy", "tokens.npy")


class Tars:
    """Stock webdataset."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes all records in its format, which is this project's too."""
        write_shards(folder, content, RECORDS_PER_SHARD)

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches without end."""
        urls = [str(path) for path in sorted(folder.glob("*.tar"))] * PASSES
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=len(urls))
            .shuffle(SHUFFLE_BUFFER)
            .decode()
            .map(_choose)
            .batched(BATCH_SIZE, partial=False)
        )
        loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers)
        for latent, text, tokens in loader:
            yield Batch(*map(torch.as_tensor, (latent, text, tokens)))


def _choose(sample: dict[str, Any]) -> tuple[Any, Any, Any]:
    return choose([sample[member] for member in MEMBERS], random.randrange(NUM_CAPTIONS))
