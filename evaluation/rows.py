"""Judges rows: streams batches through metrics, and combines the processes.

A row's metrics see each batch once. The images of a batch are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.feature_stats import FeatureStats
from latent_t2i.evaluation.metrics import METRICS, memorisation, metric_class
from latent_t2i.evaluation.metrics.metric import (
    Batch,
    Context,
    FeatureMetric,
    ImageMetric,
    Item,
    Metric,
    MissingWeights,
    Need,
    RowName,
)
from latent_t2i.evaluation.processes import Group
from latent_t2i.evaluation.training_set import TrainingSet

INPUTS: dict[Need, str] = {
    "reference": "real images: --reference",
    "captions": "captions: --captions",
    "scenes": "generated scenes: --oracle",
    "bundle": "a bundle: --bundle",
    "shards": "the training set: --train-shards",
    "objects": "annotated objects: --objects",
}


@dataclass(eq=False, kw_only=True)
class Row:
    """The metrics of one row, and what they found."""

    name: RowName
    metrics: Mapping[str, Metric]
    num_images: int = 0

    def update(self, batch: Batch) -> None:
        self.num_images += len(batch.items)
        for metric in self.metrics.values():
            metric.update(batch)

    def gather(self, group: Group) -> None:
        self.num_images = sum(group.gather(self.num_images))
        for metric in self.metrics.values():
            metric.gather(group)

    def figures(self) -> dict[str, float]:
        """Returns all figures; raises ValueError if one is not finite or has two metrics."""
        return merge_figures(self.by_metric())

    def by_metric(self) -> dict[str, dict[str, float]]:
        """Returns the figures of each metric; raises ValueError if one is not finite."""
        found = {key: metric.compute() for key, metric in self.metrics.items()}
        for key, figures in found.items():
            for name, value in figures.items():
                if not np.isfinite(value):
                    raise ValueError(
                        f"{key}: {name} is {value} in row {self.name}, expected a finite number: "
                        f"check the images and the weights of {key}"
                    )
        return {key: {n: float(v) for n, v in figures.items()} for key, figures in found.items()}

    def values(self) -> dict[int, dict[str, float]]:
        """Returns the values per image, by position."""
        merged: dict[int, dict[str, float]] = {}
        for metric in self.metrics.values():
            if isinstance(metric, ImageMetric):
                for position, values in metric.values.items():
                    merged.setdefault(position, {}).update(values)
        return merged


def merge_figures(by_metric: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the figures of a row's metrics, which must have different names."""
    found = {name: value for figures in by_metric.values() for name, value in figures.items()}
    assert len(found) == sum(map(len, by_metric.values())), "two metrics share a figure's name"
    return found


@dataclass(eq=False, kw_only=True)
class Panel:
    """The chosen metrics, their shared networks, and the statistics of the reference."""

    config: EvaluationConfig
    device: str
    inputs: frozenset[Need]
    absent: Mapping[RowName, str] = field(default_factory=dict)
    """Rows that this evaluation does not have, with the reason."""
    out: Path | None = None
    training: Callable[[], TrainingSet] | None = None
    names: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)
    full: dict[str, FeatureStats] = field(default_factory=dict)
    """Statistics of the whole reference, by extractor."""

    def choose(self) -> None:
        """Finds the metrics to compute, and why others are skipped.

        With `all`, metrics without their weights or inputs are skipped; a metric named by the user
        raises ValueError.
        """
        wanted = self.config.metrics
        named = [name for name in wanted if name != "all"]
        for name in named:
            metric_class(name)  # an unknown name is an error before anything is loaded
        chosen = []
        for name in METRICS if "all" in wanted else named:
            reason = self._try(name)
            if reason is None:
                chosen.append(name)
            elif name in named:
                raise ValueError(f"--metrics {name}: {reason}")
            else:
                self.skipped[name] = reason
        self.names = tuple(chosen)

    def _try(self, name: str) -> str | None:
        """Returns why a metric cannot be computed; None if it can."""
        cls = metric_class(name)
        missing = sorted(cls.needs - self.inputs)
        if missing:
            return "needs " + ", and ".join(INPUTS[need] for need in missing)
        if set(cls.rows) <= self.absent.keys():
            return "; ".join(dict.fromkeys(self.absent[row] for row in cls.rows))
        try:
            cls(self.context("samples"))
        except (MissingWeights, ModuleNotFoundError) as error:
            return str(error)
        return None

    def context(
        self,
        row: RowName,
        reference: Mapping[str, FeatureStats] | None = None,
        stats: dict[str, FeatureStats] | None = None,
    ) -> Context:
        """Returns the context of a row; `stats` are its statistics if they exist already."""
        known = self.full if reference is None else reference
        return Context(
            config=self.config, device=self.device, row=row, shared=self.shared,
            reference=known.__getitem__, stats=stats or {}, training=self.training, out=self.out,
        )  # fmt: skip

    def row(
        self,
        name: RowName,
        reference: Mapping[str, FeatureStats] | None = None,
        stats: dict[str, FeatureStats] | None = None,
        only: Callable[[type[Metric]], bool] = lambda cls: True,
    ) -> Row:
        """Returns an empty row with the metrics that say something there."""
        context = self.context(name, reference, stats)
        found = {key: metric_class(key) for key in self.names}
        metrics = {
            key: cls(context) for key, cls in found.items() if name in cls.rows and only(cls)
        }
        return Row(name=name, metrics=metrics)

    def shared_training(self) -> TrainingSet:
        """Returns the opened training set, the same as that of the metrics."""
        assert self.training is not None
        return self.context("samples").load(memorisation.FOLDER, self.training)

    def extractors(self) -> dict[str, Any]:
        """Returns the feature extractors of the chosen metrics, by name."""
        metrics = self.row("samples").metrics.values()
        return {m.extractor_name(): m.network for m in metrics if isinstance(m, FeatureMetric)}


def judge_reference(panel: Panel, batches: Iterable[Batch], group: Group, num: int) -> Row:
    """Streams the reference once; fills `panel.full` and returns the row `real`.

    For set metrics, the row is one half of the reference against the other.
    """
    extractors = panel.extractors()
    for name, extractor in extractors.items():
        panel.full[name] = FeatureStats(extractor.dim, num_parts=2)
    row = panel.row("real", only=lambda cls: not issubclass(cls, FeatureMetric))
    for batch in _progress(batches, "reference", num, group):
        row.update(batch)
        for name, extractor in extractors.items():
            panel.full[name].update(batch, extractor)
    row.gather(group)
    for stats in panel.full.values():
        stats.gather(group)
    return replace(row, metrics={**row.metrics, **halves(panel).metrics})


def halves(panel: Panel) -> Row:
    """Returns the set metrics of one half of the reference against the other."""
    halves = {name: stats.split(2) for name, stats in panel.full.items() if stats.num_parts == 2}
    even = {name: parts[0] for name, parts in halves.items()}
    odd = {name: parts[1] for name, parts in halves.items()}
    known = {m.extractor_name() for m in panel.row("samples").metrics.values()
             if isinstance(m, FeatureMetric)}  # fmt: skip
    if not known <= even.keys():
        return Row(name="real", metrics={})  # statistics of another tool have no halves
    row = panel.row("real", odd, even, only=lambda cls: issubclass(cls, FeatureMetric))
    row.num_images = max((stats.count for stats in even.values()), default=0)
    return row


def judge_samples(panel: Panel, batches: Iterable[Batch], group: Group, items: Sequence[Item]
                  ) -> tuple[Row, Row]:  # fmt: skip
    """Streams the samples once; returns the rows `samples` and `shuffled`."""
    row, shuffled = panel.row("samples"), panel.row("shuffled")
    others = dict(zip((i.position for i in items), rotate_captions(items), strict=True))
    for batch in _progress(batches, "samples", len(items), group):
        row.update(batch)
        if shuffled.metrics:
            shuffled.update(batch.with_items([others[item.position] for item in batch.items]))
    row.gather(group)
    shuffled.gather(group)
    return row, shuffled


def judge(row: Row, batches: Iterable[Batch], group: Group, num: int) -> Row:
    """Streams one row; returns it."""
    for batch in _progress(batches, row.name, num, group):
        row.update(batch)
    row.gather(group)
    return row


def _progress(batches: Iterable[Batch], title: str, num: int, group: Group) -> Iterator[Batch]:
    share = num // group.world_size
    bar = tqdm(total=share, desc=title, unit="image", disable=None if group.is_main else True,
               leave=False)  # fmt: skip
    with bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.items))


def rotate_captions(items: Sequence[Item]) -> list[Item]:
    """Returns the items with the texts, scene and objects of another item of their group.

    They are rotated by half the number of items, and further if the captions are equal by chance.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    numbers = dict.fromkeys(groups, 0)
    rotated = []
    for item in items:
        members, number = groups[item.group], numbers[item.group]
        numbers[item.group] = number + 1
        first = number + len(members) // 2
        others = (members[(first + step) % len(members)] for step in range(len(members)))
        other = next((o for o in others if o.captions != item.captions), item)
        rotated.append(replace(other, position=item.position, key=item.key))
    return rotated


def share_of(items: Sequence[Any], group: Group) -> list[int]:
    """Returns the indices of this process's share."""
    return list(range(group.rank, len(items), group.world_size))
