"""What `python -m evaluation.run` does: draw, judge, write metrics.json and report.html."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.curves import read_history
from latent_t2i.evaluation.drawing import Samples, draw_all
from latent_t2i.evaluation.metrics import Checks, ClipScorer, judge, oracle_figures
from latent_t2i.evaluation.report import write_report
from latent_t2i.model.bundle import read_info
from latent_t2i.model.paths import output_root
from latent_t2i.sample.pictures import choose_bundle
from latent_t2i.scenes.dataset import render

METRICS_FILE = "metrics.json"
HEADLINES = (
    "oracle/single/shape_and_colour",
    "oracle/pair/colours",
    "oracle/pair/shapes_colours_relation",
    "oracle/pair/all",
    "oracle/held_out/shape_and_colour",
    "clip_score",
)


def evaluate(config: EvaluationConfig) -> Path:
    """Writes metrics.json and report.html and returns the report's path."""
    began = time.time()
    scorer = ClipScorer(config.clip)
    folder = choose_bundle(config.bundle, config.name)
    run = Path(config.run) if config.run else output_root() / "runs" / config.name
    out = Path(config.out) if config.out else output_root() / "runs" / config.name
    info = read_info(folder)
    drawn = draw_all(config, folder)
    verdicts = [judge(part) for part in drawn]
    metrics = measure(config, drawn, verdicts, scorer)
    metrics["train_seconds"] = round(float(info["train_seconds"]), 1)
    metrics["total_seconds"] = round(time.time() - (config.started_at or began), 1)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(metrics, indent=1) + "\n"
    (out / METRICS_FILE).write_text(text, "utf-8")
    history_path = run / "metrics.jsonl"
    report = out / "report.html"
    write_report(
        report,
        config=config,
        metrics=metrics,
        drawn=drawn,
        verdicts=verdicts,
        info=info,
        history=read_history(history_path) if history_path.is_file() else None,
    )
    print(summary(metrics, out, report))
    return report


def measure(
    config: EvaluationConfig,
    drawn: Sequence[Samples],
    verdicts: Sequence[Sequence[Checks]],
    scorer: ClipScorer,
) -> dict[str, Any]:
    """Returns every figure of the pictures, flat; other guidance scales have `@gSCALE` appended."""
    metrics: dict[str, Any] = {}
    for part, judged in zip(drawn, verdicts, strict=True):
        main = part.guidance_scale == config.guidance_scale
        suffix = "" if main else f"@g{part.guidance_scale:g}"
        metrics |= oracle_figures(part.kind, judged, suffix)
    for scale in sorted({part.guidance_scale for part in drawn}):
        parts = [part for part in drawn if part.guidance_scale == scale]
        texts = [prompt.text for part in parts for prompt in part.prompts]
        suffix = "" if scale == config.guidance_scale else f"@g{scale:g}"
        pixels = np.concatenate([part.pixels for part in parts])
        metrics[f"clip_score{suffix}"] = scorer.score(pixels, texts)
    scenes = [(p.scene, p.text) for part in drawn for p in part.prompts if p.scene is not None]
    if scenes:  # the ceiling: the score of pictures drawn as the prompts ask
        true = render([scene for scene, _ in scenes])
        metrics["clip_score/drawn"] = scorer.score(true, [text for _, text in scenes])
    metrics["num_prompts"] = sum(
        len(part.prompts) for part in drawn if part.guidance_scale == config.guidance_scale
    )
    return metrics


def summary(metrics: dict[str, Any], out: Path, report: Path) -> str:
    """The lines that a command ends with."""
    lines = [f"{name:40} {metrics[name]:6.1%}" for name in HEADLINES[:-1] if name in metrics]
    lines.append(f"{'clip_score':40} {metrics['clip_score']:6.1f}")
    grid = out / "samples.png"
    if grid.is_file():
        lines.append(f"pictures: {grid}")
    lines += [f"figures:  {out / METRICS_FILE}", f"report:   {report}"]
    return "\n".join(lines)
