"""Stage one from end to end: writes the missing shards and keeps the finished ones.

A killed run, started again with the same command, resumes after its last finished shard and ends
with the same bytes as an uninterrupted run. Several processes divide the shards by number. Every
image of the source is written or quarantined with a reason; the last line printed counts both.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from latent_t2i.model.encoders import (
    TextEncoder,
    fingerprint,
    load_vae,
    round_to_bfloat16,
    vae_downscale,
)
from latent_t2i.model.paths import free_bytes, output_root
from latent_t2i.pipeline import report
from latent_t2i.pipeline.buckets import make_buckets
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import (
    Encoders,
    encode_captions,
    find_device,
    num_cores,
    single_threaded,
)
from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index, build_index
from latent_t2i.pipeline.plan import SetPlan, ShardPlan
from latent_t2i.pipeline.processes import ProcessInfo, find_processes, folder_lock
from latent_t2i.pipeline.quantise import NUM_PASSES, NUM_SAMPLE, Quantiser, find_scale
from latent_t2i.pipeline.sets import all_shards, check_records, is_done, make_sets, require_room
from latent_t2i.pipeline.sources.open import SceneSettings, open_source
from latent_t2i.pipeline.workers import Batch, EncoderPool, Skipped, cut_batches
from latent_t2i.pipeline.writing import WriterThread
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.schema import MANIFEST_NAME, Identity, Manifest, Provenance
from latent_t2i.shards.writer import (
    FoundScale,
    begin_set,
    finish_set,
    keep_text_scale,
    read_report,
    read_text_scale,
)


def build(config: PipelineConfig) -> dict[str, Manifest]:
    """Makes the shards that `config` describes, or the missing ones.

    Returns the manifests by bucket ("" without buckets); an empty dict while other processes have
    unfinished shards, and for a dry run. Raises ValueError for a wrong source, encoder or folder,
    for a disk that is too small, and if more images are quarantined than `max_quarantined` allows.
    """
    processes = find_processes()
    device = find_device(config.device, processes.local_rank)
    return make_shards(config, load_encoders(config, device), processes)


def load_encoders(config: PipelineConfig, device: torch.device) -> Encoders:
    """Loads the encoders. Raises ValueError for one that is missing or does not fit."""
    vae = load_vae(config.vae, revision=config.vae_revision)
    vae_sha256 = fingerprint(vae)
    if config.vae_dtype == "bfloat16":
        round_to_bfloat16(vae)
    downscale = vae_downscale(vae)
    if config.image_size_px % downscale:
        raise ValueError(
            f"--image-size-px: {config.image_size_px} is not a multiple of {downscale}, the "
            f"downscaling factor of the VAE {config.vae!r}"
        )
    text = TextEncoder.load(
        config.text_encoder, config.text_encoder_revision, config.text_hidden_state
    )
    if config.max_tokens > text.max_length:
        raise ValueError(
            f"--max-tokens: expected at most {text.max_length}, the maximum of the text encoder "
            f"{config.text_encoder!r}, found {config.max_tokens}"
        )
    vae.to(device)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    if config.compile:
        vae.encoder.compile()
    return Encoders(
        vae=vae,
        vae_sha256=vae_sha256,
        text=text.to(device),
        device=device,
        views=config.views,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
    )


def make_shards(
    config: PipelineConfig, encoders: Encoders, processes: ProcessInfo
) -> dict[str, Manifest]:
    """Does what `build` does, with loaded encoders."""
    out = output_folder(config)
    with closing(list_source(config, encoders, out, is_first=processes.is_first)) as index:
        sets = make_sets(
            index,
            out,
            square_preprocessing(config),
            make_provenance(config, encoders, index),
            latent_shape=encoders.latent_shape,
            text_shape=encoders.text_shape,
        )
        if config.dry_run:
            print(report.plan_lines(index, sets, out, free_bytes(out)))
            return {}
        require_enough(index.quarantined | index.missing, index.num_source, config, out)
        if not config.force:
            require_room(sets, out)
        if begin(sets):
            print(f"{report.show(out)} is finished already: nothing to do")
        else:
            if processes.is_first:
                print(report.plan_lines(index, sets, out, free_bytes(out)))
            quantise = decide_scale(encoders, index, sets) if config.text_dtype == "int8" else None
            num_threads = config.num_threads or max(num_cores() // processes.num_local, 1)
            encode_missing(encoders, index, sets, processes, quantise, num_threads)
        return finish(config, encoders, index, sets, out)


def output_folder(config: PipelineConfig) -> Path:
    """Returns the folder of the shards."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return output_root() / "shards" / "data" / config.name / config.split


def list_source(config: PipelineConfig, encoders: Encoders, out: Path, *, is_first: bool) -> Index:
    """Lists the records; scenes are drawn first, by one process."""
    drawn = out.with_name(f"{out.name}-source")
    scenes = SceneSettings(drawn, config.split, config.image_size_px, config.seed)
    buckets: Sequence[tuple[int, int]] = ()
    if config.buckets:
        multiple = max(vae_downscale(encoders.vae), config.bucket_multiple_px)
        buckets = make_buckets(config.image_size_px, multiple, config.max_aspect)
    make_bar = report.bar if is_first else report.no_bar
    with (
        folder_lock(drawn) if config.source.kind == "scenes" else nullcontext(),
        ThreadPoolExecutor(num_cores()) as pool,
        make_bar(None, "image", "list") as bar,
    ):
        check = partial(
            check_records,
            tokenize=encoders.text.tokenize,
            max_tokens=config.max_tokens,
            buckets=buckets,
            pool=pool,
        )
        return build_index(open_source(config.source, scenes), check, bar.update)


def square_preprocessing(config: PipelineConfig) -> Preprocessing:
    """Returns how images become squares of pixels; a bucket differs in the size only."""
    return Preprocessing(
        size_px=(config.image_size_px, config.image_size_px),
        crop=config.crop,
        seed=config.seed,
        min_size_px=config.min_image_size_px,
        fast_jpeg=config.fast_jpeg,
    )


def make_provenance(config: PipelineConfig, encoders: Encoders, index: Index) -> Provenance:
    """Returns what decides the content of the shards, apart from the bucket and its size.

    Batch size, device and number of processes are absent: at most they change the last bit of a
    float16.
    """
    text = encoders.text
    return Provenance(
        vae=Identity(name=config.vae, revision=config.vae_revision, sha256=encoders.vae_sha256),
        text_encoder=Identity(name=text.name, revision=text.revision, sha256=text.fingerprint),
        tokenizer=Identity(
            name=text.name, revision=text.revision, sha256=text.tokenizer_fingerprint
        ),
        latent_kind=encoders.kind,
        text_dtype=config.text_dtype,
        max_tokens=config.max_tokens,
        preprocessing={"views": config.views, "vae_dtype": config.vae_dtype},
        source={
            "kind": config.source.kind,
            "num_records": index.num_source,
            "sha256": index.sha256,
        },
        records_per_shard=config.records_per_shard,
        max_shard_bytes=config.max_shard_bytes,
    )


def begin(sets: Sequence[SetPlan]) -> bool:
    """Prepares the folder of each set; returns whether all are finished already."""
    manifests = []
    for part in sets:
        with folder_lock(part.folder):
            manifests.append(begin_set(part.folder, part.provenance))
    return all(manifests)


def decide_scale(encoders: Encoders, index: Index, sets: Sequence[SetPlan]) -> Quantiser:
    """Returns the conversion to int8, with the scale of an interrupted run or a new one.

    All sets share one scale.
    """
    found: FoundScale | None = None
    for part in sets:
        with folder_lock(part.folder):
            found = read_text_scale(part.folder) or found or measure_scale(encoders, index)
            keep_text_scale(part.folder, found)
    assert found is not None
    return Quantiser(found.scale)


def measure_scale(encoders: Encoders, index: Index) -> FoundScale:
    """Measures the scale of int8 text on a sample of the captions."""
    token_ids = list(index.sample_captions(NUM_SAMPLE).values())
    with report.bar(NUM_PASSES * len(token_ids), "caption", "scale") as bar, single_threaded():
        return find_scale(token_ids, encoders, progress=bar.update)


def encode_missing(
    encoders: Encoders,
    index: Index,
    sets: Sequence[SetPlan],
    processes: ProcessInfo,
    quantise: Quantiser | None,
    num_threads: int,
) -> None:
    """Writes this process's unfinished shards."""
    numbered = enumerate(all_shards(sets))
    own = [pair for number, pair in numbered if processes.owns(number) and not is_done(pair[1])]
    make_bar = report.bar if processes.is_first else report.no_bar
    total = sum(shard.num_records for _, shard in own)
    with (
        single_threaded(),
        EncoderPool(encoders, num_threads=num_threads, quantise=quantise) as pool,
        WriterThread(encoders.kind) as writing,
        make_bar(total, "image", "encode") as bar,
    ):
        meter = report.Meter(bar, total)
        for batch, items in pool.encode(read_batches(own, index, encoders.batch_size)):
            writing.put(batch, items)
            meter.add(
                len(items),
                sum(isinstance(item, Skipped) for item in items),
                num_bytes=writing.num_bytes,
                num_shards=writing.num_shards,
            )
    if quantise and quantise.num_saturated:
        print(
            f"text: {quantise.share_saturated:.1e} of the values encoded in this run were outside "
            "the sample's range and were clipped"
        )


def read_batches(
    shards: Sequence[tuple[SetPlan, ShardPlan]], index: Index, batch_size: int
) -> Iterator[Batch]:
    """Yields the batches of some shards, reading the records of one shard at a time."""
    for part, shard in shards:
        records = index.records(shard.bucket, shard.num_captions, shard.first, shard.last)
        yield from cut_batches(shard, records, part.preprocessing, batch_size)


def finish(
    config: PipelineConfig, encoders: Encoders, index: Index, sets: Sequence[SetPlan], out: Path
) -> dict[str, Manifest]:
    """Merges the shard reports into the manifests once all shards exist, and prints the summary.

    Returns the manifests by bucket. Raises ValueError if too many images are quarantined.
    """
    with folder_lock(sets[0].folder):
        shards = all_shards(sets)
        num_unfinished = sum(not is_done(shard) for _, shard in shards)
        if num_unfinished:
            print(
                f"{num_unfinished} of {len(shards)} shards, of other processes, are unfinished: "
                "the last process to finish writes the manifest; if one has stopped, start it again"
            )
            return {}
        quarantined = {part.bucket: read_quarantined(part) for part in sets}
        no_bucket = dict(index.quarantined)
        merged = {**no_bucket}
        for reasons in quarantined.values():
            merged |= reasons
        require_enough(merged, index.num_source, config, out)
        manifests = {}
        for part in reversed(sets):  # the first set last: finishing it deletes the lock file
            if part.bucket and len(quarantined[part.bucket]) == part.num_records:
                no_bucket |= quarantined[part.bucket]
                shutil.rmtree(part.folder)
            else:
                manifests[part.bucket] = finish_one(encoders, part, index.quarantined)
        manifests = dict(sorted(manifests.items()))
        if sets[0].bucket:
            finish_buckets(out, list(manifests), quarantined=no_bucket)
    print(report.summary(manifests, no_bucket if sets[0].bucket else {}, out))
    return manifests


def finish_one(encoders: Encoders, part: SetPlan, quarantined: Mapping[str, str]) -> Manifest:
    """Writes the manifest of a set, unless it exists."""
    if (part.folder / MANIFEST_NAME).exists():
        return Manifest.load(part.folder)
    empty_text, empty_tokens, _ = encode_captions(encoders, encoders.text.tokenize([""]))
    is_int8 = part.provenance.text_dtype == "int8"
    return finish_set(
        part.folder,
        part.provenance,
        num_shards=len(part.shards),
        quarantined={} if part.bucket else quarantined,
        empty_text=empty_text[0],
        empty_tokens=empty_tokens[0],
        text_scale=read_text_scale(part.folder) if is_int8 else None,
    )


def read_quarantined(part: SetPlan) -> dict[str, str]:
    """Returns the images that a set's shards quarantined, with the reasons."""
    if (part.folder / MANIFEST_NAME).exists():
        return Manifest.load(part.folder).quarantined
    reasons: dict[str, str] = {}
    for shard in part.shards:
        found = read_report(part.folder, shard.index)
        reasons |= found.quarantined if found is not None else {}
    return reasons


def require_enough(
    quarantined: Mapping[str, str], num_source: int, config: PipelineConfig, out: Path
) -> None:
    """Raises ValueError if too many images are quarantined, and writes all reasons to a file."""
    allowed = config.max_quarantined * num_source
    if len(quarantined) <= allowed:
        return
    path = out.with_name(f"{out.name}-quarantined.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(quarantined, indent=1), encoding="utf-8")
    raise ValueError(
        f"{len(quarantined)} of {num_source} images cannot be used, but --max-quarantined "
        f"{config.max_quarantined:g} allows {int(allowed)}: "
        f"{'; '.join(report.first_of(quarantined))} (all in {path})"
    )
