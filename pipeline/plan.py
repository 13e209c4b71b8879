"""What will be written, decided from the source alone before anything is encoded.

Images with equally many captions come together, in the source's order, and are cut into shards of
at most `records_per_shard` and `max_shard_bytes`: every record of a shard then has the same byte
layout without a single empty caption slot, and shard `i` means the same records on every run. An
image that turns out to be unreadable leaves its shard shorter and moves nothing. With buckets of
aspect ratios, each bucket is a set of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index
from latent_t2i.shards.schema import BLOCK_BYTES, Layout, TextDtype, make_layout, round_up


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The records of one shard: those of its group from one number in the source to another."""

    index: int
    bucket: str
    num_captions: int
    first: int
    last: int
    num_records: int
    layout: Layout

    @property
    def num_bytes(self) -> int:
        """Its size, if no record is left out."""
        return self.layout.shard_bytes(self.num_records)


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """The shards of one set: of the source, or of a bucket."""

    bucket: str
    """Its name; empty where there are none."""
    folder: Path
    how: Preprocessing
    shards: tuple[ShardPlan, ...]

    @property
    def num_records(self) -> int:
        """The images that will be read."""
        return sum(shard.num_records for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a shard goes."""

    folder: Path
    plan: ShardPlan


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a shard ends: at whichever comes first."""

    num_records: int
    num_bytes: int


def plan_shards(
    index: Index,
    bucket: str,
    *,
    latent_shape: tuple[int, int, int, int],
    text_shape: tuple[int, int],
    text_dtype: TextDtype,
    limits: Limits,
) -> tuple[ShardPlan, ...]:
    """Divides a bucket's records into shards of latents (views, C, h, w) and text (T, D) each.

    A shard that one record alone takes past the limit of bytes has that one.
    """

    def lay_out(num_captions: int, json_bytes: int) -> Layout:
        return make_layout(
            latent=latent_shape,
            text=(num_captions, *text_shape),
            json_bytes=json_bytes,
            text_dtype=text_dtype,
        )

    shards: list[ShardPlan] = []
    for name, num_captions in index.groups():
        if name != bucket:
            continue
        sizes = index.sizes(bucket, num_captions)
        for first, last, num_records, layout in cut(sizes, partial(lay_out, num_captions), limits):
            shards.append(
                ShardPlan(
                    index=len(shards),
                    bucket=bucket,
                    num_captions=num_captions,
                    first=first,
                    last=last,
                    num_records=num_records,
                    layout=layout,
                )
            )
    return tuple(shards)


def cut(
    sizes: Iterable[tuple[int, int]], lay_out: Callable[[int], Layout], limits: Limits
) -> Iterator[tuple[int, int, int, Layout]]:
    """Cuts records (number, JSON bytes) of equally many captions into shards, as long as they may.

    Yields the first and the last record's number, how many there are, and the layout. The largest
    JSON decides it: one record with a large one makes all of its shard larger.
    """
    layout = lay_out(0)
    first = last = num = 0
    for number, meta_bytes in sizes:
        room = round_up(meta_bytes, BLOCK_BYTES)
        wider = layout if room <= _room(layout) else lay_out(room)
        too_large = wider.shard_bytes(num + 1) > limits.num_bytes
        if num and (num == limits.num_records or too_large):
            yield first, last, num, layout
            num, wider = 0, lay_out(room)
        first = number if not num else first
        last, num, layout = number, num + 1, wider
    if num:
        yield first, last, num, layout


def bytes_by_member(sets: Iterable[SetPlan]) -> dict[str, int]:
    """Returns the data of each member over all shards, then what the format adds to it."""
    sizes: Counter[str] = Counter()
    for shard in (shard for part in sets for shard in part.shards):
        data = {name: field.num_bytes for name, field in shard.layout.fields.items()}
        for name, num_bytes in data.items():
            sizes[name] += shard.num_records * num_bytes
        sizes["tar"] += shard.num_bytes - shard.num_records * sum(data.values())
    return dict(sizes)


def _room(layout: Layout) -> int:
    return layout.fields["json"].shape[0]
