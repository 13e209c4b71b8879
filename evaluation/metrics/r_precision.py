"""R-precision: how often CLIP finds an image's caption among 99 others.

Xu et al. (2018, 1711.10485) with CLIP in the place of their network. The other captions are those
of the row's images, chosen by the seed and the image's position, so that neither batches nor
processes change them. Main trade-off: the embeddings of at most KEEP images are held, which keeps
memory flat; with more images, the figure is that of a random part of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.clip_model import embed_batch, load_clip
from latent_t2i.evaluation.metrics.metric import Batch, Context, ImageMetric, merge
from latent_t2i.evaluation.processes import Group

NUM_CAPTIONS = 100
KEEP = 10_000
TIE = 1e-6
"""Cosines this close are equal: rounding depends on the order of summation."""
_KEPT, _OTHERS = 3, 4  # separate the random streams


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """An image and its caption."""

    caption: str
    image: NDArray[np.float32]  # (D,)
    text: NDArray[np.float32]  # (D,)


class RPrecision(ImageMetric):
    """The share of images whose own caption is the best of 100, with its value for each image.

    A row of fewer different captions uses all of them, and the figure's name says how many.
    """

    name = "r_precision"
    needs = frozenset({"captions"})
    rows = ("samples", "real", "reconstruction", "shuffled")

    def __init__(self, context: Context, keep: int = KEEP) -> None:
        super().__init__(context)
        self._clip = load_clip(context)
        self._seed, self._keep = context.config.seed, keep
        self._kept: dict[int, Embedded] = {}
        self._num_images = 0

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        images, texts = embed_batch(self._clip, batch)
        for item, image, text in zip(batch.items, images, texts, strict=True):
            if item.captions:  # reference images may have none
                caption = item.captions[0]
                self._kept[item.position] = Embedded(caption=caption, image=image, text=text)
                self._num_images += 1
        if len(self._kept) > 2 * self._keep:
            self._kept = self._choose(self._kept)
        return [{} for _ in batch.items]  # known when the row is complete

    def gather(self, group: Group) -> None:
        self._num_images = sum(group.gather(self._num_images))
        self._kept = self._choose(merge(group, self._choose(self._kept)))
        ranks = rank_first(self._kept, self._seed)
        self.values = {position: {self._figure: value} for position, value in ranks.items()}

    def details(self) -> dict[str, Any]:
        return {
            "num_captions": self._num_captions,
            "num_images": self._num_images,
            "num_images_used": len(self._kept),
        }

    def warning(self) -> str:
        return self._clip.warning

    def identity(self) -> dict[str, str]:
        return self._clip.identity()

    @property
    def _num_captions(self) -> int:
        return min(NUM_CAPTIONS, len({kept.caption for kept in self._kept.values()}))

    @property
    def _figure(self) -> str:
        num = self._num_captions
        return self.name if num == NUM_CAPTIONS else f"{self.name}/of_{num}"

    def _choose(self, kept: Mapping[int, Embedded]) -> dict[int, Embedded]:
        """Returns the images of the `keep` smallest keyed random numbers, by position."""
        if len(kept) <= self._keep:
            return dict(kept)
        order = sorted(kept, key=lambda p: np.random.default_rng([_KEPT, self._seed, p]).random())
        return {position: kept[position] for position in sorted(order[: self._keep])}


def rank_first(kept: Mapping[int, Embedded], seed: int) -> dict[int, float]:
    """Returns by position whether the image's own caption is the best of up to 100.

    Ties share the place: with one equal caption the value is 1/2, so that embeddings that are all
    alike reach the level of chance. There are no values if all captions are the same.
    """
    texts = {item.caption: item.text for item in kept.values()}
    captions = sorted(texts)
    if len(captions) < 2:
        return {}
    numbers = {caption: number for number, caption in enumerate(captions)}
    stacked = np.stack([texts[caption] for caption in captions])  # (C, D)
    found = {}
    for position, item in kept.items():
        own = numbers[item.caption]
        others = _choose_others(len(captions), own, [_OTHERS, seed, position])
        ahead = stacked[others] @ item.image - stacked[own] @ item.image
        num_equal = int((np.abs(ahead) <= TIE).sum())
        found[position] = 0.0 if (ahead > TIE).any() else 1 / (1 + num_equal)
    return found


def _choose_others(num: int, own: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Returns up to 99 different numbers below `num`, without `own`."""
    size = min(NUM_CAPTIONS, num) - 1
    others = np.random.default_rng(seed).choice(num - 1, size, replace=False)
    return others + (others >= own)
