"""The Inception Score (Salimans et al. 2016, 1606.03498): confident and varied classes.

exp of the mean KL divergence between an image's classes and those of all images, the mean over ten
parts. It needs no reference, knows ImageNet's classes only, and does not see whether images fit
their prompts. The parts are positions modulo 10 (torch-fidelity permutes first), so that sums per
part are enough and memory does not grow with the images.
"""

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.features import INCEPTION, Inception, load_extractor
from latent_t2i.evaluation.metrics.metric import Batch, Context, Metric
from latent_t2i.evaluation.processes import Group

NUM_PARTS = 10
NUM_CLASSES = 1008
Floats = NDArray[np.float64]


class InceptionScore(Metric):
    """Inception Score with torch-fidelity's network."""

    name = "inception_score"
    rows: ClassVar = ("samples", "real", "reconstruction")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        extractor = load_extractor(INCEPTION, context)
        assert isinstance(extractor, Inception)
        self._extractor = extractor
        self._counts = np.zeros(NUM_PARTS, np.int64)
        self._classes: Floats = np.zeros((NUM_PARTS, NUM_CLASSES))
        """Sums of p, the probabilities of the classes."""
        self._entropies: Floats = np.zeros(NUM_PARTS)
        """Sums of p log p."""

    def update(self, batch: Batch) -> None:
        shares, entropies = class_shares(self._extractor.logits(batch))
        parts = batch.positions % NUM_PARTS
        self._counts += np.bincount(parts, minlength=NUM_PARTS)
        np.add.at(self._classes, parts, shares)
        np.add.at(self._entropies, parts, entropies)

    def gather(self, group: Group) -> None:
        found = group.gather((self._counts, self._classes, self._entropies))
        self._counts, self._classes, self._entropies = (
            np.sum(sums, axis=0) for sums in zip(*found, strict=True)
        )

    def compute(self) -> dict[str, float]:
        return {"inception_score": float(np.mean(self._scores()))}

    def identity(self) -> dict[str, str]:
        return self._extractor.identity()

    def details(self) -> dict[str, Any]:
        scores = self._scores()
        return {"std_of_parts": float(np.std(scores)), "num_parts": len(scores)}

    def _scores(self) -> list[float]:
        filled = np.flatnonzero(self._counts)
        if not len(filled):
            raise ValueError("inception_score: found no images, expected at least one")
        return [
            _score(self._classes[part] / self._counts[part], self._entropies[part], count)
            for part, count in zip(filled, self._counts[filled], strict=True)
        ]


def class_shares(logits: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Returns each image's probabilities (B, 1008), and their sums of p log p (B,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    logs = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    shares = np.exp(logs)
    return shares, (shares * logs).sum(1)


def _score(mean_shares: Floats, entropies: float, count: int) -> float:
    held = mean_shares > 0
    marginal = float((mean_shares[held] * np.log(mean_shares[held])).sum())
    return math.exp(entropies / count - marginal)
