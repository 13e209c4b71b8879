"""Scenes, their captions and the COCO folder they are written to."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from latent_t2i.scenes.captions import SINGLE, captions, vocabulary
from latent_t2i.scenes.dataset import write_coco
from latent_t2i.scenes.draw import draw
from latent_t2i.scenes.prompts import make
from latent_t2i.scenes.world import (
    CANVAS_PX,
    INVERSE,
    MARGIN_PX,
    SPLITS,
    WORLDS,
    is_held_out,
    make_scene,
    stream,
    touching,
)


@given(st.sampled_from(sorted(WORLDS)), st.sampled_from(SPLITS), st.integers(0, 2**32))
def test_objects_keep_clear_of_each_other_and_of_the_border(
    world: str, split: str, seed: int
) -> None:
    scene = make_scene(WORLDS[world], np.random.default_rng(seed), split)
    assert not touching(scene)
    for thing in scene.things:
        for centre in (thing.x_px, thing.y_px):
            assert centre - thing.extent_px >= MARGIN_PX - 0.02
            assert centre + thing.extent_px <= CANVAS_PX - MARGIN_PX + 0.02


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_held_out_compositions_are_in_every_held_out_scene_and_no_other(world: str) -> None:
    for split in SPLITS:
        scenes = [scene for scene, _ in islice(stream(WORLDS[world], split, 0), 200)]
        assert {is_held_out(scene) for scene in scenes} == {split == "held_out"}


def test_a_relation_is_held_out_from_whichever_side_it_is_told() -> None:
    rng = np.random.default_rng(0)
    while True:
        scene = make_scene(WORLDS["easy"], rng, "train", num_things=2)
        if scene.relation == "above":
            break
    for relation, order in (("above", ("circle", "triangle")), ("below", ("triangle", "circle"))):
        things = tuple(
            type(thing)(**(vars(thing) | {"shape": shape, "colour": "orange"}))
            for thing, shape in zip(scene.things, order, strict=True)
        )
        told = type(scene)(background="white", things=things, relation=relation)
        assert is_held_out(told)
        assert not is_held_out(
            type(scene)(background="white", things=things, relation=INVERSE[relation])
        )


def test_a_split_is_the_same_scenes_however_many_are_taken_and_differs_from_the_others() -> None:
    first = [scene for scene, _ in islice(stream(WORLDS["full"], "train", 3), 20)]
    again = [scene for scene, _ in islice(stream(WORLDS["full"], "train", 3), 10)]
    other = [scene for scene, _ in islice(stream(WORLDS["full"], "val", 3), 20)]
    assert first[:10] == again
    assert not set(first) & set(other)


def test_five_captions_name_every_object_and_tell_what_they_say_they_tell() -> None:
    words = set(vocabulary())
    for scene, rng in islice(stream(WORLDS["full"], "train", 0), 200):
        told = captions(scene, WORLDS["full"], rng)
        assert len({caption.text for caption in told}) >= 3
        assert len(told) == 5
        for caption in told:
            spoken = caption.text.replace(",", " , ").split()
            assert set(spoken) <= words
            for thing in scene.things:
                assert thing.shape in spoken
                assert thing.colour in spoken
            assert ("background" in caption.mentions) == ("background" in spoken)
            assert ("relation" in caption.mentions) == (len(scene.things) > 1)


def test_prompts_hold_what_they_are_named_for() -> None:
    assert {len(p.scene.things) for p in make("full", "single", 20, 0)} == {1}
    assert {len(p.scene.things) for p in make("full", "pair", 20, 0)} == {2}
    held_out = make("full", "held_out", 20, 0)
    assert all(is_held_out(p.scene) for p in held_out)
    assert make("full", "held_out", 10, 0) == held_out[:10]


def test_the_folder_is_coco_and_pycocotools_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_coco(tmp_path, "full", "train", 12, 64, seed=0)
    told, boxes = COCO(paths.captions), COCO(paths.instances)
    capsys.readouterr()
    assert len(told.getImgIds()) == 12
    for image_id in told.getImgIds():
        assert len(told.getAnnIds(imgIds=[image_id])) == len(SINGLE)
        assert 1 <= len(boxes.getAnnIds(imgIds=[image_id])) <= 3
        assert (paths.images / told.loadImgs([image_id])[0]["file_name"]).is_file()


def test_a_finished_folder_is_kept_and_one_cut_short_is_drawn_again(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
    before = paths.captions.read_bytes()
    picture = paths.images / "000000000001.png"
    picture.write_bytes(b"kept")
    write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
    assert picture.read_bytes() == b"kept"
    paths.captions.unlink()
    write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
    assert picture.read_bytes() != b"kept"
    assert paths.captions.read_bytes() == before
    write_coco(tmp_path, "easy", "val", 4, 64, seed=0)
    assert len(json.loads(paths.captions.read_text())["images"]) == 4


@pytest.mark.parametrize(
    ("world", "split", "num", "message"),
    [
        ("hard", "train", 1, "world is 'hard', expected one of easy, full"),
        ("easy", "test", 1, "split is 'test', expected one of train, val, held_out"),
        ("easy", "train", 0, "num_images is 0, expected at least 1"),
    ],
)
def test_wrong_requests_are_refused(
    tmp_path: Path, world: str, split: str, num: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_coco(tmp_path, world, split, num, 64, seed=0)


def test_a_larger_picture_is_the_same_scene() -> None:
    scene, _ = next(stream(WORLDS["full"], "train", 0))
    small = np.asarray(draw(scene, 64), dtype=float)
    large = np.asarray(draw(scene, 128).resize((64, 64), 4), dtype=float)
    assert np.abs(small - large).mean() < 2.0
