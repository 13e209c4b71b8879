"""Confidence intervals of metrics with a value per image: the bootstrap over prompts.

Images of one prompt depend on each other, so whole prompts are drawn with replacement, not images.
Two runs are compared by the interval of their differences per prompt, which are far less noisy than
either figure. For metrics of a distribution, such as FID, the bootstrap is wrong: duplicates lower
the rank of the covariance and raise the figure. These use disjoint sets of images instead.
"""

from collections.abc import Hashable, Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_NUM_AT_ONCE = 2**20


def interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    num: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `values`, one per image.

    Values of equal `groups`, such as the prompt, are drawn together. NaNs are left out, as in the
    mean. The interval is the percentile bootstrap's (Efron 1979) of `num` draws. Raises ValueError
    if there is no number among the values.
    """
    sums, counts = _sums_by_group(values, range(len(values)) if groups is None else groups)
    rng = np.random.default_rng(seed)
    most = max(1, _NUM_AT_ONCE // len(sums))  # draws at once: the random numbers must fit in memory
    sizes = [min(most, num - start) for start in range(0, num, most)]
    means = [_draw_means(sums, counts, rng, size) for size in sizes]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's interval (1927) of a share of `count` trials; 95 % for z = 1.96.

    For values that are 0 or 1: the bootstrap of a share of 100 % would have no width.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _sums_by_group(
    values: Sequence[float], groups: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the sum and the number of values of each group."""
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, group in zip(values, groups, strict=True):
        if not np.isnan(value):
            sums[group] = sums.get(group, 0.0) + value
            counts[group] = counts.get(group, 0) + 1
    if not sums:
        raise ValueError(f"an interval needs at least one number; found none in {len(values)}")
    return np.array(list(sums.values())), np.array(list(counts.values()), np.float64)


def _draw_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], rng: np.random.Generator, size: int
) -> NDArray[np.float64]:
    drawn = rng.integers(len(sums), size=(size, len(sums)))
    means: NDArray[np.float64] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
