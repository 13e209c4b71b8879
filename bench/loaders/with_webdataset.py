"""webdataset as in its documentation: shuffled shards, a shuffle buffer, decode, map, batched.

It reads this project's own shards. One member per caption, of which only the chosen one is decoded,
was slower, because parsing tar headers takes most of the time: 750 against 1,500 records/s (77
tokens, float16), 1,200 against 2,700 (32, int8).
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
# Passes over the shards in one epoch, so that no turn contains the end of an epoch.
PASSES = 1000
MEMBERS = ("latent.npy", "text.npy", "tokens.npy")


class Tars:
    """Stock webdataset."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes the records as this project's shards, which are WebDataset tars."""
        write_shards(folder, content, RECORDS_PER_SHARD)

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches forever."""
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
