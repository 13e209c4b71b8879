"""KID: the squared maximum mean discrepancy of Inception features under a cubic kernel.

Unbiased at any number of images (Binkowski et al. 2018, 1801.01401), so it may be below zero. As in
torch-fidelity: the mean over 100 random subsets of up to 1000 images, chosen with a fixed seed.
"""

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.feature_stats import FeatureStats, subset
from latent_t2i.evaluation.metrics.metric import FeatureMetric

NUM_SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020
"""torch-fidelity's default, so that the same images give its figure."""


class Kid(FeatureMetric):
    """Kernel Inception distance."""

    name = "kid"
    rows: ClassVar = ("samples", "real", "reconstruction")
    uses_rows = True

    def figures(self, stats: FeatureStats, reference: FeatureStats) -> dict[str, float]:
        return {"kid": float(np.mean(_of_subsets(stats, reference)))}

    @cached_property
    def _subsets(self) -> NDArray[np.float64]:
        """The values of the row, which take seconds at full size."""
        return np.asarray(_of_subsets(self.stats, self.reference))

    def compute(self) -> dict[str, float]:
        return {"kid": float(np.mean(self._subsets))}

    def details(self) -> dict[str, Any]:
        return {
            "std_of_subsets": float(np.std(self._subsets)),
            "num_subsets": len(self._subsets),
            "subset_size": _subset_size(self.stats, self.reference),
        }


def _subset_size(stats: FeatureStats, reference: FeatureStats) -> int:
    return min(SUBSET_SIZE, len(stats.features), len(reference.features))


def _of_subsets(stats: FeatureStats, reference: FeatureStats) -> list[float]:
    size = _subset_size(stats, reference)
    # If the subsets are whole sets, all have the same value.
    is_whole = size == len(stats.features) == len(reference.features)
    rng = np.random.RandomState(SEED)
    return [
        kernel_distance(subset(stats.features, size, rng), subset(reference.features, size, rng))
        for _ in range(1 if is_whole else NUM_SUBSETS)
    ]


def kernel_distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Returns the unbiased squared MMD of features (N, D) and (M, D); N and M at least 2.

    The kernel is (x . y / D + 1)^3 (Gretton et al. 2012, equation 3).
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kid: found {len(x)} and {len(y)} images, expected at least 2 of each")
    within = _mean_of_others(_kernel(x, x)) + _mean_of_others(_kernel(y, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    # Products in float32, as in torch-fidelity, take half the time; the sums are in float64.
    products = (x @ y.T).astype(np.float64)
    values: NDArray[np.float64] = (products / x.shape[1] + 1) ** 3
    return values


def _mean_of_others(values: NDArray[np.float64]) -> float:
    """Returns the mean of a square matrix without its diagonal."""
    count = len(values)
    return float((values.sum() - np.trace(values)) / (count * (count - 1)))
