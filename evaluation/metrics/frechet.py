"""The Frechet distance of feature distributions: FID on Inception, and on any other network.

FID (Heusel et al. 2017, 1706.08500) is biased: it falls with the number of images, and how fast
depends on the model. FID-infinity (Chong and Forsyth 2020, 1911.07023) extrapolates to infinitely
many images.
"""

from typing import Any, ClassVar

import numpy as np

from latent_t2i.evaluation.feature_stats import FeatureStats, frechet_distance, stats_of, subset
from latent_t2i.evaluation.metrics.metric import FeatureMetric

NUM_SIZES = 15
SEED = 2020


class Fid(FeatureMetric):
    """Frechet Inception distance."""

    name = "fid"
    rows: ClassVar = ("samples", "real", "reconstruction")

    def figures(self, stats: FeatureStats, reference: FeatureStats) -> dict[str, float]:
        return {self.name: frechet_distance(stats, reference)}

    def details(self) -> dict[str, Any]:
        return {
            "num_images": self.stats.count,
            "num_reference": self.reference.count,
            f"{self.name}_infinity": fid_infinity(self.stats, self.reference),
        }


class FrechetDistance(Fid):
    """The same distance on --weights.features, such as DINOv2 (Stein et al. 2023, 2306.04675)."""

    name = "frechet_distance"

    def extractor_name(self) -> str:
        return self.context.config.weights.features


def fid_infinity(stats: FeatureStats, reference: FeatureStats) -> float | None:
    """Returns the distance extrapolated to infinitely many images, linearly in 1 / N.

    Uses the kept rows: 15 subsets without replacement, from half of them to all. None with fewer
    than twice as many rows as features, where the distance is not linear in 1 / N.
    """
    rows = stats.features
    if len(rows) < 2 * stats.dim or len(rows) < 2 * NUM_SIZES:
        return None
    rng = np.random.RandomState(SEED)
    sizes = np.linspace(len(rows) // 2, len(rows), NUM_SIZES).astype(int)
    found = [frechet_distance(stats_of(subset(rows, size, rng)), reference) for size in sizes]
    return float(np.polynomial.polynomial.polyfit(1 / sizes, found, 1)[0])
