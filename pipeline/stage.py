"""Stage one from end to end: what is missing is encoded, what is finished is kept.

Started again with the same command, it goes on after the last finished shard and ends with the
same bytes as a run that was never stopped; when all is done it says so and does nothing. Every
image that came in is written or quarantined with a reason; the last line printed adds them up.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.paths import output_root
from pipeline import sources
from pipeline.config import PipelineConfig
from pipeline.encode import (
    Encoders,
    encode_captions,
    examples,
    load_encoders,
)
from pipeline.images import missing_files
from pipeline.plan import Plan, ShardPlan, make_plan
from pipeline.provenance import make_provenance
from pipeline.quantise import NUM_PASSES, Quantiser, find_scale, sample_captions
from pipeline.record import Record
from shards.schema import PROGRESS_DIR, Manifest, Provenance
from shards.writer import (
    FoundScale,
    ShardWriter,
    begin_set,
    finish_set,
    keep_text_scale,
    read_report,
    read_text_scale,
)

NUM_LISTED = 10
"""How many of the images left out an error names."""


def build(config: PipelineConfig) -> Manifest:
    """Makes the shards that `config` describes, or what is missing of them.

    Raises ValueError for a source, an encoder or a folder that does not fit, and, at the end, if
    more images had to be left out than `max_quarantined` allows.
    """
    out = output_folder(config)
    records = sources.records(config, out)
    encoders = load_encoders(config)
    plan = make_plan(
        records,
        latent_shape=encoders.latent_shape,
        text_shape=encoders.text_shape,
        text_dtype=config.text_dtype,
        records_per_shard=config.records_per_shard,
        max_shard_bytes=config.max_shard_bytes,
    )
    provenance = make_provenance(config, encoders, records)
    manifest = begin_set(out, provenance)
    if manifest is not None:
        print(f"{_show(out)} is finished already: nothing to do")
    else:
        absent = {record.key: "missing file" for record in missing_files(records)}
        _require_enough(plan.quarantined | absent, plan, config, out)
        print(f"{plan.num_source} images with {plan.num_captions} captions to {_show(out)}")
        found = decide_scale(records, encoders, out) if config.text_dtype == "int8" else None
        quantise = Quantiser(found.scale) if found else None
        left_out = encode_missing(plan, encoders, out, quantise)
        _require_enough(plan.quarantined | left_out, plan, config, out)
        manifest = _finish(plan, encoders, provenance, out, found)
    print(summary(manifest, out))
    return manifest


def output_folder(config: PipelineConfig) -> Path:
    """Returns where the shards go."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return output_root() / "shards" / "data" / config.name / config.split


def decide_scale(records: Sequence[Record], encoders: Encoders, out: Path) -> FoundScale:
    """Returns the scale of int8 text: that of the run which is gone on with, or a fresh one."""
    found = read_text_scale(out)
    if found is None:
        captions = sample_captions(records)
        with _bar(NUM_PASSES * len(captions), "caption", "scale") as bar:
            found = find_scale(captions, encoders, progress=bar.update)
        keep_text_scale(out, found)
    return found


def encode_missing(
    plan: Plan, encoders: Encoders, out: Path, quantise: Quantiser | None
) -> dict[str, str]:
    """Writes the shards that are not finished; returns what all of them left out, and why."""
    left_out: dict[str, str] = {}
    total = sum(len(shard.records) for shard in plan.shards)
    with ThreadPoolExecutor(os.cpu_count()) as pool, _bar(total, "image", "encode") as bar:
        for shard in plan.shards:
            report = read_report(out, shard.index)
            if report is not None:
                bar.initial += len(shard.records)  # so that the rate is that of this run
                bar.update(len(shard.records))
            else:
                write_shard(shard, encoders, pool, out, quantise, progress=bar.update)
                report = read_report(out, shard.index)
                assert report is not None
            left_out |= report.quarantined
            bar.set_postfix(quarantined=len(left_out))
    if quantise and quantise.num_saturated:
        print(
            f"text: {quantise.share_saturated:.1e} of this run's values were beyond the sample's "
            "range and cut to it"
        )
    return left_out


def write_shard(
    plan: ShardPlan,
    encoders: Encoders,
    pool: Executor,
    out: Path,
    quantise: Quantiser | None,
    *,
    progress: Callable[[int], object],
) -> None:
    """Encodes and writes one shard; `progress` is told of each record, written or left out."""
    with ShardWriter(out, plan.index, plan.layout, "moments") as shard:

        def quarantine(key: str, reason: str) -> None:
            shard.quarantine(key, reason)
            progress(1)

        for example in examples(
            plan.records, encoders, pool, quarantine=quarantine, quantise=quantise
        ):
            shard.write(example)
            progress(1)


def _finish(
    plan: Plan, encoders: Encoders, provenance: Provenance, out: Path, found: FoundScale | None
) -> Manifest:
    text, tokens, _ = encode_captions(encoders, [""])
    return finish_set(
        out,
        provenance,
        num_shards=len(plan.shards),
        quarantined=plan.quarantined,
        empty_text=text[0],
        empty_tokens=tokens[0],
        text_scale=found,
    )


def _bar(total: int, unit: str, task: str) -> Any:
    interval_s = 0.2 if sys.stderr.isatty() else 30.0  # a log needs fewer lines than a terminal
    return tqdm(total=total, unit=unit, desc=task, mininterval=interval_s, ncols=80)


def summary(manifest: Manifest, out: Path) -> str:
    """Says what there is, in lines of 80 columns; the last accounts for each image."""
    size_mb = sum(shard.bytes for shard in manifest.shards) / 1e6
    latent = "x".join(map(str, manifest.latent_shape))
    views = " of 2 views" if manifest.num_views == 2 else ""
    cut = manifest.num_truncated
    lines = {
        "shards": f"{len(manifest.shards)}, {size_mb:.1f} MB, in {_show(out)}",
        "captions": f"{manifest.num_captions}, {cut} cut at {manifest.max_tokens} tokens",
        "text": _describe_text(manifest),
        "latents": f"{manifest.latent_kind} {latent}{views}, suggested scaling factor "
        f"{manifest.latent_statistics.scaling_factor:.4f}",
        "images": f"{manifest.num_source} in = {manifest.num_records} written"
        f" + {len(manifest.quarantined)} quarantined",
    }
    left_out = [f"left out    {line}" for line in _list(manifest.quarantined)]
    return "\n".join([*left_out, *(f"{name:<12}{text}" for name, text in lines.items())])


def _describe_text(manifest: Manifest) -> str:
    text = f"{manifest.text_dtype} {manifest.max_tokens}x{manifest.text_width}"
    scale = manifest.text_scale
    if scale is None:
        return text
    return f"{text}, relative error {scale.relative_error:.2%} on {scale.num_captions} captions"


def _require_enough(
    left_out: Mapping[str, str], plan: Plan, config: PipelineConfig, out: Path
) -> None:
    """Raises ValueError if too many images are left out; all reasons are then in a file."""
    allowed = config.max_quarantined * plan.num_source
    if len(left_out) <= allowed:
        return
    path = out / PROGRESS_DIR / "quarantined.json"
    path.write_text(json.dumps(left_out, indent=1), encoding="utf-8")
    raise ValueError(
        f"{len(left_out)} of {plan.num_source} images have to be left out, --max-quarantined "
        f"{config.max_quarantined:g} allows {int(allowed)}: {'; '.join(_list(left_out))} "
        f"(all in {path})"
    )


def _list(left_out: Mapping[str, str]) -> list[str]:
    """Returns the first images left out, each with its reason."""
    lines = [f"{key}: {reason}" for key, reason in list(left_out.items())[:NUM_LISTED]]
    more = len(left_out) - len(lines)
    return lines + ([f"and {more} more"] if more else [])


def _show(path: Path) -> str:
    """Returns a path as short as it can be told from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
