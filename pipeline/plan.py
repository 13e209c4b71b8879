"""Divides the listed records into shards, before anything is encoded.

Images are grouped by number of captions, in the source's order. All records of a shard then have
the same byte layout without empty caption slots, and shard `i` holds the same records on every run.
An unreadable image makes its shard shorter and moves no other record.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index
from latent_t2i.shards.schema import BLOCK_BYTES, Layout, Provenance, make_layout, round_up


@dataclass(frozen=True, kw_only=True)
class ReplacedShard:
    """A finished shard that is encoded again, and those of its records that are copied."""

    path: Path
    layout: Layout
    num_records: int
    kept: tuple[int, ...]
    """Positions of the records that cannot be encoded again from the source."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The records of one shard: a range of numbers within a bucket and number of captions."""

    folder: Path
    index: int
    bucket: str
    num_captions: int
    first: int
    last: int
    num_records: int
    layout: Layout
    owner: int | None = None
    """The shard of a finished set to which the index has assigned the records."""
    replaces: ReplacedShard | None = None
    """The finished shard that is encoded again."""

    @property
    def num_kept(self) -> int:
        """Number of records that are copied from the finished shard."""
        return len(self.replaces.kept) if self.replaces else 0

    @property
    def num_bytes(self) -> int:
        """Size of the shard if no record is quarantined."""
        return self.layout.shard_bytes(self.num_records)


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """The shards of one set: all of the source, or one bucket."""

    bucket: str
    """Name of the bucket; empty without buckets."""
    folder: Path
    preprocessing: Preprocessing
    provenance: Provenance
    shards: tuple[ShardPlan, ...]

    @property
    def num_records(self) -> int:
        """Number of images to read."""
        return sum(shard.num_records for shard in self.shards)


def plan_shards(
    index: Index,
    bucket: str,
    folder: Path,
    *,
    latent_shape: tuple[int, int, int, int],
    text_shape: tuple[int, int],
    provenance: Provenance,
    first_index: int = 0,
) -> tuple[ShardPlan, ...]:
    """Divides a bucket's records into shards of latents (views, C, h, w) and text (T, D) each.

    A shard ends at the provenance's `records_per_shard` or `max_shard_bytes`, whichever comes
    first, but holds at least one record. The first shard has the number `first_index`.
    """
    lay_out = make_lay_out(latent_shape, text_shape, provenance)
    shards: list[ShardPlan] = []
    for num_captions in [number for name, number in index.groups() if name == bucket]:
        for first, last, num_records, layout in cut(
            index.sizes(bucket, num_captions),
            partial(lay_out, num_captions),
            max_records=provenance.records_per_shard,
            max_bytes=provenance.max_shard_bytes,
        ):
            shard = ShardPlan(
                folder=folder,
                index=first_index + len(shards),
                bucket=bucket,
                num_captions=num_captions,
                first=first,
                last=last,
                num_records=num_records,
                layout=layout,
            )
            shards.append(shard)
    return tuple(shards)


def plan_replaced(
    index: Index,
    number: int,
    folder: Path,
    *,
    latent_shape: tuple[int, int, int, int],
    text_shape: tuple[int, int],
    provenance: Provenance,
    num_captions: int,
    old: ReplacedShard | None,
) -> ShardPlan:
    """Plans a shard of a finished set again, of the records that the index has assigned to it.

    `old` is None if none of its images could be read. Without copied records, the plan is that of
    the set's first run.
    """
    lay_out = make_lay_out(latent_shape, text_shape, provenance)
    sizes = list(index.sizes("", num_captions, number))
    json_bytes = max(round_up(size, BLOCK_BYTES) for _, size in sizes)
    if old and old.kept:
        json_bytes = max(json_bytes, *old.layout.fields["json"].shape)
    return ShardPlan(
        folder=folder,
        index=number,
        bucket="",
        num_captions=num_captions,
        first=sizes[0][0],
        last=sizes[-1][0],
        num_records=len(sizes) + (len(old.kept) if old else 0),
        layout=lay_out(num_captions, json_bytes),
        replaces=old,
        owner=number,
    )


def make_lay_out(
    latent_shape: tuple[int, int, int, int], text_shape: tuple[int, int], provenance: Provenance
) -> Callable[[int, int], Layout]:
    """Returns a function that makes the layout for a number of captions and of JSON bytes."""

    def lay_out(num_captions: int, json_bytes: int) -> Layout:
        return make_layout(
            latent=latent_shape,
            text=(num_captions, *text_shape),
            json_bytes=json_bytes,
            text_dtype=provenance.text_dtype,
            extra=provenance.fields,
        )

    return lay_out


def cut(
    sizes: Iterable[tuple[int, int]],
    lay_out: Callable[[int], Layout],
    *,
    max_records: int,
    max_bytes: int,
) -> Iterator[tuple[int, int, int, Layout]]:
    """Cuts records (number, JSON bytes) with the same number of captions into shards.

    Yields each shard's first and last record number, its number of records, and its layout. The
    largest JSON decides the layout of all records of the shard.
    """
    layout = lay_out(0)
    first = last = num = 0
    for number, meta_bytes in sizes:
        # tar pads to blocks, so the rest of the last block is free.
        json_bytes = round_up(meta_bytes, BLOCK_BYTES)
        fits = json_bytes <= layout.fields["json"].shape[0]
        wider = layout if fits else lay_out(json_bytes)
        if num and (num == max_records or wider.shard_bytes(num + 1) > max_bytes):
            yield first, last, num, layout
            num, wider = 0, lay_out(json_bytes)
        first = number if not num else first
        last, num, layout = number, num + 1, wider
    if num:
        yield first, last, num, layout


def bytes_by_member(sets: Iterable[SetPlan]) -> dict[str, int]:
    """Returns the data bytes of each member over all shards, and the overhead as `tar`."""
    sizes: Counter[str] = Counter()
    for shard in (shard for part in sets for shard in part.shards):
        data = {name: field.num_bytes for name, field in shard.layout.fields.items()}
        for name, num_bytes in data.items():
            sizes[name] += shard.num_records * num_bytes
        sizes["tar"] += shard.num_bytes - shard.num_records * sum(data.values())
    return dict(sizes)
