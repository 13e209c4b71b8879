"""Mean, standard deviation and scaling factor of latents, from sums that can be merged."""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.schema import LatentKind, LatentStatistics

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""diffusers clamps the posterior's log-variance to this range before sampling."""


@dataclass(frozen=True, kw_only=True)
class LatentSums:
    """Sums over sampled latents: the number of values per channel, and sums per channel."""

    count: int = 0
    total: tuple[float, ...] = ()  # (C,)
    squares: tuple[float, ...] = ()  # (C,)

    @classmethod
    def of(cls, latents: NDArray[np.float16], kind: LatentKind, dtype: Any = np.float64) -> Self:
        """Sums stored latents (..., 2C, h, w) or (..., C, h, w).

        `dtype` is that of the individual terms; sums are always float64. A sampled latent is
        z = mean + std * noise, so E[z^2] = mean^2 + variance.
        """
        values = latents.reshape(-1, *latents.shape[-3:]).astype(dtype)
        axes = (0, 2, 3)
        squares: Any = 0.0
        if kind == "moments":
            values, log_variance = np.split(values, 2, axis=1)
            variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE))
            squares = variance.sum(axes, dtype=np.float64)
        squares = squares + np.square(values).sum(axes, dtype=np.float64)
        return cls(
            count=values.size // values.shape[1],
            total=tuple(values.sum(axes, dtype=np.float64).tolist()),
            squares=tuple(squares.tolist()),
        )

    def __add__(self, other: Self) -> Self:
        if not other.count:
            return self
        if not self.count:
            return other
        return type(self)(
            count=self.count + other.count,
            total=tuple(np.add(self.total, other.total).tolist()),
            squares=tuple(np.add(self.squares, other.squares).tolist()),
        )


def latent_statistics(sums: LatentSums) -> LatentStatistics:
    """Returns the statistics of all latents in the sums, which must not be empty."""
    mean = np.array(sums.total) / sums.count
    second = np.array(sums.squares) / sums.count
    std = np.sqrt(np.maximum(second - mean**2, 0.0))
    overall = math.sqrt(max(float(second.mean() - mean.mean() ** 2), 0.0))
    return LatentStatistics(
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        scaling_factor=1 / overall if overall else 1.0,
    )
