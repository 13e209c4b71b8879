"""What will be written, decided from the source alone before anything is encoded.

Images with equally many captions come together, in the source's order, and are cut into shards of
`records_per_shard`: every record of a shard then has the same byte layout without a single empty
caption slot, and shard `i` means the same records on every run. An image that turns out to be
unreadable leaves its shard shorter and moves nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.record import Record, make_meta
from shards.schema import BLOCK_BYTES, Layout, encode_meta, make_layout, round_up

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
    records_per_shard: int,
) -> Plan:
    """Divides records into shards of latents (views, channels, h, w) and text (T, D) per caption.

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
    parts = [
        tuple(groups[count][start : start + records_per_shard])
        for count in sorted(groups)
        for start in range(0, len(groups[count]), records_per_shard)
    ]
    shards = [
        ShardPlan(
            index=index,
            records=part,
            layout=make_layout(
                latent=latent_shape,
                text=(len(part[0].captions), *text_shape),
                json_bytes=round_up(max(map(most_meta_bytes, part)), BLOCK_BYTES),
            ),
        )
        for index, part in enumerate(parts)
    ]
    return Plan(shards=tuple(shards), quarantined=quarantined, num_source=len(records))


def most_meta_bytes(record: Record) -> int:
    """Returns the size of a record's JSON if all captions were cut and the image were huge."""
    everything = range(len(record.captions))
    size = (WIDEST_PX, WIDEST_PX)
    return len(encode_meta(make_meta(record, truncated=everything, source_size_px=size)))
