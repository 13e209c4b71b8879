"""Precision, recall, density and coverage: the share of one set near the other, in feature space.

Precision and recall (Kynkaanniemi et al. 2019, 1904.06991), density and coverage (Naeem et al.
2020, 2002.09797), with 5 nearest neighbours as in the package prdc. Precision says whether samples
look real, recall and coverage how much of the reference's variety they show. Coverage tolerates
outliers and needs the fewest images.
"""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.feature_stats import FeatureStats
from latent_t2i.evaluation.metrics.metric import FeatureMetric

NUM_NEIGHBOURS = 5
CHUNK_ROWS = 250
Floats = NDArray[np.float64]


class Prdc(FeatureMetric):
    """Precision, recall, density and coverage, on --weights.features."""

    name = "prdc"
    rows: ClassVar = ("samples", "real", "reconstruction")
    uses_rows = True

    def extractor_name(self) -> str:
        return self.context.config.weights.features

    def figures(self, stats: FeatureStats, reference: FeatureStats) -> dict[str, float]:
        return prdc(reference.features, stats.features)

    def details(self) -> dict[str, Any]:
        counts = len(self.stats.features), len(self.reference.features)
        return {
            "num_images": counts[0],
            "num_reference": counts[1],
            "num_neighbours": _neighbours(*counts, NUM_NEIGHBOURS),
        }


def prdc(
    real: NDArray[np.float32], fake: NDArray[np.float32], num_neighbours: int = NUM_NEIGHBOURS
) -> dict[str, float]:
    """Returns the four figures of features (N, D) and (M, D).

    With too few images for `num_neighbours`, all but one of the smaller set are neighbours.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(
            f"prdc: found {len(fake)} images and {len(real)} of the reference, expected at least 2 "
            "of each"
        )
    k = _neighbours(len(real), len(fake), num_neighbours)
    first, second = real.astype(np.float64), fake.astype(np.float64)
    real_radii, fake_radii = _radii(first, k), _radii(second, k)
    inside_real = np.zeros(len(fake), np.int64)
    recalled, covered = 0, 0
    for start in range(0, len(first), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        distances = _distances(first[chunk], second)  # (chunk, M)
        inside_real += (distances < real_radii[chunk, None]).sum(0)
        recalled += int((distances < fake_radii).any(1).sum())
        covered += int((distances.min(1) < real_radii[chunk]).sum())
    return {
        "precision": float((inside_real > 0).mean()),
        "recall": recalled / len(real),
        "density": float(inside_real.mean() / k),
        "coverage": covered / len(real),
    }


def _neighbours(num_real: int, num_fake: int, wanted: int) -> int:
    return min(wanted, num_real - 1, num_fake - 1)


def _radii(rows: Floats, k: int) -> Floats:
    """Returns the distance of each row to its k-th nearest other row."""
    found = []
    for start in range(0, len(rows), CHUNK_ROWS):
        distances = _distances(rows[start : start + CHUNK_ROWS], rows)
        # The row itself is the nearest.
        found.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(found)


def _distances(x: Floats, y: Floats) -> Floats:
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.clip(squared, 0, None))
