"""`evaluation.run`: generates images and writes metrics.json and report.html."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.curves import read_history
from latent_t2i.evaluation.drawing import Samples, draw_all
from latent_t2i.evaluation.metrics import Checks, ClipScorer, check_samples, oracle_metrics
from latent_t2i.evaluation.report import render_report
from latent_t2i.model.bundle import INFO_FILE, read_info
from latent_t2i.model.paths import output_root
from latent_t2i.sample.pictures import choose_bundle, describe_bundle
from latent_t2i.scenes.dataset import render

METRICS_FILE = "metrics.json"
SUMMARY = (
    "oracle/single/shape_and_colour",
    "oracle/pair/colours",
    "oracle/pair/shapes_colours_relation",
    "oracle/pair/all",
    "oracle/held_out/shape_and_colour",
)


def evaluate(config: EvaluationConfig) -> Path:
    """Writes metrics.json and report.html; returns the path of the report."""
    began = time.time()
    scorer = ClipScorer(config.clip)
    folder = choose_bundle(config.bundle, config.name)
    out = Path(config.out) if config.out else output_root() / "runs" / config.name
    # Everything is read before the long part, so that a mistake shows at once.
    info, history = _read_info(folder), _read_history(config.run, folder)
    samples = draw_all(config, folder)
    checks = [check_samples(group) for group in samples]
    metrics = compute_metrics(config, samples, checks, scorer)
    metrics["train_seconds"] = round(float(info["train_seconds"]), 1)
    metrics["total_seconds"] = round(time.time() - (config.started_at or began), 1)
    metrics |= describe_bundle(folder)
    page = render_report(
        config=config, metrics=metrics, samples=samples, checks=checks, info=info, history=history
    )
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.html"
    (out / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
    report.write_text(page, "utf-8")
    print(summary(metrics, out, report))
    return report


def _read_info(folder: Path) -> dict[str, Any]:
    """Returns a bundle's info; raises ValueError if a field that the report shows is unusable."""
    info = read_info(folder)
    numbers = dict.fromkeys(("step", "num_parameters", "train_seconds"), int | float)
    for name, kind in (numbers | {"config": dict}).items():
        if not isinstance(info.get(name), kind):
            expected = "an object" if kind is dict else "a number"
            raise ValueError(
                f"{folder / INFO_FILE}: {name} is {info.get(name)!r}, expected {expected}"
            )
    return info


def _read_history(run: str | None, folder: Path) -> list[dict[str, Any]] | None:
    """Returns the training's metrics.jsonl; None if it is missing and `run` is not given."""
    path = (folder.parent if run is None else Path(run)) / "metrics.jsonl"
    if run is not None and not path.is_file():
        raise ValueError(f"--run: {path} does not exist; give the folder of the training run")
    return read_history(path) if path.is_file() else None


def compute_metrics(
    config: EvaluationConfig,
    samples: Sequence[Samples],
    checks: Sequence[Sequence[Checks]],
    scorer: ClipScorer,
) -> dict[str, Any]:
    """Returns all metrics, flat; keys of other guidance scales end in `@gSCALE`."""
    metrics: dict[str, Any] = {}
    suffixes = {group.guidance_scale: f"@g{group.guidance_scale:g}" for group in samples}
    suffixes[config.guidance_scale] = ""
    for group, group_checks in zip(samples, checks, strict=True):
        metrics |= oracle_metrics(group.kind, group_checks, suffixes[group.guidance_scale])
    for scale in sorted(suffixes):
        groups = [group for group in samples if group.guidance_scale == scale]
        texts = [prompt.text for group in groups for prompt in group.prompts]
        pixels = np.concatenate([group.pixels for group in groups])
        metrics[f"clip_score{suffixes[scale]}"] = scorer.score(pixels, texts)
    prompts = [prompt for group in samples for prompt in group.prompts]
    scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
    if scenes:
        # The ceiling: the score of the scenes' own renderings.
        metrics["clip_score/drawn"] = scorer.score(render(scenes), [p.text for p in prompts])
    main = [group for group in samples if group.guidance_scale == config.guidance_scale]
    metrics["num_prompts"] = sum(len(group.prompts) for group in main)
    return metrics


def summary(metrics: dict[str, Any], out: Path, report: Path) -> str:
    """Returns the lines that the command prints at its end."""
    lines = [f"{name:40} {metrics[name]:6.1%}" for name in SUMMARY if name in metrics]
    lines.append(f"{'clip_score':40} {metrics['clip_score']:6.1f}")
    lines.append(f"bundle:  {metrics['bundle']}, sha256 {metrics['bundle_sha256'][:16]}")
    lines += [f"metrics: {out / METRICS_FILE}", f"report:  {report}"]
    return "\n".join(lines)
