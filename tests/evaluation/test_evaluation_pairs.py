"""Finished images and their captions: paired by file name, or by position and then said so."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.inputs import Inputs, open_inputs
from latent_t2i.evaluation.reals import FolderReals
from tests import shard_sets

NUM = 20


def save_images(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), len(name), np.uint8)).save(folder / name)
    return folder


def numbered(numbers: Sequence[int]) -> list[str]:
    return [f"{number:012d}.png" for number in numbers]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO captions file of the images 1 to 20."""
    path = tmp_path_factory.mktemp("captions") / "captions.json"
    annotations = [{"image_id": n, "caption": f"caption of {n}"} for n in range(1, NUM + 1)]
    path.write_text(json.dumps({"annotations": annotations}))
    return path


def open_images(images: Path, captions: Path | None, **settings: Any) -> Inputs:
    given = {"captions": None if captions is None else str(captions)} | settings
    config = EvaluationConfig(name="tests", images=str(images), out=str(images / "out"), **given)
    return open_inputs(config)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("numbers", [(1, 2, 3), (11, 12, 13, 14), (3, 20)])
def test_a_part_of_the_captioned_images(
    captions: Path, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    found = open_images(save_images(tmp_path, numbered(numbers)), captions)
    assert [item.captions for item in found.items] == [(f"caption of {n}",) for n in numbers]
    assert [item.position for item in found.items] == list(range(len(numbers)))
    assert found.captions_by == "file name"


def test_a_stray_file_is_an_error(captions: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path, ["a_stray.png", *numbered((2, 3, 4))])
    with pytest.raises(ValueError, match=r"captions of 3 of the 4 images .* none of a_stray\.png"):
        open_images(images, captions)


def test_position_if_no_name_matches(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path / "all", [f"{n:05d}.png" for n in range(NUM)])
    found = open_images(images, captions)
    assert [item.captions[0] for item in found.items] == [
        f"caption of {n}" for n in range(1, NUM + 1)
    ]
    assert found.captions_by == "position"
    printed = capsys.readouterr().out
    assert "paired by position: 00000.png with 000000000001, ..., 00019.png with" in printed
    images = save_images(tmp_path / "few", ["a.png", "b.png"])
    with pytest.raises(ValueError, match=r"captions of 20 images, .* none of the 2 images"):
        open_images(images, captions)


def test_objects_and_training_images_are_found_by_the_captions_key(
    captions: Path, tmp_path: Path
) -> None:
    images = save_images(tmp_path / "images", [f"{n:05d}.png" for n in range(NUM)])
    instances = tmp_path / "instances.json"
    box = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 0}
    document = {
        "images": [{"id": 7, "file_name": "000000000007.jpg", "width": 4, "height": 4}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "dog"}],
    }
    instances.write_text(json.dumps(document))
    found = open_images(images, captions, objects=str(instances))
    assert [item.position for item in found.items if item.objects] == [6]
    (example,) = shard_sets.make_examples(1, num_captions=1)
    example = replace(
        example, key="000000000007", meta=example.meta | {"captions": ["caption of 7"]}
    )
    shard_sets.write_set(tmp_path / "set", [[example]])
    with pytest.raises(ValueError, match=r"1 of the images are in the training set .*0*7"):
        open_images(images, captions, train_shards=(str(tmp_path / "set"),))
    with pytest.raises(ValueError, match=r"--objects: found .* but no --captions"):
        open_images(images, None, objects=str(instances))


def test_equal_names_in_several_folders(tmp_path: Path) -> None:
    names = ["a/1.png", "b/1.png"]
    images = save_images(tmp_path / "images", names)
    rows = [{"file_name": name.replace("png", "jpg"), "text": name} for name in names]
    captions = write_rows(tmp_path / "c.jsonl", rows)
    found = open_images(images, captions, reference=str(images))
    assert [item.captions for item in found.items] == [("a/1.png",), ("b/1.png",)]
    assert isinstance(found.reals, FolderReals)
    assert [item.captions for item in found.reals.items] == [("a/1.png",), ("b/1.png",)]
    other = save_images(tmp_path / "other", ["c/1.png", "c/2.png", "c/3.png"])
    with pytest.raises(ValueError, match=r"captions of 2 images.* none of the 3 images"):
        open_images(other, captions)


def test_two_prompts_of_one_name(tmp_path: Path) -> None:
    captions = tmp_path / "c.tsv"
    captions.write_text("image_id\tcaption\n1\tone\n1\tanother\n2\ttwo\n")
    images = save_images(tmp_path / "images", numbered((1, 2)))
    with pytest.raises(ValueError, match=r"has 2 prompts named 000000000001"):
        open_images(images, captions)
