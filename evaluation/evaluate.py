"""`evaluation.run`: draws the missing images, judges them, and writes results and a report.

Phases in order: inputs, choice of metrics, drawing, judging, sweeps, results. All images are on
disk before they are judged, so a killed evaluation continues with the same command and ends with
the same figures.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latent_t2i.evaluation import results, rows, sweep_points
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.draws import NUM_DIVERSE, Draw, diverse_items, main_settings, seeds_of
from latent_t2i.evaluation.images import batches_of
from latent_t2i.evaluation.inputs import Inputs, open_inputs
from latent_t2i.evaluation.metrics.memorisation import extra_items
from latent_t2i.evaluation.metrics.metric import Batch, Item
from latent_t2i.evaluation.missing_rows import absent_rows
from latent_t2i.evaluation.processes import Group, start_group
from latent_t2i.evaluation.protocols import apply_protocol
from latent_t2i.evaluation.reals import reconstructions
from latent_t2i.evaluation.reference import load_statistics
from latent_t2i.evaluation.rows import Panel, Row
from latent_t2i.evaluation.training_set import TrainingSet
from latent_t2i.sample import sampler
from latent_t2i.sample.pictures import describe_bundle, describe_guide

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
        assert self.pipeline is not None
        guide = settings.guide and sampler.load_guide(settings.guide, self.pipeline)
        identity = {**self.identity, **describe_guide(settings.guide)}
        draw = Draw(name=name, items=items, seeds=seeds, settings=settings, identity=identity)
        draw.draw(
            self.pipeline, self.out, self.group, batch_size=self.config.batch_size, guide=guide
        )
        return draw

    def batches(self, paths: Sequence[Path], items: Sequence[Item]) -> Iterator[Batch]:
        """Yields this process's share of finished images."""
        share = rows.share_of(items, self.group)
        yield from batches_of(
            [paths[i] for i in share],
            [items[i] for i in share],
            batch_size=self.config.batch_size,
            size=self.inputs.fit,
            first=paths[0] if paths else None,
        )

    def batches_of_prompts(self, paths: Sequence[Path], items: Sequence[Item]) -> Iterator[Batch]:
        """Yields this process's share of prompts, the images of each as one batch."""
        for number in range(self.group.rank, len(items) // NUM_DIVERSE, self.group.world_size):
            part = slice(number * NUM_DIVERSE, (number + 1) * NUM_DIVERSE)
            yield from batches_of(
                paths[part],
                items[part],
                batch_size=NUM_DIVERSE,
                size=self.inputs.fit,
                first=paths[0],
            )


def evaluate(config: EvaluationConfig) -> Path:
    """Writes metrics.json, evaluation.json, per_image.jsonl and report.html; returns the report."""
    began = time.time()
    group = start_group()
    config = apply_protocol(config)
    inputs = open_inputs(config)
    device = sampler.choose_device(config.device)
    panel = Panel(
        config=config, device=device, inputs=inputs.available, out=inputs.out,
        absent=absent_rows(config, inputs),
    )  # fmt: skip
    run = Evaluation(config=config, inputs=inputs, group=group, panel=panel)
    if inputs.bundle is not None:
        run.pipeline = sampler.load(inputs.bundle, device=device, dtype=config.dtype)
        dtype = str(run.pipeline.dtype).removeprefix("torch.")
        run.identity = describe_bundle(inputs.bundle) | {"dtype": dtype}
        sweep_points.check_points(run)
    if inputs.train_shards:
        vae = None if run.pipeline is None else run.pipeline.vae
        panel.training = partial(
            TrainingSet, inputs.train_shards, vae, most=config.num_train_images
        )
    panel.choose()
    samples, paths = draw_samples(run)
    found = judge_all(run, samples, paths)
    found["sweeps"] = sweep_points.judge_sweeps(run, samples)
    if not group.is_main:
        return inputs.out / results.REPORT_FILE
    timing = {"total_seconds": round(time.time() - (config.started_at or began), 1)}
    return results.write(run, found, timing)


def draw_samples(run: Evaluation) -> tuple[Draw | None, list[Path]]:
    """Draws the main images; returns them as a draw, and their files."""
    if run.inputs.images is not None:
        return None, list(run.inputs.images)
    draw = run.draw("main", run.inputs.items)
    return draw, draw.paths(run.out)


def judge_all(run: Evaluation, samples: Draw | None, paths: Sequence[Path]) -> dict[str, Any]:
    """Judges the samples, and their floors and ceilings; returns the rows' results."""
    judged = judge_references(run)
    judged["samples"], judged["shuffled"] = rows.judge_samples(
        run.panel, run.batches(paths, run.inputs.items), run.group, run.inputs.items
    )
    if run.pipeline is not None:
        judged |= judge_extras(run, run.pipeline)
    return results.collect(run, judged, samples, paths)


def judge_references(run: Evaluation) -> dict[str, Row]:
    """Reads the reference; returns its rows: real images, and the VAE's reconstructions."""
    inputs, panel, group = run.inputs, run.panel, run.group
    if inputs.statistics is not None:
        for name, extractor in panel.extractors().items():
            panel.full[name] = load_statistics(inputs.statistics, extractor, run.config.protocol)
        return {"real": rows.halves(panel)}
    if inputs.reals is None:
        return {}
    num, size = len(inputs.reals), run.config.batch_size
    judged = {"real": rows.judge_reference(panel, inputs.reals.batches(group, size), group, num)}
    if run.pipeline is not None:
        vae = run.pipeline.vae
        if vae.dtype == torch.float16:  # many VAEs overflow in float16
            vae = copy.deepcopy(vae).float()
        batches = reconstructions(vae, inputs.reals.batches(group, size))
        judged["reconstruction"] = rows.judge(panel.row("reconstruction"), batches, group, num)
    return judged


def judge_extras(run: Evaluation, pipeline: "StableDiffusionPipeline") -> dict[str, Row]:
    """Draws and judges images for single metrics: diversity and memorisation."""
    config, panel = run.config, run.panel
    judged: dict[str, Row] = {}
    if "lpips" in panel.names and config.num_diverse_prompts:
        items = diverse_items(run.inputs.items, config.num_diverse_prompts)
        paths = run.draw("diverse", items).paths(run.out)
        batches = run.batches_of_prompts(paths, items)
        judged["diverse"] = rows.judge(panel.row("diverse"), batches, run.group, len(items))
    if "memorisation" in panel.names and panel.training is not None:
        row = panel.row("memorisation")
        training = panel.shared_training()
        found = extra_items(run.inputs.items, training, config.guidance_scale)
        for scale, items in found.items():
            draw = run.draw(f"memorisation-{scale:g}", items, guidance_scale=scale)
            for batch in run.batches(draw.paths(run.out), items):
                row.update(batch)
        row.gather(run.group)
        judged["memorisation"] = row
    return judged
