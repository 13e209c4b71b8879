"""Semantic consistency: does a detector find the objects that the prompt names?

In the manner of GenEval (Ghosh et al. 2023, 2310.11513), for prompts in free text: presence, number
and position of COCO's objects (evaluation/objects.py finds them in captions and annotations).

    consistency/presence    share of the named objects that are found
    consistency/count       share of the stated numbers that are right
    consistency/position    share of the relations left, right, above and below that hold
    consistency/all         share of images with all of these right
    consistency/annotated   share of all objects annotated in the prompt's image that are found

A detector misses objects and invents others, so the figures mean little without those of the real
images, and the score above which a detection counts is chosen on real images: the threshold with
the highest F1 for presence, and the one with the most right numbers for counts. The detections of
all images are kept, a few kilobytes each, because the thresholds come last.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.detector import MIN_SCORE, Detections, Detector, load_detector
from latent_t2i.evaluation.metrics.metric import (
    Batch,
    Context,
    ImageMetric,
    MissingWeights,
    Need,
    RowName,
)
from latent_t2i.evaluation.objects import Expected, Relation, expected_of, relations_between
from latent_t2i.evaluation.processes import Group

DEFAULT_THRESHOLD = 0.3
"""GenEval's, used without real images to calibrate on."""
COUNT_THRESHOLDS = np.arange(1, 20) / 20
SHARED = "consistency/thresholds"
"""Where the row `real` leaves the thresholds for the other rows."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Scores from which a detection counts."""

    presence: float = DEFAULT_THRESHOLD
    count: float = DEFAULT_THRESHOLD
    source: str = "default, no real images with known objects"
    f1: float | None = None
    """On the real images, at `presence`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What an image should show, and what was found."""

    expected: Expected
    found: Detections


class Consistency(ImageMetric):
    """Objects of the prompt that a detector finds in the image."""

    name = "consistency"
    needs: ClassVar[frozenset[Need]] = frozenset({"captions"})
    rows: ClassVar[tuple[RowName, ...]] = ("samples", "real", "reconstruction", "shuffled")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config = context.config
        if config.oracle and config.images is None:
            raise MissingWeights("scenes have the oracle in place of a detector")
        name = config.weights.detector
        if name is None:
            raise MissingWeights(
                "needs an object detector: give --weights.detector a folder or Hub name of "
                "transformers, such as PekingU/rtdetr_r50vd"
            )
        self._key = ("detector", name, context.device)
        self.detector: Detector = context.load(
            self._key, lambda: load_detector(name, context.device)
        )
        self._images: dict[int, Judged] = {}
        self._unknown: Counter[str] = Counter()
        self.thresholds = Thresholds()

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        """Detects the objects; the values follow in `compute`, when the thresholds are known."""
        found = batch.cached(self._key, lambda: self.detector(batch.images))
        for item, detections in zip(batch.items, found, strict=True):
            expected = self._findable(expected_of(item.captions, item.objects))
            self._images[item.position] = Judged(expected=expected, found=detections)
        return [{} for _ in batch.items]

    def _findable(self, expected: Expected) -> Expected:
        """Returns what is expected, without categories that the detector does not know."""
        known = self.detector.categories
        self._unknown.update({*expected.present, *expected.known} - known)
        return replace(
            expected,
            present=tuple(name for name in expected.present if name in known),
            counts={name: num for name, num in expected.counts.items() if name in known},
            relations=tuple(r for r in expected.relations if {r.first, r.second} <= known),
            known=expected.known & known,
            known_counts={n: num for n, num in expected.known_counts.items() if n in known},
        )

    def gather(self, group: Group) -> None:
        super().gather(group)
        parts = group.gather((self._images, self._unknown))
        merged = {position: image for images, _ in parts for position, image in images.items()}
        self._images = dict(sorted(merged.items()))
        self._unknown = sum((unknown for _, unknown in parts), Counter())
        if self.context.row == "real":
            self.context.shared[SHARED] = calibrate(list(self._images.values()))

    def compute(self) -> dict[str, float]:
        """Returns the figures, at the thresholds that the row `real` has found."""
        self.thresholds = self.context.shared.get(SHARED, Thresholds())
        self.values = {p: values_of(one, self.thresholds) for p, one in self._images.items()}
        return super().compute()

    def identity(self) -> dict[str, str]:
        """Returns the detector, and the thresholds once the row `real` has found them."""
        used = self.context.shared.get(SHARED, Thresholds())
        thresholds = f"presence {used.presence:.3f}, count {used.count:.3f}; {used.source}"
        return self.detector.identity() | {"detector_threshold": thresholds}

    def details(self) -> dict[str, Any]:
        """Returns the thresholds, what was judged, and the figures of each category."""
        images = self._images.values()
        return {
            "threshold": {
                "presence": self.thresholds.presence,
                "count": self.thresholds.count,
                "source": self.thresholds.source,
                "f1_on_real_images": self.thresholds.f1,
            },
            "num_images": len(images),
            "num_images_with_named_objects": sum(bool(one.expected.present) for one in images),
            "num_stated_numbers": sum(len(one.expected.counts) for one in images),
            "num_relations": sum(len(one.expected.relations) for one in images),
            "unknown_to_the_detector": dict(self._unknown.most_common()),
            "categories": categories_of(list(images), self.thresholds),
        }


def values_of(image: Judged, thresholds: Thresholds) -> dict[str, float]:
    """Returns the values of an image; those that do not apply to it are absent."""
    expected, best = image.expected, image.found.best()
    checks = {
        "presence": [best.get(name, 0.0) >= thresholds.presence for name in expected.present],
        "count": [
            len(image.found.of(name, thresholds.count)) == num
            for name, num in expected.counts.items()
        ],
        "position": [_holds(one, image.found, thresholds) for one in expected.relations],
    }
    values = {name: float(np.mean(found)) for name, found in checks.items() if found}
    if values:
        values["all"] = float(all(all(found) for found in checks.values()))
    if expected.is_annotated and expected.known:
        found = [best.get(name, 0.0) >= thresholds.presence for name in expected.known]
        values["annotated"] = float(np.mean(found))
    return {f"consistency/{name}": value for name, value in values.items()}


def _holds(relation: Relation, found: Detections, thresholds: Thresholds) -> bool:
    """Returns whether any two detections have the relation; false if either is missing."""
    return any(
        relation.name in relations_between(first.tolist(), second.tolist())
        for first in found.of(relation.first, thresholds.presence)
        for second in found.of(relation.second, thresholds.presence)
    )


def categories_of(images: Sequence[Judged], thresholds: Thresholds) -> dict[str, dict[str, float]]:
    """Returns, by category: how often it is named, and the shares present and rightly counted."""
    table: dict[str, dict[str, list[bool]]] = {}
    for image in images:
        best = image.found.best()
        for name in image.expected.present:
            row = table.setdefault(name, {"presence": [], "count": []})
            row["presence"].append(best.get(name, 0.0) >= thresholds.presence)
            if name in image.expected.counts:
                num = len(image.found.of(name, thresholds.count))
                row["count"].append(num == image.expected.counts[name])
    ordered = sorted(table.items(), key=lambda entry: (-len(entry[1]["presence"]), entry[0]))
    return {
        name: {"num": float(len(row["presence"])), "num_counts": float(len(row["count"]))}
        | {key: float(np.mean(found)) for key, found in row.items() if found}
        for name, row in ordered
    }


def calibrate(images: Sequence[Judged]) -> Thresholds:
    """Returns the thresholds for real images whose objects are known.

    Where an image has no annotations, all captions count, and what none of them names counts as
    absent; only categories that some image has take part.
    """
    vocabulary = sorted({name for image in images for name in image.expected.known})
    if not vocabulary:
        return Thresholds()
    scores = [[image.found.best().get(name, 0.0) for name in vocabulary] for image in images]
    is_there = [[name in image.expected.known for name in vocabulary] for image in images]
    presence, f1 = best_f1(np.ravel(scores), np.ravel(is_there))
    if f1 == 0:
        return Thresholds()
    source = "annotations" if any(one.expected.is_annotated for one in images) else "captions"
    return Thresholds(
        presence=presence, count=_count_threshold(images, presence), f1=f1,
        source=f"highest F1 on {len(images)} real images with objects from their {source}",
    )  # fmt: skip


def best_f1(scores: NDArray[np.float64], is_there: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the threshold (a score counts from it on) with the highest F1, and that F1.

    Scores of 0 are objects that were not found. F1 is 2 TP / (found + present).
    """
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], np.cumsum(is_there[order])
    f1 = 2 * right / (np.arange(1, len(ranked) + 1) + is_there.sum())
    # A threshold takes all equal scores or none.
    is_last = np.append(ranked[1:] != ranked[:-1], True) & (ranked > 0)
    if not is_last.any():
        return DEFAULT_THRESHOLD, 0.0
    f1 = np.where(is_last, f1, -1)
    best = int(f1.argmax())
    lower = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float((ranked[best] + max(lower, MIN_SCORE)) / 2), float(f1[best])


def _count_threshold(images: Sequence[Judged], presence: float) -> float:
    """Returns the threshold with the most right numbers of annotated objects, or `presence`."""
    known = [
        (image.found, name, num)
        for image in images
        for name, num in image.expected.known_counts.items()
    ]
    if not known:
        return presence
    candidates = np.append(COUNT_THRESHOLDS, presence)
    right = [
        sum(len(found.of(name, threshold)) == num for found, name, num in known)
        for threshold in candidates
    ]
    # Of equally good ones, the threshold nearest to that of presence.
    return float(
        min(zip(candidates, right, strict=True), key=lambda c: (-c[1], abs(c[0] - presence)))[0]
    )
