"""The oracle: exact on drawn pictures, and it says no."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL

from latent_t2i import scenes
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.oracle import check, read
from latent_t2i.scenes.train_encoders import read_back, round_trip
from latent_t2i.scenes.world import INVERSE, WORLDS, Scene, stream
from tests.scenes import impostors

ENCODERS = Path(scenes.__file__).parent / "encoders"


def some_scenes(world: str, num: int, seed: int = 21) -> list[Scene]:
    return [scene for scene, _ in islice(stream(WORLDS[world], "val", seed), num)]


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_drawn_pictures_are_read_right(world: str) -> None:
    told = some_scenes(world, 400)
    assert read_back(told, render(told))["oracle_all"] >= 0.995


def test_held_out_pictures_are_read_right() -> None:
    told = [scene for scene, _ in islice(stream(WORLDS["full"], "held_out", 4), 200)]
    assert read_back(told, render(told))["oracle_all"] >= 0.995


@pytest.mark.parametrize("kind", ["blobs", "morphs", "blurred", "noise"])
def test_what_shows_no_shape_is_given_none(kind: str) -> None:
    pictures = getattr(impostors, kind)(300, np.random.default_rng(7))
    named = [any(thing.shape for thing in reading.things) for reading in read(pictures)]
    assert np.mean(named) <= 0.05


def test_objects_survive_the_embedded_vae() -> None:
    vae = AutoencoderKL.from_pretrained(ENCODERS / "vae")
    told = some_scenes("full", 300)
    decoded, _ = round_trip(vae, render(told))
    figures = read_back(told, decoded)
    assert figures["shape_accepted"] >= 0.98
    assert figures["oracle_all"] >= 0.96


def of_one(scene: Scene, **change: str) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **change), *scene.things[1:]))


def test_only_the_attribute_that_is_wrong_fails() -> None:
    single = next(s for s in some_scenes("full", 50) if len(s.things) == 1)
    reading = read(render([single]))[0]
    told = {"size", "place", "background"}
    thing = single.things[0]
    other = {
        "shape": of_one(single, shape="star" if thing.shape != "star" else "cross"),
        "colour": of_one(single, colour="red" if thing.colour != "red" else "blue"),
        "size": of_one(single, size="small" if thing.size != "small" else "large"),
        "place": replace(single, place="top" if single.place != "top" else "left"),
        "background": replace(
            single, background="white" if single.background != "white" else "black"
        ),
    }
    assert all(check(single, reading, told).values())
    for name, wrong in other.items():
        failed = {key for key, ok in check(wrong, reading, told).items() if not ok}
        assert failed - {"shape_and_colour"} == {name, "all"}


def test_attributes_that_the_caption_does_not_tell_are_not_judged() -> None:
    single = next(s for s in some_scenes("full", 50) if len(s.things) == 1)
    assert set(check(single, read(render([single]))[0])) == {
        "count", "shape", "colour", "shape_and_colour", "all"
    }  # fmt: skip


def test_swapped_colours_and_turned_relations_are_told_apart() -> None:
    pairs = [
        s
        for s in some_scenes("full", 200)
        if len(s.things) == 2
        and s.things[0].colour != s.things[1].colour
        and s.things[0].shape != s.things[1].shape
    ]
    for scene, reading in zip(pairs, read(render(pairs)), strict=True):
        a, b = scene.things
        swapped = replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
        verdict = check(swapped, reading)
        assert not verdict["shapes_and_colours"]
        turned = check(replace(scene, relation=INVERSE[str(scene.relation)]), reading)
        assert turned["shapes_and_colours"]
        assert not turned["relation"]


def test_an_object_too_many_or_too_few_fails() -> None:
    pair = next(s for s in some_scenes("full", 50) if len(s.things) == 2)
    alone = replace(pair, things=pair.things[:1], relation=None)
    assert not check(alone, read(render([pair]))[0])["shape_and_colour"]
    missing = read(render([alone]))[0]
    assert not check(pair, missing)["colours"]
    assert not check(pair, missing)["relation"]


def test_other_sizes_are_read_too() -> None:
    told = some_scenes("full", 50)
    assert read_back(told, render(told, 128))["oracle_all"] >= 0.98


def test_a_wrong_array_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 of shape \(1, 64, 64, 3\), expected uint8"):
        read(np.zeros((1, 64, 64, 3), np.float32))
