"""Memorisation: are drawn images closer to training images than new real images are?

For each image, its nearest training image in feature space, at distance d. The ratio is d over that
training image's mean distance to its own nearest training images. Bare distances would point at
flat pictures, which are close to each other without being copies; the ratio compares each distance
with what is usual in its neighbourhood (as in Carlini et al. 2023, 2301.13188, section 5, which
takes the neighbourhood of the drawn image). A ratio has no meaning on its own, so it is compared
with that of held-out images, which the model cannot have memorised: the row `reconstruction`,
because training images, too, have passed the VAE.

    memorisation/ratio    mean ratio of the nearest training image
    memorisation/closer   mean share of held-out images with a larger ratio; 0.5 if all is well
    memorisation/tail     share of images with a lower ratio than 99 % of the held-out images

Features of the training images are held in memory: 10,000 images at most. Of a larger training set,
copies of the other images go unseen; `details` states both numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from latent_t2i.evaluation.features import load_extractor
from latent_t2i.evaluation.metrics.metric import (
    Batch,
    Context,
    ImageMetric,
    Item,
    Need,
    RowName,
)
from latent_t2i.evaluation.processes import Group

if TYPE_CHECKING:
    from latent_t2i.evaluation.features import Extractor
    from latent_t2i.evaluation.training_set import TrainingSet

Rows = NDArray[np.float32]
NUM_NEIGHBOURS = 10
"""Training images around a training image whose mean distance is the unit."""
SAME = 1e-3
"""Training images nearer than this to each other are copies of one image: not neighbours, else the
images that a model memorises first, the repeated ones, would have no unit."""
NUM_PAIRS = 12
"""Closest pairs that are kept as pictures, of each row."""
TAIL = 0.01
EDGES = np.round(np.linspace(0, 3, 31), 1)
"""Edges of the histogram of ratios; the last bin has all larger ones."""
FOLDER = "memorisation"
BANK, GROUPS = "memorisation/bank", "memorisation/groups"
"""What the rows share through `Context.shared`."""
HELD_OUT, PROMPTS, TRAIN_PROMPTS = "held_out", "prompts", "train_prompts"
"""Labels of the groups that are compared."""
EXTRA_SHARE, MIN_EXTRA, MAX_EXTRA = 1 / 8, 16, 256
"""Number of images of each further group: a share of the samples, within limits."""


class Bank:
    """Features of training images, with the distance that is usual around each."""

    def __init__(self, features: Rows) -> None:  # (M, D)
        """Takes the features; raises ValueError if all images are the same."""
        self._features = unit(features)
        self._scales = np.full(len(features), np.nan)
        if len(features) < 2 or not (self._distances(self._features[:1]) > SAME).any():
            raise ValueError(
                f"--train-shards: found {len(features)} training images, all the same; expected at "
                "least two different ones to compare distances with"
            )

    def nearest(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns the nearest image of each row (B, D): its number (B,) and the ratio (B,)."""
        rows = unit(rows)
        numbers = self._distances(rows).argmin(1)
        # In float64, because the products above lose the distances of copies.
        difference = rows.astype(np.float64) - self._features[numbers]
        distance = np.sqrt((difference**2).sum(1))
        return numbers, distance / self._scales_of(numbers)

    def _scales_of(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        unknown = np.unique(numbers[np.isnan(self._scales[numbers])])
        if len(unknown):
            distances = self._distances(self._features[unknown])
            distances[np.arange(len(unknown)), unknown] = 0
            distances[distances <= SAME] = np.inf
            num = min(NUM_NEIGHBOURS, distances.shape[1] - 1)
            near = np.sort(np.partition(distances, num - 1, axis=1)[:, :num], axis=1)
            finite = np.isfinite(near)
            total = np.where(finite, near, 0).sum(1)
            self._scales[unknown] = np.maximum(total / np.maximum(finite.sum(1), 1), SAME)
        return self._scales[numbers]

    def _distances(self, rows: Rows) -> NDArray[np.float32]:
        """Returns the distances of rows (B, D) of unit length to all images.  # (B, M)"""
        squared = 2 - 2 * (rows @ self._features.T)
        found: NDArray[np.float32] = np.sqrt(np.clip(squared, 0, None))
        return found


def unit(rows: Rows) -> Rows:
    """Returns rows (N, D) scaled to length 1."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """An image and its nearest training image."""

    ratio: float
    number: int
    """The training image's number in its set."""
    item: Item
    image: NDArray[np.uint8]  # (H, W, 3)


class Memorisation(ImageMetric):
    """Distances of images to the training set, relative to distances within it."""

    name = "memorisation"
    needs: ClassVar[frozenset[Need]] = frozenset({"shards"})
    rows: ClassVar[tuple[RowName, ...]] = ("samples", "reconstruction", "memorisation")
    lost_without: ClassVar[Mapping[RowName, str]] = {
        "reconstruction": "without held-out images `closer` and `tail` are missing, and `ratio` "
        "has no meaning on its own"
    }
    in_sweeps = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.network: Extractor = load_extractor(context.config.weights.features, context)
        if context.training is not None:
            self._training()  # a missing VAE must show before anything is drawn
        self._groups: dict[int, tuple[str, bool]] = {}
        """By position: the group, and whether the nearest training image is the prompt's own."""
        self._pairs: list[tuple[float, int, Pair]] = []
        """A heap; the first entry is the pair with the largest ratio."""

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        """Returns the ratio of each image."""
        numbers, ratios = self._bank().nearest(self.network.features(batch))
        pairs = zip(batch.items, batch.images, numbers.tolist(), ratios.tolist(), strict=True)
        for item, image, number, ratio in pairs:
            is_own = item.key == self._training().key(number)
            self._groups[item.position] = item.group, is_own
            self._keep(Pair(ratio=ratio, number=number, item=item, image=image))
        return [{"memorisation/ratio": ratio} for ratio in ratios.tolist()]

    def _training(self) -> TrainingSet:
        assert self.context.training is not None, "the need `shards` implies it"
        return self.context.load(FOLDER, self.context.training)

    def _bank(self) -> Bank:
        """Returns the features of the training images, made once per evaluation and process."""

        def make() -> Bank:
            training = self._training()
            rows: list[Rows] = []
            bar = tqdm(total=len(training), desc="training images", unit="image", disable=None,
                       leave=False)  # fmt: skip
            with bar:
                for numbers, images in training.batches():
                    rows.append(self.network.extract(images))
                    bar.update(len(numbers))
            return Bank(np.concatenate(rows))

        return self.context.load(BANK, make)

    def _keep(self, pair: Pair) -> None:
        entry = -pair.ratio, -pair.item.position, pair
        if len(self._pairs) < NUM_PAIRS:
            heapq.heappush(self._pairs, entry)
        elif entry > self._pairs[0]:
            heapq.heapreplace(self._pairs, entry)

    def gather(self, group: Group) -> None:
        super().gather(group)
        parts = group.gather((self._groups, self._pairs))
        self._groups = {p: found for groups, _ in parts for p, found in groups.items()}
        self._pairs = sorted((e for _, pairs in parts for e in pairs), key=lambda e: (-e[0], -e[1]))
        self._pairs = self._pairs[:NUM_PAIRS]
        self._share_ratios()
        if group.is_main and self.context.out is not None:
            self._write_pairs(self.context.out)

    def _share_ratios(self) -> None:
        """Leaves the row's ratios by group, for the rows that compare theirs with them."""
        found: dict[str, list[tuple[float, bool]]] = {}
        for position, values in self.values.items():
            name, is_own = self._groups[position]
            label = HELD_OUT if self.context.row == "reconstruction" else name or PROMPTS
            found.setdefault(label, []).append((values["memorisation/ratio"], is_own))
        self.context.shared.setdefault(GROUPS, {}).update(found)

    def _held_out(self) -> NDArray[np.float64]:
        """Returns the ratios of the held-out images, ascending; empty without them."""
        found = self.context.shared.get(GROUPS, {}).get(HELD_OUT, [])
        return np.sort([ratio for ratio, _ in found])

    def compute(self) -> dict[str, float]:
        """Returns the means; the further groups have theirs in `details`."""
        if self.context.row == "memorisation":
            return {}
        held_out = self._held_out()
        if self.context.row == "samples" and held_out.size:
            for values in self.values.values():
                values |= against(values["memorisation/ratio"], held_out)
        return super().compute()

    def identity(self) -> dict[str, str]:
        training = self._training()
        return self.network.identity() | {
            "train_sha256": training.sha256,
            "num_train_images": str(len(training)),
            "num_neighbours": str(NUM_NEIGHBOURS),
        }

    def details(self) -> dict[str, Any]:
        """Returns the closest pairs and, for the samples, the ratios of all groups."""
        pairs = [
            {
                "file": self._file(rank) if self.context.out is not None else None,
                "position": pair.item.position,
                "group": pair.item.group,
                "prompt": pair.item.captions[0] if pair.item.captions else "",
                "ratio": pair.ratio,
                "train_key": self._training().key(pair.number),
                "train_caption": self._training().caption(pair.number),
            }
            for rank, (_, _, pair) in enumerate(self._pairs)
        ]
        if self.context.row != "samples":
            return {"pairs": pairs}
        held_out, groups = self._held_out(), self.context.shared.get(GROUPS, {})
        return {
            "pairs": pairs,
            "num_train_images": len(self._training()),
            "num_train_records": self._training().num_records,
            "edges": EDGES.tolist(),
            "groups": {label: summarise(found, held_out) for label, found in groups.items()},
        }

    def _file(self, rank: int) -> str:
        return f"{FOLDER}/{self.context.row}-{rank:02d}.png"

    def _write_pairs(self, out: Path) -> None:
        """Writes each pair as one picture: the image, then the training image."""
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        for leftover in (out / FOLDER).glob(f"{self.context.row}-*.png"):
            leftover.unlink()
        for rank, (_, _, pair) in enumerate(self._pairs):
            pictures = [
                Image.fromarray(p) for p in (pair.image, self._training().image(pair.number))
            ]
            sheet = Image.new(
                "RGB", (sum(p.width for p in pictures), max(p.height for p in pictures))
            )
            sheet.paste(pictures[0], (0, 0))
            sheet.paste(pictures[1], (pictures[0].width, 0))
            sheet.save(out / self._file(rank))


def against(ratio: float, held_out: NDArray[np.float64]) -> dict[str, float]:
    """Returns where a ratio lies among those of held-out images, given in ascending order."""
    below = np.searchsorted(held_out, ratio, side="left")
    equal = np.searchsorted(held_out, ratio, side="right") - below
    return {
        "memorisation/closer": float(1 - (below + equal / 2) / len(held_out)),
        "memorisation/tail": float(ratio < np.quantile(held_out, TAIL)),
    }


def summarise(found: Sequence[tuple[float, bool]], held_out: NDArray[np.float64]) -> dict[str, Any]:
    """Returns a group's distribution of ratios, and its comparison with held-out images."""
    ratios = np.array([ratio for ratio, _ in found])
    summary: dict[str, Any] = {
        "num": len(ratios),
        "mean": float(ratios.mean()),
        "quantiles": {str(q): float(np.quantile(ratios, q)) for q in (0.0, 0.01, 0.05, 0.25, 0.5)},
        "histogram": np.histogram(np.minimum(ratios, EDGES[-1]), EDGES)[0].tolist(),
        "own_image": float(np.mean([is_own for _, is_own in found])),
    }
    if held_out.size:
        compared = [against(ratio, held_out) for ratio in ratios.tolist()]
        summary |= {
            name.partition("/")[2]: float(np.mean([one[name] for one in compared]))
            for name in compared[0]
        }
    return summary


def extra_items(
    items: Sequence[Item], training: TrainingSet, guidance_scale: float
) -> dict[float, list[Item]]:
    """Returns what is drawn for this metric only, by guidance scale; positions are unique.

    Captions of training images, at guidance 1 and at the main scale, and prompts of the samples at
    guidance 1: guidance drives memorisation (2509.25705), and so do training captions.
    """
    num = min(max(int(len(items) * EXTRA_SHARE), MIN_EXTRA), MAX_EXTRA)
    numbers = np.unique(np.linspace(0, len(training) - 1, num).astype(np.int64)).tolist()
    train = [
        Item(position=0, key=training.key(n), captions=(training.caption(n),), group=TRAIN_PROMPTS)
        for n in numbers
    ]
    spread = np.unique(np.linspace(0, len(items) - 1, num).astype(np.int64)).tolist()
    own = [replace(items[n], group=PROMPTS) for n in spread]
    groups = {guidance_scale: train} | ({1.0: train + own} if guidance_scale != 1 else {})
    found: dict[float, list[Item]] = {}
    start = 0
    for scale, part in groups.items():
        found[scale] = [
            replace(item, position=start + n, group=f"{item.group}@g{scale:g}")
            for n, item in enumerate(part)
        ]
        start += len(part)
    return found
