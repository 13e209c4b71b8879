"""Divides a source into sets, and checks that they fit on the disk.

The output is one set, or with `buckets` one set per aspect ratio, each in its own folder: all
records of a set have one size, and so does every batch of it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from latent_t2i.model.paths import format_bytes, free_bytes
from latent_t2i.pipeline import report
from latent_t2i.pipeline.buckets import Size, nearest_bucket
from latent_t2i.pipeline.images import Preprocessing, UnreadableImageError, describe, read_size
from latent_t2i.pipeline.index import Index, RecordCheck
from latent_t2i.pipeline.plan import SetPlan, ShardPlan, plan_shards
from latent_t2i.pipeline.sources.locators import LocatorError, read_image_bytes
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.pipeline.upload import NUM_LOCAL_SHARDS, Mirror
from latent_t2i.shards.buckets import Buckets, parse_size
from latent_t2i.shards.schema import (
    BUCKET_PATTERN,
    BUCKETS_NAME,
    MANIFEST_NAME,
    PROGRESS_DIR,
    FieldSpec,
    Provenance,
)
from latent_t2i.shards.writer import PROVENANCE_NAME, read_report


def make_sets(
    index: Index,
    out: Path,
    preprocessing: Preprocessing,
    provenance: Provenance,
    *,
    latent_shape: Callable[[Size], tuple[int, int, int, int]],
    text_shape: tuple[int, int],
    fields: Callable[[Size], tuple[FieldSpec, ...]],
) -> list[SetPlan]:
    """Divides the listed records into sets, and these into shards.

    `preprocessing` is for the square; `provenance` lacks what differs between buckets. Raises
    ValueError if no record can be used.
    """
    sets = []
    for bucket in dict.fromkeys(bucket for bucket, _ in index.groups()):
        size_px = parse_size("buckets", bucket) if bucket else preprocessing.size_px
        of_size = replace(preprocessing, size_px=size_px)
        of_bucket = replace(
            provenance,
            preprocessing=describe(of_size) | provenance.preprocessing,
            source=provenance.source | ({"bucket": bucket} if bucket else {}),
            fields=fields(size_px),
        )
        shards = plan_shards(
            index,
            bucket,
            out / bucket,
            latent_shape=latent_shape(size_px),
            text_shape=text_shape,
            provenance=of_bucket,
        )
        part = SetPlan(
            bucket=bucket,
            folder=out / bucket,
            preprocessing=of_size,
            provenance=of_bucket,
            shards=shards,
        )
        sets.append(part)
    if sets and sets[0].bucket and (out / BUCKETS_NAME).exists():
        # A finished set has no folder for a bucket whose images were all quarantined.
        listed = {bucket.name for bucket in Buckets.load(out).buckets}
        sets = [part for part in sets if part.bucket in listed] or sets
    if not sets:
        reasons = "; ".join(report.first_of(index.quarantined))
        raise ValueError(f"none of the {index.num_source} images can be used: {reasons}")
    return sets


def check_records(
    records: Sequence[Record],
    *,
    tokenize: Callable[[Sequence[str]], list[list[int]]],
    max_tokens: int,
    buckets: Sequence[Size],
    pool: Executor,
) -> list[RecordCheck]:
    """Tokenises the captions of listed records and, with `buckets`, reads the images' sizes."""
    found = pool.map(lambda record: find_bucket(record, buckets), records)
    token_ids = iter(tokenize([caption for record in records for caption in record.captions]))
    checks = []
    for record, (bucket, problem) in zip(records, found, strict=True):
        of_record = list(islice(token_ids, len(record.captions)))
        check = RecordCheck(
            token_ids=of_record,
            num_cut=sum(len(ids) > max_tokens for ids in of_record),
            bucket=bucket,
            problem=record.problem or problem,
        )
        checks.append(check)
    return checks


def find_bucket(record: Record, buckets: Sequence[Size]) -> tuple[str, str | None]:
    """Returns the name of the bucket nearest to an image, or why it has none."""
    if not buckets or record.problem:
        return "", None
    try:
        width, height = nearest_bucket(read_size(read_image_bytes(record.locator)), buckets)
    except (FileNotFoundError, LocatorError, UnreadableImageError) as error:
        return "", str(error)
    return f"{width}x{height}", None


def is_done(shard: ShardPlan) -> bool:
    """Returns whether a shard, or its whole set, is finished."""
    is_finished = (shard.folder / MANIFEST_NAME).exists()
    return is_finished or read_report(shard.folder, shard.index) is not None


def all_shards(sets: Sequence[SetPlan]) -> list[tuple[SetPlan, ShardPlan]]:
    """Returns the shards of all sets in order, each with its set."""
    return [(part, shard) for part in sets for shard in part.shards]


def require_own_folder(sets: Sequence[SetPlan], out: Path) -> None:
    """Raises ValueError if the output folder holds other sets, or files and no set."""
    names = {path.name for path in out.iterdir()} - {PROGRESS_DIR} if out.is_dir() else set()
    buckets = {name for name in names if BUCKET_PATTERN.fullmatch(name)}
    advice = "choose another --out, or delete this one"
    if not sets[0].bucket:
        if found := sorted(buckets | names & {BUCKETS_NAME}):
            raise ValueError(
                f"{out}: expected a set without --buckets, found the parts of a bucketed set "
                f"({', '.join(found)}): {advice}"
            )
        return  # `begin_set` refuses other files
    if MANIFEST_NAME in names or (out / PROGRESS_DIR / PROVENANCE_NAME).exists():
        raise ValueError(f"{out}: expected a bucketed set, found a set without --buckets: {advice}")
    expected = [part.bucket for part in sets]
    if foreign := sorted(buckets - {*expected}):
        raise ValueError(
            f"{out}: expected the buckets {', '.join(expected)}, also found {', '.join(foreign)}, "
            f"of other images or settings: {advice}"
        )
    if not buckets and names:
        found = sorted(names)[:3]
        raise ValueError(
            f"{out}: contains other files ({', '.join(found)} ...) and no shards: choose an empty "
            "folder for --out"
        )


def require_room(sets: Sequence[SetPlan], out: Path, mirror: Mirror | None = None) -> None:
    """Raises ValueError if the unfinished shards do not fit on the disk.

    With a mirror, only a few are on the disk at the same time.
    """
    sizes = [shard.num_bytes for _, shard in all_shards(sets) if not is_done(shard)]
    if mirror is not None:
        sizes = sorted(sizes)[-NUM_LOCAL_SHARDS:]
    needed, free = sum(sizes), free_bytes(out)
    if needed <= free:
        return
    what, remedy = "the shards need", "choose another --out, fewer --max-tokens or"
    if mirror is not None:
        what = f"before they are uploaded, {len(sizes)} shards need"
        remedy = "choose another --work-dir, a smaller --max-shard-bytes or"
    raise ValueError(
        f"{report.show(out)}: {what} {format_bytes(needed)}, but the disk has "
        f"{format_bytes(free)} free: {remedy} --text-dtype int8, or pass --force to start anyway"
    )
