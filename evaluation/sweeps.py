"""Figures over settings or checkpoints: the best, the Pareto front, rank correlation."""

from collections.abc import Sequence
from math import isfinite

from scipy.stats import spearmanr

from latent_t2i.evaluation.figures import Direction

MIN_RANKED = 3
"""With two points a rank correlation is always 1 or -1 and says nothing."""


def pareto_front(
    points: Sequence[tuple[float, float]], better: tuple[Direction, Direction]
) -> list[int]:
    """Returns the points that no other point beats in one figure without losing in the other.

    The numbers of the points are ordered by the first figure, the best first. Equal points are all
    on the front or all off it; points that are not finite are never on it.
    """
    costs = [
        (_cost(x, better[0]), _cost(y, better[1]), number)
        for number, (x, y) in enumerate(points)
        if isfinite(x) and isfinite(y)
    ]
    front = [
        (first, second, number)
        for first, second, number in costs
        if not any((a <= first and b <= second) and (a < first or b < second) for a, b, _ in costs)
    ]
    return [number for _, _, number in sorted(front)]


def best(values: Sequence[float | None], better: Direction) -> int | None:
    """Returns the number of the best finite value, the first of equal ones; None without one."""
    found = [
        (_cost(value, better), number)
        for number, value in enumerate(values)
        if value is not None and isfinite(value)
    ]
    return min(found)[1] if found else None


def rank_correlation(xs: Sequence[float | None], ys: Sequence[float | None]) -> float | None:
    """Returns Spearman's rank correlation of the pairs in which both values are finite.

    Returns None for fewer than three pairs, or if either side is constant.
    """
    pairs = [
        (x, y)
        for x, y in zip(xs, ys, strict=True)
        if x is not None and y is not None and isfinite(x) and isfinite(y)
    ]
    if len(pairs) < MIN_RANKED or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def smooth(values: Sequence[float], weight: float = 0.5) -> list[float]:
    """Returns the exponential moving average, bias-corrected as in Adam (1412.6980, section 3)."""
    smoothed, total = [], 0.0
    for number, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        smoothed.append(total / (1 - weight**number))
    return smoothed


def _cost(value: float, better: Direction) -> float:
    return value if better == "lower" else -value
