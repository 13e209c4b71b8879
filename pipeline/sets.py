"""Which sets a source becomes, and whether there is room for them.

One set, or with `buckets` one for each aspect ratio that the source has, in a folder of its own:
all records of a set are of one size, and so are the batches that are drawn from it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from latent_t2i.model.encoders import vae_downscale
from latent_t2i.model.paths import format_bytes, free_bytes
from latent_t2i.pipeline import report
from latent_t2i.pipeline.buckets import make_buckets, nearest_bucket
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import Encoders, num_cores
from latent_t2i.pipeline.images import Preprocessing, UnreadableImageError, read_size
from latent_t2i.pipeline.index import Examine, Examined, Index
from latent_t2i.pipeline.plan import Limits, SetPlan, Target, plan_shards
from latent_t2i.pipeline.sources.locators import LocatorError, read_image_bytes
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.buckets import Buckets, parse_size
from latent_t2i.shards.schema import BUCKETS_NAME, MANIFEST_NAME
from latent_t2i.shards.writer import read_report

Size = tuple[int, int]


def make_sets(config: PipelineConfig, encoders: Encoders, index: Index, out: Path) -> list[SetPlan]:
    """Divides the listed records into sets and these into shards.

    Raises ValueError if no record can be used.
    """
    limits = Limits(num_records=config.records_per_shard, num_bytes=config.max_shard_bytes)
    sets = []
    for bucket in dict.fromkeys(bucket for bucket, _ in index.groups()):
        size_px = (
            parse_size("buckets", bucket)
            if bucket
            else (config.image_size_px, config.image_size_px)
        )
        shards = plan_shards(
            index,
            bucket,
            latent_shape=encoders.latent_shape(size_px),
            text_shape=encoders.text_shape,
            text_dtype=config.text_dtype,
            limits=limits,
        )
        how = make_preprocessing(config, size_px)
        sets.append(SetPlan(bucket=bucket, folder=out / bucket, how=how, shards=shards))
    if (out / BUCKETS_NAME).exists() and config.buckets:  # those without a record are not listed
        listed = {bucket.name for bucket in Buckets.load(out).buckets}
        sets = [part for part in sets if part.bucket in listed]
    if not sets:
        reasons = "; ".join(report.first_of(index.quarantined))
        raise ValueError(f"none of the {index.num_source} images can be used: {reasons}")
    return sets


def make_preprocessing(config: PipelineConfig, size_px: Size) -> Preprocessing:
    """Returns how images become squares, or rectangles, of pixels."""
    return Preprocessing(
        size_px=size_px,
        crop=config.crop,
        seed=config.seed,
        min_size_px=config.min_image_size_px,
        fast_jpeg=config.fast_jpeg,
    )


@contextmanager
def examiner(config: PipelineConfig, encoders: Encoders) -> Iterator[Examine]:
    """Gives what looks at records while they are listed: at captions, and with buckets at sizes."""
    sizes: Sequence[Size] = ()
    if config.buckets:
        multiple = max(vae_downscale(encoders.vae), config.bucket_multiple_px)
        sizes = make_buckets(config.image_size_px, multiple, config.max_aspect)
    with ThreadPoolExecutor(num_cores()) as pool:

        def examine(records: Sequence[Record]) -> list[Examined]:
            lengths = iter(encoders.text.count_tokens([c for r in records for c in r.captions]))
            found = pool.map(lambda record: find_bucket(record, sizes), records)
            return [
                Examined(
                    num_cut=sum(next(lengths) > config.max_tokens for _ in record.captions),
                    bucket=bucket,
                    problem=record.problem or problem,
                )
                for record, (bucket, problem) in zip(records, found, strict=True)
            ]

        yield examine


def find_bucket(record: Record, buckets: Sequence[Size]) -> tuple[str, str | None]:
    """Returns the name of the bucket nearest to an image, or why it has none."""
    if not buckets or record.problem:
        return "", None
    try:
        width, height = nearest_bucket(read_size(read_image_bytes(record.locator)), buckets)
    except (FileNotFoundError, LocatorError, UnreadableImageError) as error:
        return "", str(error)
    return f"{width}x{height}", None


def is_done(target: Target) -> bool:
    """Returns whether a shard, or its whole set, is finished."""
    is_finished = (target.folder / MANIFEST_NAME).exists()
    return is_finished or read_report(target.folder, target.plan.index) is not None


def all_targets(sets: Sequence[SetPlan]) -> list[Target]:
    """Returns the shards of all sets, in order."""
    return [Target(folder=part.folder, plan=shard) for part in sets for shard in part.shards]


def require_room(sets: Sequence[SetPlan], out: Path) -> None:
    """Raises ValueError if the shards that are not finished will not fit."""
    needed = sum(target.plan.num_bytes for target in all_targets(sets) if not is_done(target))
    free = free_bytes(out)
    if needed > free:
        raise ValueError(
            f"{report.show(out)}: the shards need {format_bytes(needed)}, the disk has "
            f"{format_bytes(free)} free: choose another --out, fewer --max-tokens or --text-dtype "
            "int8; --force starts all the same"
        )
