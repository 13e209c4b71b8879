"""What every metric implements, and two base classes that cover nearly all of them.

A metric judges one *row*: a stream of image batches, such as the model's samples, or the real
images that give its ceiling. `update` is called for each batch of the row, `gather` once with the
other processes, then `compute`. A metric keeps sums or numbers per image, never images, so its
memory does not grow with them beyond a few numbers each. To add a metric: one module, and a line in
METRICS.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.processes import Group
from latent_t2i.scenes.prompts import Prompt

if TYPE_CHECKING:
    from latent_t2i.evaluation.feature_stats import FeatureStats
    from latent_t2i.evaluation.training_set import TrainingSet

T = TypeVar("T")
Need = Literal["reference", "captions", "scenes", "bundle", "shards", "objects"]
"""What a metric needs besides the images. reference: real images or their statistics. captions: the
texts that an image shows. scenes: prompts with their scene. bundle: a VAE to reconstruct with.
shards: the training set. objects: the annotated objects of each prompt's image."""
RowName = Literal["samples", "real", "reconstruction", "shuffled", "diverse", "memorisation"]
"""samples: the images to judge. real: reference images in their place, the ceiling (set metrics:
one half of the reference against the other). reconstruction: reference images through the bundle's
VAE. shuffled: the samples with the captions of other samples, the floor. diverse: several images of
each of a few prompts, whose batches are one prompt's images. memorisation: images of training
captions, and of the prompts at guidance 1."""


class MissingWeights(ValueError):
    """Weights are unavailable; the message names the file, its origin and where to put it."""


class NotApplicable(MissingWeights):
    """The metric says nothing about these images; the message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is known of an image besides its pixels."""

    position: int
    """Number within its row: unique, and the same whatever the batch size and process count."""
    key: str
    """Name of the image for messages and reports, such as a file name."""
    captions: tuple[str, ...] = ()
    """Reference captions; the first is the prompt."""
    prompt: Prompt | None = None
    """The generated prompt with its scene, for scenes."""
    objects: tuple[Mapping[str, Any], ...] = ()
    """Annotated objects of the image that the prompt describes: `category` and `bbox` (x, y, width,
    height, as shares of the image's sides)."""
    group: str = ""
    """Kind of prompt, such as single or pair."""


@dataclass(eq=False, kw_only=True)
class Batch:
    """Images of a row.  Features are computed once per batch and extractor."""

    images: NDArray[np.uint8]  # (B, H, W, 3)
    items: Sequence[Item]
    originals: NDArray[np.uint8] | None = None  # (B, H, W, 3)
    """In the row `reconstruction`: the images before the VAE."""
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the value stored for `key`; makes it at the first call.

        The value must depend on the images only, never on the items.
        """
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def with_items(self, items: Sequence[Item]) -> Batch:
        """Returns the same images with other items; what is cached of the images is shared."""
        return Batch(images=self.images, items=items, originals=self.originals, _cache=self._cache)

    @property
    def positions(self) -> NDArray[np.int64]:  # (B,)
        return np.array([item.position for item in self.items], np.int64)


@dataclass(eq=False, kw_only=True)
class Context:
    """What metrics share: settings, and networks that are loaded once for all rows."""

    config: EvaluationConfig
    device: str = "cpu"
    row: RowName = "samples"
    stats: dict[str, FeatureStats] = field(default_factory=dict)
    """Statistics of the row's images, by extractor; metrics of one extractor share them."""
    reference: Callable[[str], FeatureStats] | None = None
    """Statistics of the reference under an extractor."""
    training: Callable[[], TrainingSet] | None = None
    """Opens the training set, for metrics that need `shards`."""
    out: Path | None = None
    """The output folder, for files that a metric adds to the results."""
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """Loaded networks, by what identifies them."""

    def load(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the shared network of `key`; loads it at the first call."""
        if key not in self.shared:
            self.shared[key] = make()
        found: T = self.shared[key]
        return found


def merge(group: Group, values: Mapping[int, T]) -> dict[int, T]:
    """Returns the values of all processes by position, in that order."""
    merged = {position: value for part in group.gather(values) for position, value in part.items()}
    return dict(sorted(merged.items()))


class Metric(abc.ABC):
    """One metric on one row."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    rows: ClassVar[tuple[RowName, ...]] = ("samples",)
    """The rows on which the metric says something; the others are its floors and ceilings."""
    lost_without: ClassVar[Mapping[RowName, str]] = {}
    """What the figures cannot say in an evaluation without a row, for the results."""
    without_ceiling: ClassVar[Mapping[str, str]] = {}
    """Figures, as METRIC/ROW, that have no ceiling in any evaluation, with the reason."""
    in_sweeps: ClassVar[bool] = True
    """Whether to compute the metric at every setting of a sweep, too."""

    def __init__(self, context: Context) -> None:
        """Loads what the metric needs; raises MissingWeights if it is unavailable."""
        self.context = context

    @abc.abstractmethod
    def update(self, batch: Batch) -> None:
        """Takes the next images of the row."""

    @abc.abstractmethod
    def gather(self, group: Group) -> None:
        """Combines the sums of all processes; afterwards each has the whole row's."""

    @abc.abstractmethod
    def compute(self) -> dict[str, float]:
        """Returns the figures by name; raises ValueError if one is not finite."""

    def identity(self) -> dict[str, str]:
        """Returns what the figures depend on besides the images, such as weights' sha256."""
        return {}

    def details(self) -> dict[str, Any]:
        """Returns further results for the report; must be JSON."""
        return {}

    def warning(self) -> str:
        """Returns what makes the figures misleading in this evaluation; empty if nothing does."""
        return ""


class FeatureMetric(Metric):
    """A metric of the distribution of features, whose statistics other metrics may share."""

    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    extractor: ClassVar[str] = "inception"
    uses_rows: ClassVar[bool] = False
    """Whether mean and covariance are not enough."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        from latent_t2i.evaluation.feature_stats import FeatureStats
        from latent_t2i.evaluation.features import load_extractor, require_fit

        name = self.extractor_name()
        self.network = load_extractor(name, context)
        if name not in context.stats:
            sets = context.config.num_seed_sets
            context.stats[name] = FeatureStats(self.network.dim, num_parts=sets)
        self.stats = context.stats[name]
        require_fit(context.config, self)

    def extractor_name(self) -> str:
        """Returns the extractor's name; it may depend on the settings."""
        return self.extractor

    @property
    def reference(self) -> FeatureStats:
        """The statistics of the reference."""
        assert self.context.reference is not None
        return self.context.reference(self.extractor_name())

    @abc.abstractmethod
    def figures(self, stats: FeatureStats, reference: FeatureStats) -> dict[str, float]:
        """Returns the figures of two distributions."""

    def update(self, batch: Batch) -> None:
        # Several metrics share `stats`: the second update with a batch does nothing.
        self.stats.update(batch, self.network)

    def gather(self, group: Group) -> None:
        self.stats.gather(group)

    def compute(self) -> dict[str, float]:
        return self.figures(self.stats, self.reference)

    def spread(self, num_sets: int) -> dict[str, dict[str, Any]]:
        """Returns each figure's mean, deviation and values over disjoint sets of the images.

        The sets are position modulo `num_sets`, which is --num-seed-sets or divides it. Nothing if
        one of them has fewer than two images.
        """
        if self.stats.count < 2 * num_sets:
            return {}
        found = [self.figures(part, self.reference) for part in self.stats.split(num_sets)]
        spreads = {}
        for name in found[0]:
            values = [figures[name] for figures in found]
            std = float(np.std(values, ddof=1))
            spreads[name] = {"mean": float(np.mean(values)), "std": std, "values": values}
        return spreads

    def identity(self) -> dict[str, str]:
        return self.network.identity()


class ImageMetric(Metric):
    """A metric with values per image, of which it reports the mean.

    A value may be NaN where it does not apply to an image; the mean leaves it out.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.values: dict[int, dict[str, float]] = {}
        """By position: the values of an image."""

    @abc.abstractmethod
    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        """Returns the values of each image of the batch."""

    def update(self, batch: Batch) -> None:
        for item, values in zip(batch.items, self.score(batch), strict=True):
            self.values[item.position] = dict(values)

    def gather(self, group: Group) -> None:
        self.values = merge(group, self.values)

    def compute(self) -> dict[str, float]:
        names = dict.fromkeys(name for values in self.values.values() for name in values)
        return {name: self._mean(name) for name in names}

    def _mean(self, name: str) -> float:
        found = np.array([values.get(name, np.nan) for values in self.values.values()])
        found = found[~np.isnan(found)]
        return float(found.mean()) if found.size else float("nan")
