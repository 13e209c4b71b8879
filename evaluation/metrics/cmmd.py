"""CMMD: the squared maximum mean discrepancy of CLIP embeddings under a Gaussian kernel.

Jayasumana et al. 2024 (2401.09603): embeddings of unit length, sigma 10, times 1000. The figure is
that of the authors' code, the estimator with the diagonal; `details` has the unbiased one.
Published figures use openai/clip-vit-large-patch14-336: other networks have another scale.
"""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.feature_stats import FeatureStats
from latent_t2i.evaluation.metrics.metric import FeatureMetric

SIGMA = 10.0
SCALE = 1000.0
CHUNK_ROWS = 250


class Cmmd(FeatureMetric):
    """CLIP maximum mean discrepancy, on --weights.features."""

    name = "cmmd"
    rows: ClassVar = ("samples", "real", "reconstruction")
    uses_rows = True

    def extractor_name(self) -> str:
        return self.context.config.weights.features

    def figures(self, stats: FeatureStats, reference: FeatureStats) -> dict[str, float]:
        return {"cmmd": gaussian_distance(stats.features, reference.features)}

    def details(self) -> dict[str, Any]:
        rows, others = self.stats.features, self.reference.features
        return {
            "unbiased": gaussian_distance(rows, others, unbiased=True),
            "num_images": len(rows),
            "num_reference": len(others),
        }


def gaussian_distance(
    x: NDArray[np.float32], y: NDArray[np.float32], *, unbiased: bool = False
) -> float:
    """Returns 1000 times the squared MMD of embeddings (N, D) and (M, D), made of unit length.

    The kernel is exp(-|x - y|^2 / (2 sigma^2)); Gretton et al. 2012, equation 5, or 3 if unbiased.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"cmmd: found {len(x)} and {len(y)} images, expected at least 2 of each")
    first, second = _unit(x), _unit(y)
    within = _mean_kernel(first, first) + _mean_kernel(second, second)
    if unbiased:  # the diagonal of kernel - 1 is zero
        within = _mean_kernel(first, first) * len(x) / (len(x) - 1)
        within += _mean_kernel(second, second) * len(y) / (len(y) - 1)
    return float(SCALE * (within - 2 * _mean_kernel(first, second)))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("cmmd: an image's embedding is zero; expected a trained feature network")
    found: NDArray[np.float64] = wide / lengths
    return found


def _mean_kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Returns the mean of kernel - 1, whose digits would be lost beside the 1."""
    total = 0.0
    for start in range(0, len(x), CHUNK_ROWS):
        squared = 2 - 2 * x[start : start + CHUNK_ROWS] @ y.T
        total += np.expm1(-squared / (2 * SIGMA**2)).sum()
    return float(total / (len(x) * len(y)))
