"""MIND: the sliced Wasserstein distance of feature distributions, scaled to the size of FID.

Berthet et al. 2026 (2605.06797), the Monge Inception Distance: features are projected onto random
directions u, and sorted projections are compared,

    MIND = 3 D / (N M) * sum over M directions of sum_j (sort(X u)_j - sort(Y u)_j)^2,

as in torch-fidelity's implementation. It makes no assumption on the distribution's shape, and 5,000
images serve as well as FID's 50,000. The paper uses Inception features; here --weights.features.
"""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.feature_stats import FeatureStats, subset
from latent_t2i.evaluation.metrics.metric import FeatureMetric

NUM_DIRECTIONS = 1000
CHUNK_DIRECTIONS = 100
SEED = 2020


class Mind(FeatureMetric):
    """Monge distance, on --weights.features."""

    name = "mind"
    rows: ClassVar = ("samples", "real", "reconstruction")
    uses_rows = True

    def extractor_name(self) -> str:
        return self.context.config.weights.features

    def figures(self, stats: FeatureStats, reference: FeatureStats) -> dict[str, float]:
        return {"mind": monge_distance(stats.features, reference.features)}

    def details(self) -> dict[str, Any]:
        size = min(len(self.stats.features), len(self.reference.features))
        return {"num_images": size, "num_directions": NUM_DIRECTIONS}


def monge_distance(x: NDArray[np.float32], y: NDArray[np.float32], seed: int = SEED) -> float:
    """Returns MIND of features (N, D) and (M, D); of the larger set a random part is used."""
    if x.shape[1] != y.shape[1] or not (len(x) and len(y)):
        raise ValueError(f"mind: expected two sets of features, found {x.shape} and {y.shape}")
    rng = np.random.RandomState(seed)
    size, dim = min(len(x), len(y)), x.shape[1]
    # Unchanged if it has that size: a permutation would not matter, since projections are sorted.
    x, y = (rows if len(rows) == size else subset(rows, size, rng) for rows in (x, y))
    total = 0.0
    for _ in range(NUM_DIRECTIONS // CHUNK_DIRECTIONS):
        directions = rng.standard_normal((dim, CHUNK_DIRECTIONS))
        directions /= np.linalg.norm(directions, axis=0)
        total += float(np.square(_projected(x, directions) - _projected(y, directions)).sum())
    return 3 * dim * total / (size * NUM_DIRECTIONS)


def _projected(
    rows: NDArray[np.float32], directions: NDArray[np.float64]
) -> NDArray[np.float64]:  # (N, M)
    return np.sort(rows.astype(np.float64) @ directions, axis=0)
