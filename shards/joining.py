"""Joins opened sets to one: plain sets to a union, bucketed ones bucket by bucket.

    shards = join_sets(["shards/a", "shards/b"], [open_set("shards/a"), open_set("shards/b")])

Among bucketed sets, a plain set is a bucket of its size.
"""

from collections.abc import Sequence
from pathlib import Path

from latent_t2i.shards.buckets import Bucket, BucketedShards, Buckets, downscale
from latent_t2i.shards.reader import ShardSet
from latent_t2i.shards.schema import hash_json
from latent_t2i.shards.union import PlainShards, UnionShards, require_same

Shards = PlainShards | BucketedShards
Named = tuple[str, ShardSet]


def join_sets(locations: Sequence[str], opened: Sequence[ShardSet | BucketedShards]) -> Shards:
    """Returns several sets as one; a single set unchanged.

    Raises FormatError, naming sets, field and both values, if their encoders, latents or texts
    differ, and ValueError for a set that is given twice.
    """
    if len(opened) == 1:
        return opened[0]
    require_distinct(locations, opened)
    named = [pair for one in zip(locations, opened, strict=True) for pair in plain_sets(*one)]
    if any(isinstance(one, BucketedShards) for one in opened):
        return _join_buckets(locations, opened, named)
    return _unite(named)


def require_distinct(locations: Sequence[str], opened: Sequence[ShardSet | BucketedShards]) -> None:
    """Raises ValueError for a set that is given twice, under one name or two."""
    seen: dict[str, str] = {}
    for location, one in zip(locations, opened, strict=True):
        if one.sha256 in seen:
            raise ValueError(
                f"shards: {location}: found the same set as {seen[one.sha256]}, expected each set "
                "once; use --data.weights to visit a set more often"
            )
        seen[one.sha256] = location


def plain_sets(location: str, shards: ShardSet | BucketedShards) -> list[Named]:
    """Returns the plain sets of a set, with their names."""
    if isinstance(shards, ShardSet):
        return [(location, shards)]
    names = (f"{location}/{bucket.name}" for bucket in shards.buckets.buckets)
    return list(zip(names, shards.sets, strict=True))


def _unite(named: Sequence[Named]) -> UnionShards:
    return UnionShards([name for name, _ in named], [part for _, part in named])


def _join_buckets(
    locations: Sequence[str], opened: Sequence[ShardSet | BucketedShards], named: Sequence[Named]
) -> BucketedShards:
    """Returns bucketed sets, possibly with plain ones, as one: buckets of one size are joined."""
    require_same([(name, part.manifest) for name, part in named], shapes=False)
    scale = _pixels_per_cell(locations, opened)
    by_size: dict[tuple[int, int], list[Named]] = {}
    for name, part in named:
        _, height, width = part.manifest.latent_shape
        by_size.setdefault((width, height), []).append((name, part))
    parts = [_unite(by_size[size]) for size in sorted(by_size)]
    listed = [
        _describe(part, round(width * scale), round(height * scale))
        for (width, height), part in zip(sorted(by_size), parts, strict=True)
    ]
    num_records = sum(map(len, parts))
    buckets = Buckets(
        buckets=tuple(listed),
        quarantine=None,
        num_source=num_records + sum(bucket.quarantined for bucket in listed),
        num_records=num_records,
        num_quarantined=0,
        folder=Path(),
    )
    return BucketedShards(", ".join(locations), buckets, parts)


def _pixels_per_cell(
    locations: Sequence[str], opened: Sequence[ShardSet | BucketedShards]
) -> float:
    """Returns the pixels that a latent cell spans; all sets have the first bucketed one's VAE."""
    pairs = zip(locations, opened, strict=True)
    location, shards = next(pair for pair in pairs if isinstance(pair[1], BucketedShards))
    assert isinstance(shards, BucketedShards)
    return downscale(location, shards.buckets.buckets[0].name, shards.sets[0].manifest)


def _describe(part: UnionShards, width_px: int, height_px: int) -> Bucket:
    return Bucket(
        name=f"{width_px}x{height_px}",
        width_px=width_px,
        height_px=height_px,
        records=len(part),
        quarantined=sum(one.manifest.num_quarantined for one in part.sets),
        sha256=hash_json({"sets": [one.sha256 for one in part.sets]}),
    )
