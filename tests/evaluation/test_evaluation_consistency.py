"""Semantic consistency: objects of captions and annotations, values, calibration, detectors."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, pipeline

from latent_t2i.evaluation import detector as detector_module
from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.detector import MIN_SCORE, load_detector, make_detections
from latent_t2i.evaluation.metrics import metric_class
from latent_t2i.evaluation.metrics.consistency import Consistency, best_f1
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, MissingWeights, RowName
from latent_t2i.evaluation.objects import (
    CATEGORIES,
    OPPOSITE,
    add_objects,
    category_of,
    coco_id,
    expected_of,
    find_mentions,
    relations_between,
)
from latent_t2i.evaluation.processes import Group
from latent_t2i.model.encoders import quiet
from tests import detectors

LEFT, RIGHT = (0.0, 0.4, 0.2, 0.2), (0.8, 0.4, 0.2, 0.2)
TOP, MIDDLE = (0.4, 0.0, 0.2, 0.2), (0.4, 0.4, 0.2, 0.2)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two small brown dogs and a cat.", {"dog": 2, "cat": 1}),
        ("A couple of men and a woman", {"person": 3}),
        ("Several people on bicycles", {"person": None, "bicycle": None}),
        ("a hot dog next to a teddy bear", {"hot dog": 1, "teddy bear": 1}),
        ("A train station with no trains", {}),
        ("an orange cat eats oranges", {"cat": 1, "orange": None}),
        ("an orange and white bus, an orange.", {"bus": None, "orange": 1}),
        ("a pair of scissors beside knives", {"scissors": None, "knife": None}),
        ("A baby elephant and a tv remote", {"elephant": 1, "remote": 1}),
        ("the man's dog, cat, and 3 sheep", {"person": None, "dog": None, "cat": None, "sheep": 3}),
        ("Two men riding horses", {"person": 2, "horse": None}),
        ("baseball players at bat", {"person": None}),
        ("A MAN rides an aeroplane", {"person": 1, "airplane": 1}),
        ("nothing of the kind", {}),
    ],
)
def test_captions_name_categories_with_numbers(
    caption: str, expected: dict[str, int | None]
) -> None:
    found: dict[str, int | None] = {}
    for mention in find_mentions(caption):
        before = found.get(mention.category, 0)
        known = mention.number is not None and before is not None
        found[mention.category] = before + mention.number if known else None
    assert found == expected


def test_every_category_is_found_alone_and_in_a_sentence() -> None:
    for category in CATEGORIES:
        assert category_of(category) == category
        assert [m.category for m in find_mentions(f"a photo of the {category}.")] == [category]


words = st.sampled_from(
    ["a", "two", "10", "no", "of", "orange", "hot", "dog", "dogs", "'s", ",", "é"]
)


@given(st.lists(words).map(" ".join))
def test_any_text_is_a_caption(text: str) -> None:
    for mention in find_mentions(text):
        assert mention.category in CATEGORIES and mention.start < mention.end


@pytest.mark.parametrize(
    ("caption", "relation"),
    [
        ("a dog to the left of a cat", ("dog", "left", "cat")),
        ("a dog sits right of a cat", ("dog", "right", "cat")),
        ("a man standing on top of a red car", ("person", "above", "car")),
        ("a cat is sleeping under the table", ("cat", "below", "dining table")),
        ("a dog on the left and a cat on the right", ("dog", "left", "cat")),
        ("a dog next to a cat", None),
        ("a dog on the left", None),
    ],
)
def test_captions_state_relations(caption: str, relation: tuple[str, str, str] | None) -> None:
    found = [(r.first, r.name, r.second) for r in expected_of([caption], ()).relations]
    assert found == ([] if relation is None else [relation])


def objects(*entries: tuple[str, tuple[float, ...]], crowd: bool = False) -> list[dict[str, Any]]:
    return [{"category": name, "bbox": box, "crowd": crowd} for name, box in entries]


def test_annotations_confirm_what_a_caption_names() -> None:
    annotated = objects(("cat", LEFT), ("dog", RIGHT), ("cup", TOP))
    found = expected_of(["a cat, a dog and a mouse", "a cup"], annotated)
    assert found.present == ("cat", "dog")
    assert found.counts == {"cat": 1, "dog": 1}
    assert [(r.first, r.name, r.second) for r in found.relations] == [("cat", "left", "dog")]
    assert found.known == {"cat", "dog", "cup"}
    # Of two cats, "a cat" states no number, "two cats" does; a crowd has none.
    two = objects(("cat", LEFT), ("cat", RIGHT))
    assert expected_of(["a cat"], two).counts == {}
    assert expected_of(["two cats"], two).counts == {"cat": 2}
    assert expected_of(["three cats"], two).counts == {"cat": 3}
    assert expected_of([], two).counts == {"cat": 2}
    assert expected_of([], objects(("cat", LEFT), crowd=True)).counts == {}


def test_without_annotations_all_captions_are_known() -> None:
    found = expected_of(["a dog", "two cats"], ())
    assert (found.present, found.counts) == (("dog",), {})
    assert found.known == {"dog", "cat"} and not found.is_annotated


side = st.floats(0.01, 0.5)
boxes = st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), side, side)


@given(boxes, boxes)
def test_relations_are_antisymmetric(first: Any, second: Any) -> None:
    there, back = relations_between(first, second), relations_between(second, first)
    assert back == {OPPOSITE[name] for name in there}
    assert relations_between(first, first) == frozenset()


def test_relations_follow_the_rule_of_geneval() -> None:
    assert relations_between(LEFT, RIGHT) == {"left"}
    assert relations_between(TOP, MIDDLE) == {"above"}
    assert relations_between((0, 0, 0.1, 0.1), (0.8, 0.8, 0.1, 0.1)) == {"left", "above"}
    # The centres differ by 0.1, the boxes' sizes add up to 1: no relation.
    assert relations_between((0, 0, 0.5, 0.5), (0.1, 0, 0.5, 0.5)) == frozenset()


def context(row: RowName, found: Sequence[detectors.Found], **changes: Any) -> Context:
    config = EvaluationConfig(
        name="x", oracle=False, captions="x", weights=WeightsConfig(detector="fixed")
    )
    shared: dict[Any, Any] = {("detector", "fixed", "cpu"): detectors.Fixed(found, **changes)}
    return Context(config=config, row=row, shared=shared)


def feed(metric: Consistency, items: Sequence[Item], batch_size: int = 2) -> Consistency:
    """Feeds images whose first pixel is their position."""
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        images = np.zeros((len(part), 8, 8, 3), np.uint8)
        images[:, 0, 0, 0] = [item.position for item in part]
        metric.update(Batch(images=images, items=part))
    metric.gather(Group())
    return metric


FOUND: list[detectors.Found] = [
    [("dog", 0.9, LEFT), ("dog", 0.8, TOP), ("cat", 0.7, RIGHT)],
    [("dog", 0.6, RIGHT), ("cat", 0.2, LEFT)],
    [],
]
ITEMS = [
    Item(position=0, key="0", captions=("two dogs to the left of a cat",)),
    Item(position=1, key="1", captions=("two dogs to the left of a cat",)),
    Item(position=2, key="2", captions=("clouds",)),
]


def test_values_are_shares_of_what_the_prompt_states() -> None:
    metric = feed(Consistency(context("samples", FOUND)), ITEMS)
    figures = metric.compute()
    # The second image lacks the cat, has one dog, and has them the other way round.
    assert metric.values == {
        0: {"consistency/presence": 1, "consistency/count": 1, "consistency/position": 1,
            "consistency/all": 1},
        1: {"consistency/presence": 0.5, "consistency/count": 0, "consistency/position": 0,
            "consistency/all": 0},
        2: {},
    }  # fmt: skip
    assert figures["consistency/presence"] == 0.75
    details = metric.details()
    assert details["threshold"]["source"].startswith("default")
    stamped = metric.identity()["detector_threshold"]
    assert stamped.startswith("presence 0.300, count 0.300; default, no real images")
    assert details["num_images_with_named_objects"] == 2
    assert details["categories"]["dog"] == {"num": 2, "num_counts": 2, "presence": 1, "count": 0.5}
    assert json.dumps(details)


def test_real_images_set_the_threshold_of_all_rows() -> None:
    # On the real images a dog has 0.15 or more; 0.1 is a false one.
    found: list[detectors.Found] = [
        [("dog", 0.15, LEFT)],
        [("dog", 0.4, LEFT), ("dog", 0.3, RIGHT)],
        [("dog", 0.1, LEFT), ("cat", 0.6, LEFT)],
    ]
    items = [
        Item(position=0, key="0", captions=("a dog",), objects=tuple(objects(("dog", LEFT)))),
        Item(position=1, key="1", captions=("two dogs",),
             objects=tuple(objects(("dog", LEFT), ("dog", RIGHT)))),
        Item(position=2, key="2", captions=("a cat",), objects=tuple(objects(("cat", LEFT)))),
    ]  # fmt: skip
    here = context("real", found)
    real = feed(Consistency(here), items)
    assert real.compute() == {
        "consistency/presence": 1, "consistency/count": 1, "consistency/all": 1,
        "consistency/annotated": 1,
    }  # fmt: skip
    threshold = real.details()["threshold"]
    assert 0.1 < threshold["presence"] < 0.15 and threshold["f1_on_real_images"] == 1
    stamped = real.identity()["detector_threshold"]
    assert (
        stamped == "presence 0.125, count 0.125; highest F1 on 3 real images with objects from "
        "their annotations"
    )
    samples = feed(Consistency(replace(here, row="samples")), items)
    samples.compute()
    assert samples.thresholds == real.thresholds


def test_shuffled_captions_reuse_the_detections() -> None:
    here = context("samples", FOUND)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = [0, 1]
    batch = Batch(images=images, items=ITEMS[:2])
    rows = [Consistency(replace(here, row=row)) for row in ("samples", "shuffled")]
    rows[0].update(batch)
    rows[1].update(batch.with_items(ITEMS[:2][::-1]))
    assert rows[0].detector.num_calls == 1  # type: ignore[attr-defined]


def test_figures_do_not_depend_on_batches_or_processes() -> None:
    whole = feed(Consistency(context("samples", FOUND)), ITEMS, batch_size=3)
    parts = [Consistency(context("samples", FOUND)) for _ in range(2)]
    for part, items in zip(parts, (ITEMS[1:], ITEMS[:1]), strict=True):
        feed(part, items, batch_size=1)

    class Two(Group):
        def gather(self, value: Any) -> list[Any]:
            kind = 0 if isinstance(value, dict) else 1
            return [(part.values, (part._images, part._unknown))[kind] for part in parts]

    merged = Consistency(context("samples", FOUND))
    merged.gather(Two())
    assert merged.compute() == whole.compute()
    assert merged.details() == whole.details()


def test_categories_that_the_detector_does_not_know_are_listed() -> None:
    metric = feed(Consistency(context("samples", FOUND, categories=["dog"])), ITEMS)
    assert metric.compute()["consistency/presence"] == 1
    assert metric.details()["unknown_to_the_detector"] == {"cat": 2}


def test_prompts_without_objects_give_no_figures() -> None:
    metric = feed(
        Consistency(context("samples", [[]])), [Item(position=0, key="", captions=("x",))]
    )
    assert metric.compute() == {}
    assert metric.details()["num_images_with_named_objects"] == 0


scored = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=1, max_size=20
)


@given(scored)
def test_threshold_has_the_highest_f1(pairs: list[tuple[float, bool]]) -> None:
    scores, there = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])

    def f1(threshold: float) -> float:
        found = scores >= threshold
        return 2 * float((found & there).sum()) / max(float(found.sum() + there.sum()), 1)

    threshold, best = best_f1(scores, there)
    if scores.any():
        assert f1(threshold) == pytest.approx(best)
        assert best == pytest.approx(max(f1(score) for score in scores[scores > 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": WeightsConfig()}, "needs an object detector: give --weights.detector"),
        ({"oracle": True, "captions": None}, "the oracle"),
    ],
)
def test_missing_detector_is_skipped_with_a_reason(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"name": "x", "oracle": False, "captions": "x"}
    config = EvaluationConfig(**settings | changes)
    with pytest.raises(MissingWeights, match=message):
        Consistency(Context(config=config))
    assert metric_class("consistency") is Consistency


def test_overlapping_detections_are_one_object() -> None:
    almost = (0.01, 0.4, 0.2, 0.2)
    found = make_detections(
        [0, 0, 1, -1, 0], [0.5, 0.9, 0.8, 0.9, MIN_SCORE / 2], [LEFT, almost, LEFT, LEFT, RIGHT]
    )
    assert found.labels.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])
    np.testing.assert_allclose(found.of("person", 0.5), [almost], rtol=1e-6)
    assert found.best() == pytest.approx({"person": 0.9, "bicycle": 0.8})


@pytest.fixture(scope="module")
def noise() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 255, (2, 48, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["rt_detr", "detr"])
def test_closed_detectors_find_what_transformers_finds(kind: str, noise: Any) -> None:
    from PIL import Image

    detector = load_detector(str(detectors.folder(kind)))
    assert detector.categories == {"person", "tv", "dog"}  # "tvmonitor" is a tv
    found = detector(noise)
    with quiet():
        reference = pipeline("object-detection", str(detectors.folder(kind)), device="cpu")
        expected = reference(Image.fromarray(noise[0]), threshold=MIN_SCORE)
    known = [one for one in expected if category_of(one["label"]) is not None]
    best = max(known, key=lambda one: one["score"])
    assert found[0].scores[0] == pytest.approx(best["score"], abs=1e-5)
    assert len(found) == 2 and len(found[0].labels) <= len(known)
    assert found[0].boxes.min() >= 0 and (found[0].boxes[:, :2] + found[0].boxes[:, 2:]).max() <= 1
    assert set(detector.identity()) == {"detector", "detector_sha256", "detector_resize"}


def test_owl_finds_what_its_own_queries_find(noise: Any) -> None:
    detector = load_detector(str(detectors.folder("owlvit")))
    texts = [detector_module.QUERY.format(category) for category in CATEGORIES]
    tokens = AutoTokenizer.from_pretrained(detectors.folder("owlvit"))(
        texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    pixels = detector._processor(images=list(noise[:1]), return_tensors="pt")
    with torch.inference_mode():
        outputs = detector._network(**pixels, **tokens)
    scores = outputs.logits[0].sigmoid()  # (patches, categories)
    found = detector(noise)[0]
    assert found.scores[0] == pytest.approx(float(scores.max()), abs=1e-5)
    assert scores[:, found.labels[0]].max() == pytest.approx(float(scores.max()), abs=1e-5)


def test_grounding_dino_reads_one_text_of_all_categories(noise: Any) -> None:
    folder = detectors.folder("grounding_dino")
    detector = load_detector(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(". ".join(CATEGORIES) + ".")["input_ids"]
    assert detector._inputs["input_ids"][0].tolist() == ids
    spans = [tokenizer.decode(ids[span]) for span in detector._spans]
    assert spans == list(CATEGORIES)
    found = detector(noise)
    assert len(found) == 2 and found[0].labels.size


def test_other_models_are_refused(tmp_path: Path) -> None:
    from latent_t2i.model.paths import ROOT

    with pytest.raises(ValueError, match="is a 'clip' model; expected an object detector"):
        load_detector(str(ROOT / "scenes" / "encoders" / "clip"))
    with pytest.raises(ValueError, match=r"--weights\.detector: no folder"):
        load_detector(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="labels such as a; expected some of COCO's"):
        detector_module._closed_labels({0: "a"}, tmp_path)


def test_annotated_objects_belong_to_images_of_either_layout(tmp_path: Path) -> None:
    document = {
        "categories": [{"id": 7, "name": "dog"}],
        "images": [{"id": 42, "file_name": "000000000042.jpg", "width": 100, "height": 50}],
        "annotations": [{"image_id": 42, "bbox": [10, 10, 50, 25], "category_id": 7}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    items = [
        Item(position=0, key="COCO_val2014_000000000042.jpg"),
        Item(position=1, key="000000000043.jpg"),
    ]
    found = add_objects(items, str(path))
    assert found[0].objects == ({"category": "dog", "bbox": (0.1, 0.2, 0.5, 0.5), "crowd": False},)
    assert found[1].objects == ()
    assert add_objects(items, None) == items
    with pytest.raises(ValueError, match=r"has no objects of the 1 images.*000000000043"):
        add_objects(items[1:], str(path))
    path.write_text(json.dumps(document | {"annotations": [{"image_id": 1}]}))
    with pytest.raises(ValueError, match="is not a COCO instances file: KeyError"):
        add_objects(items, str(path))
    with pytest.raises(ValueError, match="--objects: no file"):
        add_objects(items, str(tmp_path / "none.json"))


@given(st.integers(0, 10**12 - 1), st.sampled_from(["", "COCO_val2014_", "COCO_train2014_"]))
def test_coco_ids_are_read_from_either_layout(number: int, prefix: str) -> None:
    name = f"{prefix}{number:012d}"
    assert {coco_id(name), coco_id(f"val2017/{name}.jpg")} == {number}
    assert coco_id(f"{number:011d}x") is None
