"""Writes what an evaluation found: metrics.json, evaluation.json, per_image.jsonl, report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_t2i.evaluation import protocol
from latent_t2i.evaluation.compare import PER_IMAGE_FILE, RESULTS_FILE
from latent_t2i.evaluation.draws import Draw
from latent_t2i.evaluation.intervals import interval, wilson
from latent_t2i.evaluation.metrics.metric import FeatureMetric
from latent_t2i.evaluation.missing_rows import missing_rows, without_figures
from latent_t2i.evaluation.report import render_report
from latent_t2i.evaluation.rows import Row, merge_figures
from latent_t2i.sample.pictures import describe_bundle
from latent_t2i.sample.schedulers import choose_scheduler

if TYPE_CHECKING:
    from latent_t2i.evaluation.evaluate import Evaluation

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
VERSION = 1
SUMMARY = (
    "oracle/single/shape_and_colour",
    "oracle/pair/colours",
    "oracle/pair/shapes_colours_relation",
    "oracle/pair/all",
    "oracle/held_out/shape_and_colour",
    "fid",
    "kid",
    "cmmd",
    "clip_score",
)


def collect(
    run: Evaluation, judged: Mapping[str, Row], samples: Draw | None, paths: Sequence[Path]
) -> dict[str, Any]:
    """Returns the results of all rows, for evaluation.json."""
    main = judged["samples"]
    figures = {name: row.by_metric() for name, row in judged.items()}
    missing = missing_rows(run.panel.names, figures, run.panel.absent, run.inputs)
    # Some metrics, such as LPIPS, judge other rows only.
    identities = {
        name: metric.identity() for row in judged.values() for name, metric in row.metrics.items()
    }
    record = protocol.record_of(
        run.config,
        run.inputs,
        num_images=main.num_images,
        drawn=_drawn(run, samples),
        identities=identities,
    )
    return {
        "version": VERSION,
        "name": run.config.name,
        "protocol": record,
        "protocol_id": protocol.protocol_id(record),
        # The row `samples` is always there, even if all metrics judge other rows.
        "rows": {
            name: merge_figures(figures[name])
            for name, row in judged.items()
            if row.metrics or name == "samples"
        },
        "num_images": {name: row.num_images for name, row in judged.items()},
        "intervals": _intervals(run, main),
        "spread": _spread(run, main),
        "skipped": run.panel.skipped | without_figures(run.panel.names, figures, missing),
        "missing_rows": missing,
        "warnings": {n: text for n, m in main.metrics.items() if (text := m.warning())},
        "contamination": run.inputs.contamination,
        "details": {name: _details(judged, name) for name in run.panel.names},
        "identities": identities,
        "pictures": None if samples is None else samples.folder.as_posix(),
        "per_image": _per_image(run, main, paths),
    }


def _details(judged: Mapping[str, Row], name: str) -> dict[str, Any]:
    """Returns a metric's details by row, without rows that have none."""
    metrics = {row: found.metrics[name] for row, found in judged.items() if name in found.metrics}
    details = {row: metric.details() for row, metric in metrics.items()}
    return {row: found for row, found in details.items() if found}


def _drawn(run: Evaluation, samples: Draw | None) -> dict[str, Any] | None:
    if samples is None or run.pipeline is None:
        return None
    settings = {
        name: value if isinstance(value, str | int | float) else str(value)
        for name, value in vars(samples.settings).items()
    }
    scheduler = choose_scheduler(run.pipeline.scheduler, samples.settings.scheduler)
    ema = (run.inputs.info or {}).get("config", {}).get("ema", "unknown")
    return settings | {
        # The name of the sampler does not fix it: a bundle's own scheduler may have any order.
        "scheduler_class": type(scheduler).__name__,
        "solver_order": scheduler.config.get("solver_order", "none"),
        "guidance_convention": protocol.GUIDANCE,
        "dtype": run.identity["dtype"],
        "vae_dtype": str(run.pipeline.vae.dtype).removeprefix("torch."),
        "seed": run.config.seed,
        "ema": json.dumps(ema, sort_keys=True),
    }


def _intervals(run: Evaluation, row: Row) -> dict[str, tuple[float, float]]:
    """Returns 95 % intervals of the means of per-image values; images of a prompt count as one."""
    prompts = {i.position: i.captions[0] if i.captions else i.position for i in run.inputs.items}
    by_name: dict[str, dict[int, float]] = {}
    for position, values in row.values().items():
        for name, value in values.items():
            if isfinite(value):
                by_name.setdefault(name, {})[position] = value
    seed = run.config.seed
    return {
        name: wilson(sum(found.values()) / len(found), len(found))
        if set(found.values()) <= {0.0, 1.0}
        else interval(list(found.values()), [prompts[p] for p in found], seed=seed)
        for name, found in by_name.items()
    }


def _spread(run: Evaluation, row: Row) -> dict[str, dict[str, Any]]:
    """Returns set metrics on disjoint parts of the images: mean, deviation and all values."""
    found: dict[str, dict[str, Any]] = {}
    for metric in row.metrics.values():
        if isinstance(metric, FeatureMetric):
            found |= metric.spread(run.config.num_seed_sets)
    return found


def _per_image(run: Evaluation, row: Row, paths: Sequence[Path]) -> list[dict[str, Any]]:
    values = row.values()
    return [
        {
            "position": item.position,
            "file": os.path.relpath(path, run.out),
            "key": item.key,
            "prompt": item.captions[0] if item.captions else "",
            "group": item.group,
            # NaN marks a value that does not apply to the image; JSON has no NaN.
            "values": {n: v for n, v in values.get(item.position, {}).items() if isfinite(v)},
        }
        for item, path in zip(run.inputs.items, paths, strict=True)
    ]


def flatten(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all figures flat, as in metrics.json.

    The figures of a row other than the samples end in its name, those of another guidance scale in
    @gSCALE.
    """
    flat: dict[str, Any] = dict(found["rows"]["samples"])
    for row, figures in found["rows"].items():
        if row != "samples":
            flat |= {f"{name}/{row}": value for name, value in figures.items()}
    scale = found["protocol"].get("drawn/guidance_scale")
    for point in found["sweeps"].get("guidance_scale", ()):
        if point["value"] != scale:
            flat |= {f"{name}@g{point['value']:g}": v for name, v in point["figures"].items()}
    flat["num_images"] = found["num_images"]["samples"]
    flat["protocol_id"] = found["protocol_id"]
    flat["contamination"] = found["contamination"]["status"]
    if found["contamination"]["num_images_compared"]:
        flat["contaminated_images"] = found["contamination"]["count"]
    return flat


def write(run: Evaluation, found: dict[str, Any], timing: Mapping[str, float]) -> Path:
    """Writes all files, the report last, and prints a summary; returns the report's path."""
    out, info = run.out, run.inputs.info
    per_image = found.pop("per_image")
    metrics = flatten(found) | dict(timing)
    if run.inputs.bundle is not None and info is not None:
        metrics["train_seconds"] = round(float(info["train_seconds"]), 1)
        metrics |= describe_bundle(run.inputs.bundle)
    found["metrics"] = metrics
    # If this process is killed below, no older report stands beside the new figures.
    (out / REPORT_FILE).unlink(missing_ok=True)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in per_image)
    _replace(out / PER_IMAGE_FILE, lines)
    _replace(out / RESULTS_FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    _replace(out / METRICS_FILE, json.dumps(metrics, indent=1) + "\n")
    page = render_report(
        found, out, history=run.inputs.history, info=info, others=run.inputs.others,
        train_shards=[str(folder) for folder in run.inputs.train_shards],
    )  # fmt: skip
    _replace(out / REPORT_FILE, page)
    print(summary(found, out))
    return out / REPORT_FILE


def _replace(path: Path, text: str) -> None:
    """Writes a text file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def summary(found: Mapping[str, Any], out: Path) -> str:
    """Returns the lines that the command prints at its end."""
    metrics = found["metrics"]
    lines = [f"{name:40} {_shown(name, metrics[name])}" for name in SUMMARY if name in metrics]
    lines += [f"{name + ' skipped':40} {reason}" for name, reason in found["skipped"].items()]
    lines += [
        f"{'no row ' + row['row']:40} {', '.join(row['metrics'])}: {row['reason']}"
        for row in found["missing_rows"]
    ]
    lines += [f"{'warning, ' + name:40} {text}" for name, text in found["warnings"].items()]
    if "bundle" in metrics:
        lines.append(f"bundle:   {metrics['bundle']}, sha256 {metrics['bundle_sha256'][:16]}")
    lines += [
        f"protocol: {found['protocol_id']}",
        f"metrics:  {out / METRICS_FILE}",
        f"report:   {out / REPORT_FILE}",
    ]
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    return f"{value:6.1%}" if name.startswith("oracle/") else f"{value:8.4g}"
