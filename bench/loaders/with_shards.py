"""This project's shards with map, cache or stream access."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.loaders.contents import BATCH_SIZE, NUM_CAPTIONS, TEXT_WIDTH, Batch, Content, record
from latent_t2i.shards.access import Access, Kind, make_loader, open_set, open_sets
from latent_t2i.shards.joining import Shards
from latent_t2i.shards.loader import batches
from latent_t2i.shards.schema import (
    Example,
    Identity,
    Provenance,
    encode_meta,
    make_layout,
    round_up,
)
from latent_t2i.shards.writer import ShardWriter, begin_set, finish_set

META = {"captions": ["a photograph of something"] * NUM_CAPTIONS, "truncated": []}
RECORDS_PER_SHARD = 128


class OneSet:
    """This project's loader with one kind of access."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def write(self, folder: Path, content: Content) -> None:
        """Writes all records in the loader's format."""
        write_shards(folder, content, RECORDS_PER_SHARD)

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches forever; only stream access has worker processes."""
        access = Access(
            kind=self.kind,
            cache_dir=folder.with_name(f"{folder.name}-cache"),
            num_workers=num_workers if self.kind == "stream" else 0,
            fields=("latent", "text", "tokens"),  # those that the other loaders deliver
        )
        shards = self.open(folder, access)
        order = shards.order(batch_size=BATCH_SIZE, seed=0)
        for batch in batches(make_loader(shards, order, access), start=0, stop=sys.maxsize):
            yield Batch(batch.latent, batch.text, batch.extra["tokens"])

    def open(self, folder: Path, access: Access) -> Shards:
        """Opens the set."""
        location = str(folder) if self.kind == "map" else folder.as_uri()
        return open_set(location, access, verify="none")


class TwoSets(OneSet):
    """This project's loader on two sets with half of the records each, as one."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes each half as a set."""
        half = content.num_records // 2
        for name, numbers in (("a", range(half)), ("b", range(half, content.num_records))):
            write_shards(folder / name, content, RECORDS_PER_SHARD, numbers)

    def open(self, folder: Path, access: Access) -> Shards:
        """Opens both sets as one."""
        shards, _ = open_sets([f"{folder}/a", f"{folder}/b"], access, self.kind, verify="none")
        return shards


def write_shards(
    folder: Path, content: Content, records_per_shard: int, numbers: range | None = None
) -> None:
    """Writes the records, or those with some numbers, as shards of `records_per_shard` each."""
    numbers = range(content.num_records) if numbers is None else numbers
    provenance = _provenance(content, records_per_shard)
    layout = make_layout(
        latent=content.shapes["latent"],
        text=(NUM_CAPTIONS, content.max_tokens, TEXT_WIDTH),
        json_bytes=round_up(len(encode_meta(META)), 512),
        text_dtype=content.text_dtype,
    )
    begin_set(folder, provenance)
    starts = range(0, len(numbers), records_per_shard)
    for index, start in enumerate(starts):
        with ShardWriter(folder, index, layout, "moments") as shard:
            for number in numbers[start : start + records_per_shard]:
                shard.write(Example(key=f"{number:08d}", meta=META, **record(content, number)))
    int8 = content.text_dtype == "int8"
    finish_set(
        folder,
        provenance,
        num_shards=len(starts),
        quarantined={},
        empty_text=np.zeros(content.shapes["text"][1:], np.float16),
        empty_tokens=np.zeros(content.max_tokens, np.int32),
        text_scale=(np.ones(TEXT_WIDTH, np.float32), 0.0, 1) if int8 else None,
    )


def _provenance(content: Content, records_per_shard: int) -> Provenance:
    made_up = Identity(name="made-up", revision=None, sha256="0" * 64)
    return Provenance(
        vae=made_up,
        text_encoder=made_up,
        tokenizer=made_up,
        latent_kind="moments",
        text_dtype=content.text_dtype,
        max_tokens=content.max_tokens,
        preprocessing={},
        source={"kind": "made-up", "num_records": content.num_records},
        records_per_shard=records_per_shard,
        max_shard_bytes=1 << 40,
    )
