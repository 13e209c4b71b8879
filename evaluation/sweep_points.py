"""Judges further settings on a part of the prompts: guidance, samplers, checkpoints.

Each point uses the same prompts and seeds as the first images of the main settings, so that a
difference between two points is due to the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from latent_t2i.evaluation import rows
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.draws import Draw, main_settings, part_of
from latent_t2i.evaluation.metrics.metric import Item, Metric
from latent_t2i.model.bundle import INFO_FILE, find_bundle, read_info
from latent_t2i.model.paths import find_path, hash_file
from latent_t2i.model.posthoc import SNAPSHOT_FILE, average_file, find_folders, read_snapshot
from latent_t2i.sample import sampler
from latent_t2i.sample.pictures import describe_bundle

if TYPE_CHECKING:
    from latent_t2i.evaluation.evaluate import Evaluation


NUM_SHOWN = 8
"""Images of each group whose files are listed, for the report's strips."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a sweep."""

    sweep: str
    label: Mapping[str, Any]
    """What identifies the point in the results."""
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the draw that differ from the main ones."""


def settings_points(run: Evaluation) -> list[Point]:
    """Returns the points that differ from the main images in their settings only."""
    config, sweep = run.config, run.config.sweep
    points = [
        Point(sweep="guidance_scale", label={"value": scale}, name=f"guidance-{scale:g}",
              changes={"guidance_scale": scale})
        for scale in sorted({config.guidance_scale, *config.guidance_scales})
    ]  # fmt: skip
    points += [
        Point(sweep="guidance_interval", label={"value": list(interval)},
              name=f"interval-{interval[0]:g}-{interval[1]:g}",
              changes={"guidance_interval": interval})
        for interval in sweep.guidance_intervals
    ]  # fmt: skip
    points += [
        Point(sweep="guide", label={"value": guide}, name=f"guide-{number}",
              changes={"guide": guide})
        for number, guide in enumerate(_each_guide(sweep.guides))
    ]  # fmt: skip
    if sweep.schedulers or sweep.num_steps:
        points += [
            Point(sweep="sampler", label={"scheduler": scheduler, "num_steps": steps},
                  name=f"sampler-{scheduler}-{steps}",
                  changes={"scheduler": scheduler, "num_steps": steps})
            for scheduler in sweep.schedulers or (config.scheduler,)
            for steps in sweep.num_steps or (config.num_steps,)
        ]  # fmt: skip
    return points


def _each_guide(names: Sequence[str]) -> list[str]:
    """Returns the guides, with the snapshots in place of a folder that contains them."""
    found: list[str] = []
    for name in names:
        folder = find_path(name)
        snapshots = find_folders(folder) if folder is not None and folder.is_dir() else []
        found += [str(snapshot) for snapshot in snapshots] or [name]
    return found


def judge_sweeps(run: Evaluation, main: Draw | None) -> dict[str, list[dict[str, Any]]]:
    """Draws and judges every point; returns their results by sweep."""
    if main is None:
        return {}
    num = run.config.sweep.num_prompts or max(1, run.config.num_prompts // 2)
    chosen = part_of(main.items, num)
    items = [main.items[index] for index in chosen]
    found: dict[str, list[dict[str, Any]]] = {}
    for point in settings_points(run):
        if all(getattr(main.settings, name) == value for name, value in point.changes.items()):
            draw, paths = main, [main.paths(run.out)[index] for index in chosen]
        else:
            draw = run.draw(point.name, items, **point.changes)
            paths = draw.paths(run.out)
        folder = {"folder": draw.folder.as_posix()}
        result = {**point.label, **folder, **judge_point(run, items, paths)}
        found.setdefault(point.sweep, []).append(result)
    checkpoints = [judge_checkpoint(run, c, items) for c in find_checkpoints(run.config)]
    if checkpoints:
        found["checkpoints"] = sorted(checkpoints, key=lambda point: int(point["step"]))
    if len(found["guidance_scale"]) == 1:
        del found["guidance_scale"]  # the main images alone compare nothing
    return found


def check_points(run: Evaluation) -> None:
    """Raises ValueError for a sweep that cannot be drawn, before anything is."""
    assert run.pipeline is not None
    main = main_settings(run.config)
    for point in settings_points(run):
        settings = replace(main, **point.changes)
        if settings.guide is not None:
            sampler.load_guide(settings.guide, run.pipeline)
        sampler.keywords(run.pipeline, replace(settings, guide=None))
    find_checkpoints(run.config)


def judge_point(run: Evaluation, items: Sequence[Item], paths: Sequence[Path]) -> dict[str, Any]:
    """Returns the figures of finished images."""

    def in_sweeps(cls: type[Metric]) -> bool:
        return cls.in_sweeps

    row = run.panel.row("samples", only=in_sweeps)
    rows.judge(row, run.batches(paths, items), run.group, len(items))
    shown = part_of(items, NUM_SHOWN)
    files = {str(items[i].position): paths[i].relative_to(run.out).as_posix() for i in shown}
    return {"num_images": row.num_images, "figures": row.figures(), "files": files}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights of an earlier step: a bundle, or a snapshot's average for the main bundle."""

    folder: Path
    step: int
    train_s: float
    batch_size: int | None
    weights: Path | None
    """The snapshot's file; None for a bundle."""


def find_checkpoints(config: EvaluationConfig) -> list[Checkpoint]:
    """Returns the checkpoints of the settings: bundles, snapshots, and folders of either."""
    found = []
    for name in config.sweep.checkpoints:
        folder = find_path(name)
        if folder is None:
            raise ValueError(f"--sweep.checkpoints: no folder {name!r}")
        children = sorted(p for p in folder.iterdir() if (p / INFO_FILE).is_file())
        if (folder / INFO_FILE).is_file():
            found.append(_bundle_checkpoint(folder))
        elif children:
            found += [_bundle_checkpoint(child) for child in children]
        elif (folder / SNAPSHOT_FILE).is_file():
            found.append(_snapshot_checkpoint(folder))
        elif snapshots := find_folders(folder):
            found += [_snapshot_checkpoint(snapshot) for snapshot in snapshots]
        else:
            raise ValueError(
                f"--sweep.checkpoints: {folder} is not a bundle and has neither bundles nor "
                "snapshots in it; expected runs/NAME/snapshots, or folders of bundles"
            )
    return found


def _bundle_checkpoint(folder: Path) -> Checkpoint:
    info = read_info(find_bundle(folder))
    batch_size = info["config"].get("batch_size")
    return Checkpoint(
        folder=folder, step=info["step"], train_s=info["train_seconds"], batch_size=batch_size,
        weights=None,
    )  # fmt: skip


def _snapshot_checkpoint(folder: Path) -> Checkpoint:
    snapshot = read_snapshot(folder)
    return Checkpoint(
        folder=folder,
        step=snapshot.step,
        train_s=snapshot.train_s,
        batch_size=snapshot.config.get("batch_size"),
        weights=average_file(folder, min(snapshot.sigma_rels)),
    )


def judge_checkpoint(
    run: Evaluation, checkpoint: Checkpoint, items: Sequence[Item]
) -> dict[str, Any]:
    """Draws and judges with the weights of a checkpoint."""
    with _weights_of(run, checkpoint) as other:
        draw = other.draw(f"step-{checkpoint.step}", items)
    judged = judge_point(run, items, draw.paths(run.out))
    seen = None if checkpoint.batch_size is None else checkpoint.step * checkpoint.batch_size
    return {
        "bundle": str(checkpoint.folder),
        "step": checkpoint.step,
        "images_seen": seen,
        "hours": checkpoint.train_s / 3600,
        "validation_loss": _validation_loss(run.inputs.history or (), checkpoint.step),
        "folder": draw.folder.as_posix(),
        **judged,
    }


@contextmanager
def _weights_of(run: Evaluation, checkpoint: Checkpoint) -> Iterator[Evaluation]:
    """Yields the evaluation with a checkpoint's weights; the main ones are back afterwards."""
    assert run.pipeline is not None
    if checkpoint.weights is None:
        pipeline = sampler.load(
            checkpoint.folder, device=str(run.pipeline.device), dtype=run.config.dtype
        )
        identity = describe_bundle(checkpoint.folder) | {"dtype": run.identity["dtype"]}
        yield replace(run, pipeline=pipeline, identity=identity)
        return
    unet = run.pipeline.unet
    main = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    try:
        unet.load_state_dict(load_file(checkpoint.weights))
        sha256 = hash_file(checkpoint.weights)
        yield replace(run, identity={**run.identity, "weights_sha256": sha256})
    finally:
        unet.load_state_dict(main)


def _validation_loss(history: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Returns the validation loss of the last validation up to a step."""
    found = [
        line["validation"]["loss"]
        for line in history
        if line["step"] <= step and line.get("validation", {}).get("loss") is not None
    ]
    return found[-1] if found else None
