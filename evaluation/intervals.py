"""Confidence intervals of metrics with a value per image: the bootstrap over prompts.

Images of one prompt depend on each other, so whole prompts are drawn with replacement, not images.
Two runs on the same prompts are compared by the differences per prompt, which are far less noisy
than either figure. For metrics of a distribution, such as FID, the bootstrap is wrong: duplicates
lower the rank of the covariance and raise the figure; these use disjoint sets instead.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

K = TypeVar("K", bound=Hashable)
LEVEL = 0.95
_NUM_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean difference of two runs on the same prompts."""

    mean: float
    """The first run's figure minus the second's."""
    low: float
    high: float
    num: int
    """Number of images that both have."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Mapping[K, float],
    groups: Mapping[K, Hashable] | None = None,
    *,
    num: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `values`, by key such as the image's position.

    Values of equal `groups`, such as the prompt, are drawn together; NaNs are left out, as in the
    mean. The interval is the percentile bootstrap's (Efron 1979). It has no width for one group.
    Raises ValueError if no value is left.
    """
    sums, counts = _sums_by_group(values, groups)
    rng = np.random.default_rng(seed)
    # The order of the groups does not matter to the draw, only their number.
    means = [_draw_means(sums, counts, rng, size) for size in _sizes(num, len(sums))]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def paired_difference(
    one: Mapping[K, float],
    other: Mapping[K, float],
    groups: Mapping[K, Hashable] | None = None,
    *,
    num: int = 1000,
    seed: int = 0,
) -> Difference:
    """Returns the mean of `one` minus `other` over the keys that both have, with its interval.

    Raises ValueError if they have no key in common.
    """
    differences = {key: value - other[key] for key, value in one.items() if key in other}
    differences = {key: value for key, value in differences.items() if not np.isnan(value)}
    if not differences:
        raise ValueError(
            f"a paired difference needs common prompts; found none among {len(one)} and "
            f"{len(other)} values"
        )
    low, high = bootstrap(differences, groups, num=num, seed=seed)
    mean = float(np.mean(list(differences.values())))
    return Difference(mean=mean, low=low, high=high, num=len(differences))


def _sums_by_group(
    values: Mapping[K, float], groups: Mapping[K, Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the sum and the number of values of each group."""
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for key, value in values.items():
        if not np.isnan(value):
            name = key if groups is None else groups[key]
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1
    if not sums:
        raise ValueError(f"an interval needs at least one number; found none in {len(values)}")
    return np.array(list(sums.values())), np.array(list(counts.values()), np.float64)


def _sizes(num: int, num_groups: int) -> list[int]:
    """Splits `num` draws into parts whose random numbers fit into memory."""
    most = max(1, _NUM_AT_ONCE // num_groups)
    return [min(most, num - start) for start in range(0, num, most)]


def _draw_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], rng: np.random.Generator, size: int
) -> NDArray[np.float64]:
    drawn = rng.integers(len(sums), size=(size, len(sums)))
    means: NDArray[np.float64] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
