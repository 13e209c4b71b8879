"""litdata: tensors in chunks of 64 MB, all captions in one leaf, chosen in the transform.

`batch_decode=0` and `item_shuffle_window="full"` were the fastest settings: 12,600 records/s (77
tokens, float16) and 23,000 (32, int8), against 6,100 and 4,200 with its defaults. One leaf per
caption was slower: 6,900 (77, float16). litdata shuffles the chunks, then the records within each.
"""

import json
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch

from bench.loaders.contents import BATCH_SIZE, NUM_CAPTIONS, Batch, Content, choose, record

# Passes over the chunks in one epoch, so that no turn contains the end of an epoch.
PASSES = 64


class Chunks:
    """StreamingDataset through its StreamingDataLoader."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes all records in the loader's format."""
        litdata.optimize(
            fn=partial(_tensors, content),
            inputs=list(range(content.num_records)),
            output_dir=str(folder),
            num_workers=1,
            chunk_bytes="64MB",
        )
        _lengthen(folder / "index.json")

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches forever."""
        dataset = litdata.StreamingDataset(
            str(folder), shuffle=True, item_shuffle_window="full", batch_decode=0, transform=_choose
        )
        loader = litdata.StreamingDataLoader(
            dataset, batch_size=BATCH_SIZE, num_workers=num_workers, drop_last=True
        )
        while True:
            for batch in loader:
                yield Batch(*batch)


def _tensors(content: Content, number: int) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array) for name, array in record(content, number).items()}


def _choose(sample: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    fields = sample["latent"], sample["text"], sample["tokens"]
    return choose(fields, random.randrange(NUM_CAPTIONS))


def _lengthen(path: Path) -> None:
    """Lists each chunk PASSES times through hard links; litdata has no setting for that."""
    index = json.loads(path.read_text())
    chunks = []
    for number in range(PASSES):
        for chunk in index["chunks"]:
            name = f"pass{number}-{chunk['filename']}"
            os.link(path.with_name(chunk["filename"]), path.with_name(name))
            chunks.append({**chunk, "filename": name})
    path.write_text(json.dumps({**index, "chunks": chunks}))
