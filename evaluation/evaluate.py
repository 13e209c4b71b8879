"""`evaluation.run`: draws the images that are missing, judges them, writes the results and a report.

Phases in order: inputs, choice of metrics, drawing, judging, sweeps, results. All images are on disk
before they are judged, so a killed evaluation continues with the same command and ends with the same
figures.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_t2i.evaluation import results, rows, sweep_points
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.draws import NUM_DIVERSE, Draw, diverse_items, main_settings, seeds_of
from latent_t2i.evaluation.images import batches_of
from latent_t2i.evaluation.inputs import Inputs, open_inputs
from latent_t2i.evaluation.metrics.metric import Batch, Item
from latent_t2i.evaluation.processes import Group, start_group
from latent_t2i.evaluation.reals import reconstructions
from latent_t2i.evaluation.reference import load_statistics
from latent_t2i.evaluation.rows import Panel, Row
from latent_t2i.sample import sampler
from latent_t2i.sample.pictures import describe_bundle

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(eq=False, kw_only=True)
class Evaluation:
    """One evaluation: its inputs, networks and processes."""

    config: EvaluationConfig
    inputs: Inputs
    group: Group
    panel: Panel
    pipeline: "StableDiffusionPipeline | None" = None
    identity: Mapping[str, str] = field(default_factory=dict)
    """What images depend on besides prompts, seeds and settings."""

    @property
    def out(self) -> Path:
        return self.inputs.out

    def draw(self, name: str, items: Sequence[Item], **changes: Any) -> Draw:
        """Returns a draw with the main settings but for `changes`; draws what is missing of it."""
        settings = replace(main_settings(self.config), **changes)
        seeds = seeds_of(items, self.config.seed)
        draw = Draw(
            name=name, items=items, seeds=seeds, settings=settings, identity=self.identity
        )
        assert self.pipeline is not None
        draw.draw(self.pipeline, self.out, self.group, batch_size=self.config.batch_size)
        return draw

    def batches(self, paths: Sequence[Path], items: Sequence[Item]) -> Iterator[Batch]:
        """Yields this process's share of finished images."""
        share = rows.share_of(items, self.group)
        own = self.inputs.images is not None and self.config.size is not None
        yield from batches_of(
            [paths[i] for i in share],
            [items[i] for i in share],
            batch_size=self.config.batch_size,
            size=self.inputs.size if own else None,
        )

    def batches_of_prompts(self, paths: Sequence[Path], items: Sequence[Item]) -> Iterator[Batch]:
        """Yields this process's share of prompts, the images of each as one batch."""
        for number in range(self.group.rank, len(items) // NUM_DIVERSE, self.group.world_size):
            part = slice(number * NUM_DIVERSE, (number + 1) * NUM_DIVERSE)
            yield from batches_of(paths[part], items[part], batch_size=NUM_DIVERSE)


def evaluate(config: EvaluationConfig) -> Path:
    """Writes metrics.json, evaluation.json, per_image.jsonl and report.html; returns the report."""
    began = time.time()
    group = start_group()
    inputs = open_inputs(config)
    device = _device(config.device, group)
    panel = Panel(config=config, device=device, inputs=inputs.available)
    panel.choose()
    run = Evaluation(config=config, inputs=inputs, group=group, panel=panel)
    if inputs.bundle is not None:
        run.pipeline = sampler.load(inputs.bundle, device=device, dtype=config.dtype)
        dtype = str(run.pipeline.dtype).removeprefix("torch.")
        run.identity = describe_bundle(inputs.bundle) | {"dtype": dtype}
    samples, paths = draw_samples(run)
    found = judge_all(run, samples, paths)
    found["sweeps"] = sweep_points.judge_sweeps(run, samples)
    if not group.is_main:
        return inputs.out / results.REPORT_FILE
    timing = {"total_seconds": round(time.time() - (config.started_at or began), 1)}
    return results.write(run, found, timing)


def _device(name: str, group: Group) -> str:
    chosen = sampler.choose_device(name)
    local = os.environ.get("LOCAL_RANK", "0")
    return f"cuda:{local}" if chosen == "cuda" and group.world_size > 1 else chosen


def draw_samples(run: Evaluation) -> tuple[Draw | None, list[Path]]:
    """Draws the main images; returns them as a draw, and their files."""
    if run.inputs.images is not None:
        return None, list(run.inputs.images)
    draw = run.draw("main", run.inputs.items)
    return draw, draw.paths(run.out)


def judge_all(run: Evaluation, samples: Draw | None, paths: Sequence[Path]) -> dict[str, Any]:
    """Judges the samples, and their floors and ceilings; returns the rows' results."""
    config, inputs, panel, group = run.config, run.inputs, run.panel, run.group
    judged: dict[str, Row] = {}
    if inputs.statistics is not None:
        for name, extractor in panel.extractors().items():
            panel.full[name] = load_statistics(inputs.statistics, extractor)
        judged["real"] = rows.halves(panel)
    if inputs.reals is not None:
        num = len(inputs.reals)
        reals = inputs.reals.batches(group, config.batch_size)
        judged["real"] = rows.judge_reference(panel, reals, group, num)
    judged["samples"], judged["shuffled"] = rows.judge_samples(
        panel, run.batches(paths, inputs.items), group, inputs.items
    )
    if inputs.reals is not None and run.pipeline is not None:
        reals = inputs.reals.batches(group, config.batch_size)
        judged["reconstruction"] = rows.judge(
            panel.row("reconstruction"), reconstructions(run.pipeline.vae, reals), group,
            len(inputs.reals),
        )  # fmt: skip
    if "lpips" in panel.names and run.pipeline is not None and config.num_diverse_prompts:
        items = diverse_items(inputs.items, config.num_diverse_prompts)
        draw = run.draw("diverse", items)
        batches = run.batches_of_prompts(draw.paths(run.out), items)
        judged["diverse"] = rows.judge(panel.row("diverse"), batches, group, len(items))
    return results.collect(run, judged, samples, paths)
