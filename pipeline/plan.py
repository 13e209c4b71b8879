"""What will be written, decided from the source alone before anything is encoded.

Images with equally many captions come together, in the source's order, and are cut into shards of
at most `records_per_shard` and `max_shard_bytes`: every record of a shard then has the same byte
layout without a single empty caption slot, and shard `i` means the same records on every run. An
image that turns out to be unreadable leaves its shard shorter and moves nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.record import Record, make_meta
from shards.schema import BLOCK_BYTES, Layout, TextDtype, encode_meta, make_layout, round_up

WIDEST_PX = 2**31
"""Stands for any image's size when room for it is reserved."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The records of one shard, before any is read."""

    index: int
    records: tuple[Record, ...]
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a set, and the records that are in none, with the reason."""

    shards: tuple[ShardPlan, ...]
    quarantined: dict[str, str]
    num_source: int

    @property
    def num_captions(self) -> int:
        """The captions of all images that will be read."""
        return sum(len(shard.records) * shard.layout.num_captions for shard in self.shards)


def make_plan(
    records: Sequence[Record],
    *,
    latent_shape: tuple[int, int, int, int],
    text_shape: tuple[int, int],
    text_dtype: TextDtype,
    records_per_shard: int,
    max_shard_bytes: int,
) -> Plan:
    """Divides records into shards of latents (views, channels, h, w) and text (T, D) per caption.

    A shard that one record alone takes past `max_shard_bytes` has that one.
    Raises ValueError if the source is empty, or has two records of one key.
    """
    if not records:
        raise ValueError("the source has no images")
    groups: dict[int, list[Record]] = defaultdict(list)
    seen: set[str] = set()
    for record in records:
        if record.key in seen:
            raise ValueError(f"the source has two records of key {record.key!r}")
        seen.add(record.key)
        groups[len(record.captions)].append(record)
    quarantined = {record.key: "no caption" for record in groups.pop(0, [])}
    shards: list[ShardPlan] = []
    for count in sorted(groups):

        def lay_out(json_bytes: int, count: int = count) -> Layout:
            return make_layout(
                latent=latent_shape,
                text=(count, *text_shape),
                json_bytes=json_bytes,
                text_dtype=text_dtype,
            )

        for part, layout in _cut(groups[count], lay_out, records_per_shard, max_shard_bytes):
            shards.append(ShardPlan(index=len(shards), records=part, layout=layout))
    return Plan(shards=tuple(shards), quarantined=quarantined, num_source=len(records))


def _cut(
    records: Sequence[Record], lay_out: Callable[[int], Layout], most: int, most_bytes: int
) -> Iterator[tuple[tuple[Record, ...], Layout]]:
    """Cuts records of equally many captions into shards, each as long as it may be.

    The largest JSON decides the layout: one record with a large one makes all of its shard larger.
    """
    part: list[Record] = []
    layout = lay_out(0)
    for record in records:
        room = round_up(most_meta_bytes(record), BLOCK_BYTES)
        wider = layout if room <= _room(layout) else lay_out(room)
        if part and (len(part) == most or wider.shard_bytes(len(part) + 1) > most_bytes):
            yield tuple(part), layout
            part, wider = [], lay_out(room)
        part.append(record)
        layout = wider
    yield tuple(part), layout


def _room(layout: Layout) -> int:
    return layout.fields["json"].shape[0]


def most_meta_bytes(record: Record) -> int:
    """Returns the size of a record's JSON if all captions were cut and the image were huge."""
    everything = range(len(record.captions))
    size = (WIDEST_PX, WIDEST_PX)
    return len(encode_meta(make_meta(record, truncated=everything, source_size_px=size)))
