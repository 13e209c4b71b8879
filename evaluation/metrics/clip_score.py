"""CLIP score: how well an image fits its prompt, 0 to 100 (Hessel et al. 2021, 2104.08718).

100 times the cosine of the image's and the text's embeddings, at least 0, averaged over the images.
The paper's clamp at 0 is for each image; torchmetrics clamps the mean only, so the two differ if an
image has a negative cosine. The constant 2.5 of the paper is left out, as in torchmetrics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_t2i.evaluation.clip_model import embed_batch, load_clip
from latent_t2i.evaluation.metrics.metric import Batch, Context, ImageMetric


class ClipScore(ImageMetric):
    """The CLIP score, with its value for each image."""

    name = "clip_score"
    needs = frozenset({"captions"})
    rows = ("samples", "real", "reconstruction", "shuffled")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._clip = load_clip(context)

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        images, texts = embed_batch(self._clip, batch)
        scores = np.maximum(100 * (images * texts).sum(-1, dtype=np.float64), 0)
        for item, score in zip(batch.items, scores, strict=True):
            if not np.isfinite(score):
                raise ValueError(
                    f"--weights.clip: the CLIP score of {item.key} with {self._clip.name} is "
                    f"{score}, expected a number"
                )
        # Reference images may have no captions; samples always have.
        return [
            {self.name: float(score)} if item.captions else {}
            for item, score in zip(batch.items, scores, strict=True)
        ]

    def details(self) -> dict[str, Any]:
        return {"num_images": sum(bool(values) for values in self.values.values())}

    def warning(self) -> str:
        return self._clip.warning

    def identity(self) -> dict[str, str]:
        return self._clip.identity()
