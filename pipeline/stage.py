"""Stage one from end to end: what is missing is encoded, what is finished is kept.

Started again with the same command, it goes on after the last finished shard and ends with the
same bytes as a run that was never stopped; when all is done it says so and does nothing. Several
processes share the shards by their numbers, and the bytes are those of one. Every image that came
in is written or quarantined with a reason; the last line printed adds them up.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from latent_t2i.model.paths import free_bytes, output_root
from latent_t2i.pipeline import report
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import (
    Encoders,
    find_device,
    load_encoders,
    num_cores,
    single_threaded,
)
from latent_t2i.pipeline.finish import finish, require_enough
from latent_t2i.pipeline.index import Index, build_index
from latent_t2i.pipeline.plan import SetPlan, Target
from latent_t2i.pipeline.processes import ProcessInfo, find_processes, folder_lock
from latent_t2i.pipeline.provenance import make_provenance
from latent_t2i.pipeline.quantise import NUM_PASSES, NUM_SAMPLE, Quantiser, find_scale
from latent_t2i.pipeline.sets import all_targets, examiner, is_done, make_sets, require_room
from latent_t2i.pipeline.sources.open import SceneSettings, open_source
from latent_t2i.pipeline.workers import Batch, EncoderPool, Skipped, cut_batches
from latent_t2i.pipeline.writing import WriterThread
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.writer import (
    FoundScale,
    begin_set,
    keep_text_scale,
    read_text_scale,
)


def build(config: PipelineConfig) -> dict[str, Manifest]:
    """Makes the shards that `config` describes, or what is missing of them.

    Returns the manifests by bucket (one of the name "" where there are none), and nothing while
    other processes are still at work, or for a dry run. Raises ValueError for a source, an encoder
    or a folder that does not fit, for a disk too small, and, at the end, if more images had to be
    left out than `max_quarantined` allows.
    """
    processes = find_processes()
    device = find_device(config.device, processes.local_rank)
    return make_shards(config, load_encoders(config, device), processes)


def make_shards(
    config: PipelineConfig, encoders: Encoders, processes: ProcessInfo
) -> dict[str, Manifest]:
    """Does what `build` does, with encoders that are loaded."""
    out = output_folder(config)
    with closing(list_source(config, encoders, out, processes)) as index:
        sets = make_sets(config, encoders, index, out)
        if config.dry_run:
            print(report.plan_lines(index, sets, out, free_bytes(out)))
            return {}
        require_enough(index.quarantined | index.missing, index, config, out)
        if not config.force:
            require_room(sets, out)
        if begin(config, encoders, index, sets):
            print(f"{report.show(out)} is finished already: nothing to do")
        else:
            if processes.is_first:
                print(report.plan_lines(index, sets, out, free_bytes(out)))
            quantise = decide_scale(config, encoders, index, sets, processes)
            encode_missing(config, encoders, index, sets, processes, quantise)
        return finish(config, encoders, index, sets, out)


def output_folder(config: PipelineConfig) -> Path:
    """Returns where the shards go."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return output_root() / "shards" / "data" / config.name / config.split


def list_source(
    config: PipelineConfig, encoders: Encoders, out: Path, processes: ProcessInfo
) -> Index:
    """Lists the records; scenes are drawn first, by one process."""
    is_drawn = config.source.kind == "scenes"
    drawn = out.with_name(f"{out.name}-source")
    scenes = SceneSettings(drawn, config.split, config.image_size_px, config.seed)
    make_bar = report.bar if processes.is_first else report.no_bar
    with (
        folder_lock(drawn) if is_drawn else nullcontext(),
        examiner(config, encoders) as examine,
        make_bar(None, "image", "list") as bar,
    ):
        return build_index(open_source(config.source, scenes), examine, bar.update)


def begin(
    config: PipelineConfig, encoders: Encoders, index: Index, sets: Sequence[SetPlan]
) -> bool:
    """Prepares the folder of each set; returns whether all are finished already."""
    manifests = []
    for part in sets:
        provenance = make_provenance(config, encoders, index, part)
        with folder_lock(part.folder):
            manifests.append(begin_set(part.folder, provenance))
    return all(manifests)


def decide_scale(
    config: PipelineConfig,
    encoders: Encoders,
    index: Index,
    sets: Sequence[SetPlan],
    processes: ProcessInfo,
) -> Quantiser | None:
    """Returns what makes text int8, if it is to be: with the scale of the run which is gone on
    with, or a fresh one. All sets have the same.
    """
    if config.text_dtype != "int8":
        return None
    found: FoundScale | None = None
    for part in sets:
        with folder_lock(part.folder):
            found = (
                read_text_scale(part.folder) or found or measure_scale(encoders, index, processes)
            )
            keep_text_scale(part.folder, found)
    assert found is not None
    return Quantiser(found.scale)


def measure_scale(encoders: Encoders, index: Index, processes: ProcessInfo) -> FoundScale:
    """Finds the scale of int8 text on a sample of the captions."""
    captions = index.captions(NUM_SAMPLE)
    with report.bar(NUM_PASSES * len(captions), "caption", "scale") as bar, single_threaded():
        return find_scale(captions, encoders, progress=bar.update)


def encode_missing(
    config: PipelineConfig,
    encoders: Encoders,
    index: Index,
    sets: Sequence[SetPlan],
    processes: ProcessInfo,
    quantise: Quantiser | None,
) -> None:
    """Writes this process's shards that are not finished."""
    todo = [target for target in mine(sets, processes) if not is_done(target)]
    num_threads = config.num_threads or max(num_cores() // processes.num_local, 1)
    make_bar = report.bar if processes.is_first else report.no_bar
    total = sum(target.plan.num_records for target in todo)
    hows = {part.folder: part.how for part in sets}

    def batches() -> Iterator[Batch]:
        for target in todo:
            plan = target.plan
            records = index.records(plan.bucket, plan.num_captions, plan.first, plan.last)
            yield from cut_batches(target, records, hows[target.folder], config.batch_size)

    with (
        single_threaded(),
        EncoderPool(encoders, num_threads=num_threads, quantise=quantise) as pool,
        WriterThread(encoders.kind) as writing,
        make_bar(total, "image", "encode") as bar,
    ):
        meter = report.Meter(bar, total)
        for outcome in pool.outcomes(batches()):
            writing.put(outcome)
            num_skipped = sum(isinstance(item, Skipped) for item in outcome.items)
            meter.add(
                len(outcome.items),
                num_skipped,
                num_bytes=writing.num_bytes,
                num_shards=writing.num_shards,
            )
    if quantise and quantise.num_saturated:
        print(
            f"text: {quantise.share_saturated:.1e} of this run's values were beyond the sample's "
            "range and cut to it"
        )


def mine(sets: Sequence[SetPlan], processes: ProcessInfo) -> list[Target]:
    """Returns the shards that are this process's, by their number over all sets."""
    return [target for number, target in enumerate(all_targets(sets)) if processes.has(number)]
