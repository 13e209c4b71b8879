"""Scenes, their captions, and the COCO dataset written from them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO

from latent_t2i.scenes.captions import SINGLE, captions, vocabulary
from latent_t2i.scenes.dataset import write_coco
from latent_t2i.scenes.draw import draw
from latent_t2i.scenes.prompts import make_prompts
from latent_t2i.scenes.world import (
    CANVAS_PX,
    INVERSE,
    MARGIN_PX,
    SPLITS,
    WORLDS,
    Scene,
    is_held_out,
    make_scene,
    stream,
)


@given(st.sampled_from(sorted(WORLDS)), st.sampled_from(SPLITS), st.integers(0, 2**32))
def test_objects_do_not_touch_each_other_or_the_border(world: str, split: str, seed: int) -> None:
    scene = make_scene(WORLDS[world], np.random.default_rng(seed), split)
    for a, b in combinations(scene.objects, 2):
        reach_px = a.extent_px + b.extent_px
        assert abs(a.x_px - b.x_px) >= reach_px or abs(a.y_px - b.y_px) >= reach_px
    for item in scene.objects:
        for centre in (item.x_px, item.y_px):
            assert centre - item.extent_px >= MARGIN_PX - 0.02
            assert centre + item.extent_px <= CANVAS_PX - MARGIN_PX + 0.02


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_only_held_out_scenes_contain_held_out_compositions(world: str) -> None:
    for split in SPLITS:
        scenes = [scene for scene, _ in islice(stream(WORLDS[world], split, 0), 200)]
        assert {is_held_out(scene) for scene in scenes} == {split == "held_out"}


def test_relations_are_held_out_in_both_directions() -> None:
    rng = np.random.default_rng(0)
    pair = make_scene(WORLDS["easy"], rng, "train", num_objects=2)
    for relation, order in (("above", ("circle", "triangle")), ("below", ("triangle", "circle"))):
        objects = tuple(
            replace(item, shape=shape, colour="orange")
            for item, shape in zip(pair.objects, order, strict=True)
        )
        assert is_held_out(Scene(background="white", objects=objects, relation=relation))
        inverse = INVERSE[relation]
        assert not is_held_out(Scene(background="white", objects=objects, relation=inverse))


def test_scenes_depend_on_their_index_and_split_only() -> None:
    first, again, other = (
        [scene for scene, _ in islice(stream(WORLDS["full"], split, 3), num)]
        for split, num in (("train", 20), ("train", 10), ("val", 20))
    )
    assert first[:10] == again
    assert not set(first) & set(other)


def test_captions_name_every_object_and_list_their_attributes() -> None:
    words = set(vocabulary())
    for scene, rng in islice(stream(WORLDS["full"], "train", 0), 200):
        chosen = captions(scene, WORLDS["full"], rng)
        assert len({caption.text for caption in chosen}) >= 3
        assert len(chosen) == 5
        for caption in chosen:
            spoken = set(caption.text.replace(",", " , ").split())
            assert spoken <= words
            assert {w for item in scene.objects for w in (item.shape, item.colour)} <= spoken
            assert ("background" in caption.mentions) == ("background" in spoken)
            assert ("relation" in caption.mentions) == (len(scene.objects) > 1)


def test_prompts_match_their_kind() -> None:
    for kind, num in (("single", 1), ("pair", 2)):
        assert {len(p.scene.objects) for p in make_prompts("full", kind, 20, 0)} == {num}
    held_out = make_prompts("full", "held_out", 20, 0)
    assert all(is_held_out(p.scene) for p in held_out)
    assert make_prompts("full", "held_out", 10, 0) == held_out[:10]


def test_pycocotools_reads_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_coco(tmp_path, "full", "train", 12, 64, seed=0)
    texts, boxes = COCO(paths.captions), COCO(paths.instances)
    capsys.readouterr()
    assert len(texts.getImgIds()) == 12
    for image_id in texts.getImgIds():
        assert len(texts.getAnnIds(imgIds=[image_id])) == len(SINGLE)
        assert 1 <= len(boxes.getAnnIds(imgIds=[image_id])) <= 3
        assert (paths.images / texts.loadImgs([image_id])[0]["file_name"]).is_file()


def test_a_complete_dataset_is_kept_and_an_incomplete_one_is_rendered_again(tmp_path: Path) -> None:
    paths = write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
    before = paths.captions.read_bytes()
    image = paths.images / "000000000001.png"
    image.write_bytes(b"kept")
    write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
    assert image.read_bytes() == b"kept"
    paths.captions.unlink()
    write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
    assert image.read_bytes() != b"kept"
    assert paths.captions.read_bytes() == before
    for damage in (
        lambda: image.unlink(),
        lambda: paths.captions.write_text("{"),
        paths.instances.unlink,
    ):
        damage()
        write_coco(tmp_path, "easy", "val", 3, 64, seed=0)
        assert image.is_file()
        assert paths.instances.is_file()
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
def test_wrong_arguments_are_errors(
    tmp_path: Path, world: str, split: str, num: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_coco(tmp_path, world, split, num, 64, seed=0)


def test_a_larger_image_shows_the_same_scene() -> None:
    scene, _ = next(stream(WORLDS["full"], "train", 0))
    small = np.asarray(draw(scene, 64), dtype=float)
    large = np.asarray(draw(scene, 128).resize((64, 64), 4), dtype=float)
    assert np.abs(small - large).mean() < 2.0
