"""Stage one from end to end: writes the missing shards and keeps the finished ones.

A killed run, started again, resumes after its last finished shard and ends with the same bytes as
an uninterrupted run on the same model of device. Every image of the source is written or
quarantined with a reason.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latent_t2i.model.paths import free_bytes, output_root
from latent_t2i.pipeline import cluster, report
from latent_t2i.pipeline.buckets import make_buckets
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import (
    Apply,
    Encoders,
    default_batch_size,
    device_name,
    encode_empty_prompt,
    find_device,
    fixed_kernels,
    num_cores,
    supports_tf32,
)
from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index, build_index
from latent_t2i.pipeline.plan import SetPlan
from latent_t2i.pipeline.processes import Owner, ProcessInfo, find_processes, folder_lock, own_rank
from latent_t2i.pipeline.producers.registry import load_further
from latent_t2i.pipeline.producers.text import load_text_producer
from latent_t2i.pipeline.producers.vae import load_vae_producer
from latent_t2i.pipeline.quantise import decide_scale
from latent_t2i.pipeline.sets import (
    all_shards,
    check_records,
    is_done,
    make_sets,
    require_own_folder,
    require_room,
)
from latent_t2i.pipeline.sources.open import SceneSettings, open_source
from latent_t2i.pipeline.writing import write_missing
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.duplicates import find_duplicates
from latent_t2i.shards.schema import MANIFEST_NAME, Manifest, Provenance
from latent_t2i.shards.writer import (
    begin_set,
    finish_set,
    read_report,
    read_text_scale,
    remove_progress,
)


def build(config: PipelineConfig) -> dict[str, Manifest]:
    """Makes the shards that `config` describes, or the missing ones.

    Returns the manifests by bucket ("" without buckets); an empty dict while other processes have
    unfinished shards, and for a dry run. Raises ValueError for a wrong source, encoder or folder,
    for a folder that another run writes, for a disk that is too small, and if more images are
    quarantined than `max_quarantined` allows.
    """
    processes = find_processes()
    if config.executor == "ray" and processes.num_processes > 1:
        raise ValueError(
            f"--executor ray: expected one process, found WORLD_SIZE {processes.num_processes}: "
            "Ray divides the work"
        )
    is_driver = config.executor == "ray"  # its machine need not have the device
    device = find_device("cpu" if is_driver else config.device, processes.local_rank)
    if config.dry_run:
        print_plan(config, load_encoders(config, device))
        return {}
    # Owned before the encoders are loaded, so that a second run is refused at once.
    with own_rank(output_folder(config), processes.rank) as owner:
        if config.executor == "local":
            return write_shards(config, load_encoders(config, device), processes, owner)
        load = partial(load_encoders, config)
        with cluster.connect(config.ray_address, load, config.device, config.num_threads) as actors:
            # The actors encode; the driver needs the tokenizer and the networks' shapes only.
            encoders = replace(load(torch.device("cpu")), **actors.find_device()._asdict())
            return write_shards(config, encoders, processes, owner, actors)


def make_shards(
    config: PipelineConfig, encoders: Encoders, processes: ProcessInfo
) -> dict[str, Manifest]:
    """Does what `build` does, with loaded encoders and without a dry run."""
    with own_rank(output_folder(config), processes.rank) as owner:
        return write_shards(config, encoders, processes, owner)


def load_encoders(config: PipelineConfig, device: torch.device) -> Encoders:
    """Loads the encoders. Raises ValueError for one that is missing or does not fit."""
    batch_size = config.batch_size or default_batch_size(device, config.image_size_px**2)
    latent = load_vae_producer(
        config.vae,
        config.vae_revision,
        bfloat16=config.vae_dtype == "bfloat16",
        compiled=config.compile,
        batch_size=batch_size,
    )
    if config.image_size_px % latent.downscale:
        raise ValueError(
            f"--image-size-px: {config.image_size_px} is not a multiple of {latent.downscale}, the "
            f"downscaling factor of the VAE {config.vae!r}"
        )
    encoders = Encoders(
        vae=latent,
        text=load_text_producer(
            config.text_encoder,
            config.text_encoder_revision,
            hidden_state=config.text_hidden_state,
            max_tokens=config.max_tokens,
        ),
        further=load_further(config.producers),
        device=device,
        views=config.views,
        batch_size=batch_size,
        device_name=device_name(device),
        tf32=config.tf32 and supports_tf32(device),
    )
    for producer in (*encoders.producers("view"), *encoders.producers("caption")):
        producer.network.to(device)
    if device.type == "cuda":
        latent.network.to(memory_format=torch.channels_last)
    return encoders


def write_shards(
    config: PipelineConfig,
    encoders: Encoders,
    processes: ProcessInfo,
    owner: Owner,
    actors: cluster.Cluster | None = None,
) -> dict[str, Manifest]:
    """Lists the source and writes this process's unfinished shards; the last process merges.

    With `actors`, these encode and write.
    """
    out = output_folder(config)
    apply: Apply = actors.apply if actors else lambda function, *rest: function(encoders, *rest)
    with (
        closing(list_source(config, encoders, out, is_first=processes.is_first)) as index,
        fixed_kernels(tf32=encoders.tf32),
    ):
        sets = plan_sets(config, encoders, index, out)
        require_enough(config, index, out, index.quarantined | index.missing)
        if not config.force:
            require_room(sets, out)
        # One lock for both steps, or two commands could both find the folder free.
        with folder_lock(out):
            require_own_folder(sets, out)
            in_use = not owner.is_alone()
            manifests = [begin_set(part.folder, part.provenance, in_use=in_use) for part in sets]
        if all(manifests):
            print(f"{report.show(out)} is finished already: nothing to do")
        else:
            if processes.is_first:
                print(report.plan_lines(index, sets, out, free_bytes(out)))
            quantise = None
            if config.text_dtype == "int8":
                with folder_lock(out):
                    quantise = decide_scale(apply, index, [part.folder for part in sets])
            make_bar = report.bar if processes.is_first else report.no_bar
            own = [pair for n, pair in enumerate(all_shards(sets)) if processes.owns(n)]
            if actors:
                cluster.write_missing(own, index, actors, quantise=quantise, make_bar=make_bar)
            else:
                write_missing(
                    own,
                    index,
                    encoders,
                    quantise=quantise,
                    num_threads=config.num_threads or max(num_cores() // processes.num_local, 1),
                    make_bar=make_bar,
                )
        return finish(config, apply, index, sets, processes)


def print_plan(config: PipelineConfig, encoders: Encoders) -> None:
    """Prints the plan and, if the run would be refused, the reasons."""
    out = output_folder(config)
    with closing(list_source(config, encoders, out, is_first=True)) as index:
        sets = plan_sets(config, encoders, index, out)
        print(report.plan_lines(index, sets, out, free_bytes(out)))
        checks: list[Callable[[], None]] = [
            lambda: require_enough(config, index, None, index.quarantined | index.missing),
            lambda: require_own_folder(sets, out),
        ]
        if not config.force:
            checks.append(lambda: require_room(sets, out))
        for check in checks:
            try:
                check()
            except ValueError as error:
                print(f"this run would be refused: {error}")


def plan_sets(config: PipelineConfig, encoders: Encoders, index: Index, out: Path) -> list[SetPlan]:
    """Divides the listed records into sets and shards."""
    size_px = (config.image_size_px, config.image_size_px)
    preprocessing = Preprocessing(
        size_px=size_px,
        crop=config.crop,
        crops=config.views.crops,
        seed=config.seed,
        min_size_px=config.min_image_size_px,
        fast_jpeg=config.fast_jpeg,
    )
    return make_sets(
        index,
        out,
        preprocessing,
        make_provenance(config, encoders, index),
        latent_shape=encoders.latent_shape,
        text_shape=encoders.text_shape,
        fields=encoders.further_fields,
    )


def output_folder(config: PipelineConfig) -> Path:
    """Returns the folder of the shards."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return output_root() / "shards" / "data" / config.name / config.split


def list_source(config: PipelineConfig, encoders: Encoders, out: Path, *, is_first: bool) -> Index:
    """Lists the records; scenes are drawn first, by one process."""
    drawn = out.with_name(f"{out.name}-source")  # outside the set, which holds shards only
    scenes = SceneSettings(drawn, config.split, config.image_size_px, config.seed)
    buckets: Sequence[tuple[int, int]] = ()
    if config.buckets:
        multiple = math.lcm(encoders.vae.downscale, config.bucket_multiple_px)
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
        index = build_index(open_source(config.source, config.split, scenes), check, bar.update)
    if not index.num_source:
        source = config.source
        name = "captions" if source.kind == "coco" else "images"
        raise ValueError(f"--source.{name}: {getattr(source, name)!r} contains no images")
    return index


def make_provenance(config: PipelineConfig, encoders: Encoders, index: Index) -> Provenance:
    """Returns what determines the content of the shards, except the bucket and its size."""
    # Batch size and processes are not included: they change at most the last float16 bit. So does
    # the device, but a set of two kinds of devices could not be written again with the same bytes.
    tf32 = {"float32_products": "tf32"} if encoders.tf32 else {}  # more than the last bit
    bucket_settings: dict[str, Any] = {}
    if config.buckets:
        bucket_settings = {
            "image_size_px": config.image_size_px,
            "max_aspect": f"{config.max_aspect:g}",
            "bucket_multiple_px": config.bucket_multiple_px,
        }
    return Provenance(
        vae=encoders.vae.identity,
        text_encoder=encoders.text.identity,
        tokenizer=encoders.text.tokenizer,
        latent_kind=encoders.vae.kind,
        text_dtype=config.text_dtype,
        max_tokens=config.max_tokens,
        preprocessing={
            "views": config.views.num,
            "vae_dtype": config.vae_dtype,
            "device": encoders.device_name,
        }
        | tf32
        | bucket_settings,
        source={
            "kind": config.source.kind,
            "num_records": index.num_source,
            "sha256": index.sha256,
        },
        records_per_shard=config.records_per_shard,
        max_shard_bytes=config.max_shard_bytes,
    )


def finish(
    config: PipelineConfig,
    apply: Apply,
    index: Index,
    sets: Sequence[SetPlan],
    processes: ProcessInfo,
) -> dict[str, Manifest]:
    """Merges the shard reports into the manifests once all shards exist, and prints the summary.

    Returns the manifests by bucket. Raises ValueError if too many images are quarantined, or if a
    shard of this process is missing.
    """
    out = output_folder(config)
    with folder_lock(out):
        shards = all_shards(sets)
        unfinished = [n for n, (_, shard) in enumerate(shards) if not is_done(shard)]
        if any(map(processes.owns, unfinished)):
            raise ValueError(
                f"{out}: shards that this process wrote have been deleted or changed since: start "
                "the same command again"
            )
        if unfinished:
            print(
                f"{len(unfinished)} of {len(shards)} shards, of other processes, are unfinished: "
                "the last process to finish writes the manifest; if one has stopped, start it again"
            )
            return {}
        quarantined = {part.bucket: read_quarantined(part) for part in sets}
        no_bucket = dict(index.quarantined)
        merged = {**no_bucket}
        for reasons in quarantined.values():
            merged |= reasons
        require_enough(config, index, out, merged)
        manifests = {}
        for part in sets:
            # A set has at least one record, so an empty bucket is deleted.
            if part.bucket and len(quarantined[part.bucket]) == part.num_records:
                no_bucket |= quarantined[part.bucket]
                shutil.rmtree(part.folder)
            else:
                manifests[part.bucket] = finish_one(apply, part, index.quarantined)
        manifests = dict(sorted(manifests.items()))
        if sets[0].bucket:
            finish_buckets(out, list(manifests), quarantined=no_bucket)
            remove_progress(out)
    duplicates = find_duplicates(out)
    if duplicates is not None and duplicates.num:
        for copy, original in duplicates.examples:
            print(f"duplicate   {copy} = {original}")
        print(f"duplicates  {duplicates.count()}")
    print(report.summary(manifests, index.by_file_name(merged), out))
    return manifests


def finish_one(apply: Apply, part: SetPlan, quarantined: Mapping[str, str]) -> Manifest:
    """Writes the manifest of a set, unless it exists."""
    # Checks once more that the shards are of these settings: some file systems do not lock.
    if manifest := begin_set(part.folder, part.provenance, in_use=True):
        return manifest
    empty_text, empty_tokens = apply(encode_empty_prompt)
    is_int8 = part.provenance.text_dtype == "int8"
    return finish_set(
        part.folder,
        part.provenance,
        num_shards=len(part.shards),
        quarantined={} if part.bucket else quarantined,
        empty_text=empty_text,
        empty_tokens=empty_tokens,
        text_scale=read_text_scale(part.folder) if is_int8 else None,
    )


def read_quarantined(part: SetPlan) -> dict[str, str]:
    """Returns the images that a set's shards quarantined, with the reasons."""
    if (part.folder / MANIFEST_NAME).exists():
        return Manifest.load(part.folder).read_quarantined()
    reasons: dict[str, str] = {}
    for shard in part.shards:
        found = read_report(part.folder, shard.index)
        reasons |= found.quarantined if found is not None else {}
    return reasons


def require_enough(
    config: PipelineConfig, index: Index, out: Path | None, reasons: Mapping[str, str]
) -> None:
    """Raises ValueError if too many images are quarantined; writes all reasons beside `out`."""
    allowed = int(config.max_quarantined * index.num_source)
    path = out and out.with_name(f"{out.name}-quarantined.json")
    if len(reasons) <= allowed:
        if path is not None:
            path.unlink(missing_ok=True)  # the reasons of an earlier, refused run
        return
    named = index.by_file_name(reasons)
    text = (
        f"{len(named)} of {index.num_source} images cannot be used, but --max-quarantined "
        f"{config.max_quarantined:g} allows {allowed}: {'; '.join(report.first_of(named))}"
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(named, indent=1), encoding="utf-8")
        text += f" (all in {path})"
    raise ValueError(text)
