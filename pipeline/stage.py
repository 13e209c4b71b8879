"""Stage one from end to end: writes the missing shards and keeps the finished ones.

A killed run, started again, resumes after its last finished shard and ends with the same bytes as
an uninterrupted run on the same model of device. Every image of the source is written or
quarantined with a reason.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latent_t2i.model.build_tools import require_build_tools
from latent_t2i.model.paths import format_bytes, free_bytes, output_root
from latent_t2i.pipeline import cluster, growth, report
from latent_t2i.pipeline.buckets import make_buckets
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import (
    Apply,
    Encoders,
    default_batch_size,
    device_name,
    find_device,
    fixed_kernels,
    num_cores,
    supports_tf32,
)
from latent_t2i.pipeline.finishing import all_done, finish, require_enough, show_set
from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index, build_index
from latent_t2i.pipeline.plan import SetPlan
from latent_t2i.pipeline.processes import Owner, ProcessInfo, find_processes, folder_lock, own_rank
from latent_t2i.pipeline.producers.registry import load_further
from latent_t2i.pipeline.producers.text import load_text_producer
from latent_t2i.pipeline.producers.vae import load_vae_producer
from latent_t2i.pipeline.quantise import Quantiser, decide_scale
from latent_t2i.pipeline.sets import (
    all_shards,
    check_records,
    make_sets,
    require_own_folder,
    require_room,
)
from latent_t2i.pipeline.sources.open import SceneSettings, open_source
from latent_t2i.pipeline.upload import (
    NUM_LOCAL_SHARDS,
    Mirror,
    is_url,
    naming_url,
    open_mirror,
    remove_if_empty,
    work_folder,
)
from latent_t2i.pipeline.writing import write_missing
from latent_t2i.shards.extend import commit, finish_staging, staging_folder
from latent_t2i.shards.schema import MANIFEST_NAME, Manifest, Provenance
from latent_t2i.shards.writer import begin_set, remove_progress


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
        print_plan(config, load_encoders(config, device), processes)
        return {}
    # Owned before the encoders are loaded, so that a second run is refused at once.
    with own_output(config, processes) as (owner, mirror):
        if config.executor == "local":
            return write_shards(config, load_encoders(config, device), processes, owner, mirror)
        load = partial(load_encoders, config)
        with cluster.connect(config.ray_address, load, config.device, config.num_threads) as actors:
            # The actors encode; the driver needs the tokenizer and the networks' shapes only.
            own = load_encoders(replace(config, compile=False), device)
            encoders = replace(own, **actors.find_device()._asdict())
            return write_shards(config, encoders, processes, owner, actors=actors)


def make_shards(
    config: PipelineConfig, encoders: Encoders, processes: ProcessInfo
) -> dict[str, Manifest]:
    """Does what `build` does, with loaded encoders and without a dry run."""
    with own_output(config, processes) as (owner, mirror):
        return write_shards(config, encoders, processes, owner, mirror)


@contextmanager
def own_output(
    config: PipelineConfig, processes: ProcessInfo
) -> Iterator[tuple[Owner, Mirror | None]]:
    """Makes this process the owner of its rank; if `out` is a URL, also yields its mirror."""
    out = output_folder(config, processes.rank)
    if config.out is None or not is_url(config.out):
        with own_rank(out, processes.rank) as owner:
            yield owner, None
        return
    with (
        naming_url(out, config.out),
        own_rank(out, processes.rank) as owner,
        open_mirror(config.out, out, processes) as mirror,
    ):
        yield owner, mirror
    remove_if_empty(out)


def load_encoders(config: PipelineConfig, device: torch.device) -> Encoders:
    """Loads the encoders. Raises ValueError for one that is missing, or cannot be compiled here."""
    if config.compile:
        require_build_tools(device.type)
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
    mirror: Mirror | None = None,
    actors: cluster.Cluster | None = None,
) -> dict[str, Manifest]:
    """Lists the source and writes this process's unfinished shards; the last process merges.

    With `actors`, these encode and write.
    """
    out = output_folder(config, processes.rank)
    shown = mirror.url if mirror else report.show(out)
    with (
        closing(list_source(config, encoders, out, is_first=processes.is_first)) as index,
        fixed_kernels(tf32=encoders.tf32),
    ):
        sets = plan_sets(config, encoders, index, out)
        if mirror is None:
            grown = grow_set(config, encoders, index, sets[0], processes, owner)
            if grown is not None:
                return grown
        limit = config.max_quarantined
        require_enough(index, out, index.quarantined | index.missing, max_quarantined=limit)
        if not config.force:
            require_room(sets, out, mirror)
        # One lock for both steps, or two commands could both find the folder free.
        with folder_lock(out):
            require_own_folder(sets, out)
            in_use = not owner.is_alone()
            manifests = [begin_set(part.folder, part.provenance, in_use=in_use) for part in sets]
            if mirror:
                mirror.begin(sets)
        if all(manifests):
            print(f"{shown} is finished already: nothing to do")
        else:
            if processes.is_first:
                print(report.plan_lines(index, sets, shown, room_line(out, mirror)))
            encode_sets(config, encoders, index, sets, processes, mirror, actors)
        apply = actors.apply if actors else partial(apply_here, encoders)
        return finish(out, apply, index, sets, processes, mirror, max_quarantined=limit)


def apply_here(encoders: Encoders, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(encoders, *arguments)`, as the actors of a cluster do."""
    return function(encoders, *arguments)


def find_quantiser(
    apply: Apply, index: Index, sets: Sequence[SetPlan], mirror: Mirror | None
) -> Quantiser:
    """Returns the conversion to int8, which is the same for all sets and processes."""
    if mirror:
        mirror.wait_for_scale(sets)
    quantise = decide_scale(apply, index, [part.folder for part in sets])
    if mirror:
        mirror.put_scale(sets)
    return quantise


def room_line(out: Path, mirror: Mirror | None) -> str:
    """Returns the free space, for the plan."""
    disk = f"the disk of {out}, for {NUM_LOCAL_SHARDS} shards" if mirror else "this disk"
    return f"free on {disk} {format_bytes(free_bytes(out))}"


def encode_sets(
    config: PipelineConfig,
    encoders: Encoders,
    index: Index,
    sets: Sequence[SetPlan],
    processes: ProcessInfo,
    mirror: Mirror | None = None,
    actors: cluster.Cluster | None = None,
) -> None:
    """Writes this process's unfinished shards, and prints how many images were encoded."""
    quantise = None
    if config.text_dtype == "int8":
        apply = actors.apply if actors else partial(apply_here, encoders)
        with folder_lock(output_folder(config, processes.rank)):
            quantise = find_quantiser(apply, index, sets, mirror)
    own = [pair for n, pair in enumerate(all_shards(sets)) if processes.owns(n)]
    make_bar = report.bar if processes.is_first else report.no_bar
    if actors:
        num_encoded = cluster.write_missing(
            own, index, actors, quantise=quantise, make_bar=make_bar
        )
    else:
        num_encoded = write_missing(
            own,
            index,
            encoders,
            quantise=quantise,
            num_threads=num_threads(config, processes),
            make_bar=make_bar,
            mirror=mirror,
        )
    print(f"encoded     {num_encoded} images in this run")


def num_threads(config: PipelineConfig, processes: ProcessInfo) -> int:
    """Returns the number of threads of this process."""
    return config.num_threads or max(num_cores() // processes.num_local, 1)


def grow_set(
    config: PipelineConfig,
    encoders: Encoders,
    index: Index,
    part: SetPlan,
    processes: ProcessInfo,
    owner: Owner,
) -> dict[str, Manifest] | None:
    """Adds to a finished set what `--append` and `--retry` ask for; `part` is its plan.

    Returns None if the set is unfinished, or finished and equal to the source. Raises ValueError if
    it differs from the source and the command does not say what to do.
    """
    out, flags = output_folder(config, processes.rank), (config.append, config.retry)
    while True:
        with folder_lock(out):
            commit(out)  # of a run that was killed during it
            if owner.is_alone():
                growth.remove_outdated(out)
            stored = growth.read_plan(staging_folder(out))
        if stored is not None and not any(flags):
            print(f"{report.show(out)}: continue its unfinished extension with {stored.options}")
        manifest = growth.find_finished(part, extend=any(flags))
        if manifest is None or not (any(flags) or growth.may_differ(index, out, manifest)):
            return None
        make_bar = report.bar if processes.is_first else report.no_bar
        with (
            ThreadPoolExecutor(num_threads(config, processes)) as pool,
            make_bar(manifest.num_records, "image", "compare") as bar,
        ):
            grown = growth.compare(index, part, manifest, pool=pool, progress=bar.update)
            if not any(flags):
                growth.require_unchanged(index, grown)
            with folder_lock(out):
                if Manifest.load(out).sha256 != manifest.sha256:
                    continue  # another process has extended the set meanwhile
                work = plan_growth(config, encoders, index, grown, pool, owner)
        break
    if work is None:
        is_finished = f"{report.show(out)} is finished already"
        nothing = growth.describe_nothing(grown, *flags) if any(flags) else is_finished
        return show_set(index, manifest, nothing)
    if not config.force:
        require_room([work], out)
    if processes.is_first:
        print(report.growth_lines(work, growth.describe(grown, *flags)))
    try:
        encode_sets(config, encoders, index, [work], processes)
        return finish_growth(config, index, grown, work, processes)
    except (FileNotFoundError, ValueError):
        # Another process of this rank, on another host, may have finished the same extension and
        # deleted its folder.
        if not (out / MANIFEST_NAME).exists() or Manifest.load(out).sha256 == manifest.sha256:
            raise
    return show_set(index, Manifest.load(out))


def plan_growth(
    config: PipelineConfig,
    encoders: Encoders,
    index: Index,
    grown: growth.Growth,
    pool: Executor,
    owner: Owner,
) -> SetPlan | None:
    """Plans what `--append` and `--retry` add; without them, or with nothing to add, returns None.

    Then what a process that was killed at its end left is removed. Call it under the set's lock.
    """
    part, in_use = grown.part, not owner.is_alone()
    work = None
    if config.append or config.retry:
        work = growth.begin_growth(
            index,
            grown,
            config.append,
            config.retry,
            latent_shape=encoders.latent_shape(part.preprocessing.size_px),
            text_shape=encoders.text_shape,
            pool=pool,
            in_use=in_use,
        )
    if work is None:
        same_source = replace(part.provenance, source=grown.manifest.source)
        begin_set(part.folder, same_source, in_use=in_use)
    return work


def finish_growth(
    config: PipelineConfig,
    index: Index,
    grown: growth.Growth,
    work: SetPlan,
    processes: ProcessInfo,
) -> dict[str, Manifest]:
    """Moves the new shards into the set once all of them exist, and prints the summary.

    Returns and raises like `finish`.
    """
    out = output_folder(config, processes.rank)
    with folder_lock(out):
        if not work.folder.exists():  # another process was the last
            manifest = Manifest.load(out)
        elif not all_done(work.shards, out, processes):
            return {}
        else:
            manifest = growth.stage_growth(index, grown, work, config.append, config.retry)
            reasons = manifest.read_quarantined()
            require_enough(index, out, reasons, max_quarantined=config.max_quarantined)
            finish_staging(out, manifest)
            commit(out)
            remove_progress(out)
            manifest = Manifest.load(out)
    return show_set(index, manifest)


def print_plan(config: PipelineConfig, encoders: Encoders, processes: ProcessInfo) -> None:
    """Prints the plan and, if the run would be refused, the reasons."""
    out = output_folder(config, processes.rank)
    if config.out is None or not is_url(config.out):
        print_plan_of(config, encoders, out, None)
        return
    with (
        tempfile.TemporaryDirectory(prefix="shards-") as temporary,
        naming_url(Path(temporary) / "set", config.out),
        open_mirror(config.out, Path(temporary) / "set", processes) as mirror,
    ):
        print_plan_of(config, encoders, Path(temporary) / "set", mirror)


def print_plan_of(
    config: PipelineConfig, encoders: Encoders, out: Path, mirror: Mirror | None
) -> None:
    """Does what `print_plan` does, for the output folder or that of a mirror."""
    shown = mirror.url if mirror else report.show(out)
    with closing(list_source(config, encoders, out, is_first=True)) as index:
        sets = plan_sets(config, encoders, index, out)
        if mirror is None:
            is_grown = config.append or config.retry
            manifest = growth.find_finished(sets[0], extend=is_grown)
            if manifest is not None:
                print_changes(config, index, sets[0], manifest)
                return
        print(report.plan_lines(index, sets, shown, room_line(out, mirror)))
        checks: list[Callable[[], None]] = [
            lambda: require_enough(
                index,
                None,
                index.quarantined | index.missing,
                max_quarantined=config.max_quarantined,
            ),
            lambda: require_own_folder(sets, out),
        ]
        if not config.force:
            checks.append(lambda: require_room(sets, out, mirror))
        if mirror:
            checks += [partial(mirror.require_few_shards, part) for part in sets]
        for check in checks:
            try:
                check()
            except ValueError as error:
                print(f"this run would be refused: {error}")


def print_changes(config: PipelineConfig, index: Index, part: SetPlan, manifest: Manifest) -> None:
    """Prints how the source differs from a finished set, and what this run would do about it."""
    print(f"{report.show(part.folder)} is finished: {manifest.num_records} images")
    with (
        ThreadPoolExecutor(num_cores()) as pool,
        report.bar(manifest.num_records, "image", "compare") as bar,
    ):
        grown = growth.compare(index, part, manifest, pool=pool, progress=bar.update)
    for line in growth.describe(grown, config.append, config.retry):
        print(line)


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


def output_folder(config: PipelineConfig, rank: int) -> Path:
    """Returns the folder of the shards; if `out` is a URL, the working folder of this rank."""
    if config.out is not None and is_url(config.out):
        return work_folder(config.out, config.work_dir, rank)
    if config.out is not None:
        return Path(config.out.removeprefix("file://")).expanduser()
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
