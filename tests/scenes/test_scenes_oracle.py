"""The oracle: exact on rendered scenes, and strict on images that show no shape."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from diffusers import AutoencoderKL

from latent_t2i.model.paths import ROOT
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.oracle import check, detect
from latent_t2i.scenes.train_encoders import oracle_accuracy, round_trip
from latent_t2i.scenes.world import INVERSE, WORLDS, Scene, Split, stream
from tests.scenes import impostors


def some_scenes(world: str, num: int, split: Split = "val") -> list[Scene]:
    return [scene for scene, _ in islice(stream(WORLDS[world], split, 21), num)]


def first_with(num_objects: int) -> Scene:
    return next(s for s in some_scenes("full", 50) if len(s.objects) == num_objects)


@pytest.mark.parametrize(
    ("world", "split"), [("easy", "val"), ("full", "val"), ("full", "held_out")]
)
def test_rendered_scenes_are_detected(world: str, split: Split) -> None:
    scenes = some_scenes(world, 400 if split == "val" else 200, split)
    assert oracle_accuracy(scenes, render(scenes))["oracle_all"] >= 0.995


@pytest.mark.parametrize("kind", ["blobs", "morphs", "blurred", "noise"])
def test_images_without_a_shape_get_none(kind: str) -> None:
    images = getattr(impostors, kind)(300, np.random.default_rng(7))
    named = [any(item.shape for item in detected.objects) for detected in detect(images)]
    assert np.mean(named) <= 0.05


@pytest.mark.slow
def test_objects_survive_the_embedded_vae() -> None:
    vae = AutoencoderKL.from_pretrained(ROOT / "scenes" / "encoders" / "vae")
    scenes = some_scenes("full", 300)
    decoded, _ = round_trip(vae, render(scenes))
    accuracy = oracle_accuracy(scenes, decoded)
    assert accuracy["shape_accepted"] >= 0.98
    assert accuracy["oracle_all"] >= 0.96


def test_only_the_wrong_attribute_fails() -> None:
    single = first_with(1)
    detected = detect(render([single]))[0]
    mentions = {"size", "place", "background"}
    assert all(check(single, detected, mentions).values())
    alternatives = {
        "shape": ("star", "cross"),
        "colour": ("red", "blue"),
        "size": ("small", "large"),
        "place": ("top", "left"),
        "background": ("white", "black"),
    }
    item = single.objects[0]
    for name, values in alternatives.items():
        owner = single if hasattr(single, name) else item
        other = next(value for value in values if value != getattr(owner, name))
        changed = replace(owner, **{name: other})
        wrong = changed if isinstance(changed, Scene) else replace(single, objects=(changed,))
        failed = {key for key, ok in check(wrong, detected, mentions).items() if not ok}
        assert failed - {"shape_and_colour"} == {name, "all"}


def test_attributes_that_the_caption_does_not_mention_are_not_checked() -> None:
    single = first_with(1)
    names = {"count", "shape", "colour", "shape_and_colour", "all"}
    assert set(check(single, detect(render([single]))[0])) == names


def test_swapped_colours_and_flipped_relations_fail() -> None:
    pairs = [
        scene
        for scene in some_scenes("full", 200)
        if len(scene.objects) == 2
        and scene.objects[0].colour != scene.objects[1].colour
        and scene.objects[0].shape != scene.objects[1].shape
    ]
    for scene, detected in zip(pairs, detect(render(pairs)), strict=True):
        a, b = scene.objects
        swapped = (replace(a, colour=b.colour), replace(b, colour=a.colour))
        assert not check(replace(scene, objects=swapped), detected)["shapes_and_colours"]
        flipped = check(replace(scene, relation=INVERSE[str(scene.relation)]), detected)
        assert flipped["shapes_and_colours"]
        assert not flipped["relation"]


def test_one_object_too_many_or_too_few_fails() -> None:
    pair = first_with(2)
    alone = replace(pair, objects=pair.objects[:1], relation=None)
    of_pair, of_one = detect(render([pair, alone]))
    assert not check(alone, of_pair)["shape_and_colour"]
    missing = check(pair, of_one)
    assert not missing["colours"]
    assert not missing["relation"]


def test_other_image_sizes_are_resized() -> None:
    scenes = some_scenes("full", 50)
    assert oracle_accuracy(scenes, render(scenes, 128))["oracle_all"] >= 0.98


def test_an_array_of_another_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"float32 of shape \(1, 64, 64, 3\), expected uint8"):
        detect(np.zeros((1, 64, 64, 3), np.float32))
