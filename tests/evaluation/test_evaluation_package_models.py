"""The pretrained networks from packages recognise photographs and captions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import models_in_packages as models

BEAR, ZEBRAS = "000000249346.jpg", "000000281789.jpg"


def photograph(folder: Path, name: str) -> Image.Image:
    return Image.open(folder / "train2017" / name)


def test_every_category_has_its_label(coco_mini: Path) -> None:
    document = json.loads((coco_mini / "annotations/instances_val2017.json").read_text())
    named = {number: label for number, label in enumerate(models.LABELS, 1) if label}
    assert named == {category["id"]: category["name"] for category in document["categories"]}


@pytest.mark.slow
def test_the_detector_finds_objects(coco_mini: Path) -> None:
    image = photograph(coco_mini, ZEBRAS)
    found = models.detector(0.5)(image)
    assert [label for label, _, _ in found] == ["zebra", "zebra"]
    for _, score, (x0, y0, x1, y1) in found:
        assert score > 0.9
        assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
    assert models.detector(0.5)(Image.new("RGB", (64, 64))) == []


@pytest.mark.slow
def test_embeddings_of_alike_sentences_are_near() -> None:
    found = models.sentence_embedder()(["a dog runs", "a puppy is running fast", "a red bus"])
    assert found.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    alike, other = found[0] @ found[1], found[0] @ found[2]
    assert alike > 0.5 > 0.3 > other


@pytest.mark.slow
def test_the_classifier_recognises_animals(coco_mini: Path) -> None:
    images = [photograph(coco_mini, name) for name in (ZEBRAS, BEAR)]
    features, logits = models.image_classifier()(images)
    assert int(logits[0].argmax()) == 340, "ImageNet's zebra"
    assert models.image_features()(images).shape == (2, 1280)
    np.testing.assert_array_equal(models.image_features()(images), features.numpy())
