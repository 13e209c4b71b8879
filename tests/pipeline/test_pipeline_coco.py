"""The COCO source: both layouts, real annotations, and wrong files."""

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.pipeline.sources import coco
from latent_t2i.pipeline.sources.locators import FileLocator, read_image_bytes
from latent_t2i.pipeline.sources.record import Record
from tests.coco_folders import CocoFolder, make_coco


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path, [2, 3, 1])


def read(folder: CocoFolder, *, instances: bool = False) -> list[Record]:
    instances_file = folder.instances if instances else None
    return list(coco.records(folder.images, folder.captions, instances_file))


def path_of(record: Record) -> str:
    assert isinstance(record.locator, FileLocator)
    return record.locator.path


def test_records_in_the_order_of_the_file(folder: CocoFolder) -> None:
    first, second, third = read(folder)
    assert first.key == "000000000001"
    assert first.locator == FileLocator(str(folder.images / "000000000001.png"))
    assert second.captions == ("a picture", "picture 2", "picture 2")
    assert third.extra == {"image_id": 3, "file_name": "000000000003.png"}


def test_file_names_of_2014(folder: CocoFolder) -> None:
    name = "COCO_train2014_000000000009.jpg"
    (folder.images / name).touch()
    folder.change("captions", images=[{"id": 9, "file_name": name}], annotations=[])
    (record,) = read(folder)
    assert (record.key, record.captions) == ("000000000009", ())
    assert path_of(record) == str(folder.images / name)


def test_instances_become_objects(folder: CocoFolder) -> None:
    assert read(folder, instances=True)[0].extra["objects"] == [
        {"category": "noise", "box_px": [1.5, 2.0, 3.0, 4.0], "crowd": 0}
    ]


def test_blank_captions_are_dropped_and_others_unchanged(folder: CocoFolder) -> None:
    texts = [" ", "", " A dog.\n", "half a pair \ud83d", "emoji 🐕"]
    folder.change(
        "captions",
        images=[{"id": 1, "file_name": "000000000001.png"}],
        annotations=[{"id": n, "image_id": 1, "caption": t} for n, t in enumerate(texts)],
    )
    assert read(folder)[0].captions == (" A dog.\n", "half a pair ?", "emoji 🐕")


@pytest.mark.parametrize(
    ("captions", "expected", "problem"),
    [
        ([None, "a dog"], ("a dog",), None),
        ([None], (), None),
        (["a dog", math.nan], (), "caption is not text but float"),
        ([["a", "b"]], (), "caption is not text but list"),
        ([{"text": "a"}], (), "caption is not text but dict"),
        ([5], (), "caption is not text but int"),
        ([False], (), "caption is not text but bool"),
    ],
)
def test_captions_that_are_not_text(
    folder: CocoFolder, captions: list[Any], expected: tuple[str, ...], problem: str | None
) -> None:
    annotations = [{"image_id": 1, "caption": caption} for caption in captions]
    folder.change("captions", annotations=[*annotations, {"image_id": 2, "caption": "fine"}])
    first, second, _ = read(folder)
    assert (first.captions, first.problem) == (expected, problem)
    assert (second.captions, second.problem) == (("fine",), None)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../images/000000000001.png", "file name points outside the folder"),
        ("/etc/passwd", "file name points outside the folder"),
        ("a\0b.png", "file name has a NUL byte"),
        ("é" * 128 + "/a.png", "file name of more than 255 bytes"),
    ],
)
def test_file_names_outside_the_folder(folder: CocoFolder, name: str, problem: str) -> None:
    images = folder.read("captions")["images"]
    folder.change("captions", images=[{"id": 1, "file_name": name}, *images[1:]])
    assert [record.problem for record in read(folder)] == [problem, None, None]


def test_control_characters_in_messages_are_escaped(folder: CocoFolder) -> None:
    images = [{"id": n, "file_name": f"\x1b]0;owned\x07{n}\n"} for n in (1, 2, 3)]
    folder.change("captions", images=images)
    with pytest.raises(ValueError, match=r"such as \\x1b\]0;owned\\x071\\n: is it"):
        read(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_annotations(coco_mini: Path, split: str) -> None:
    annotations = coco_mini / "annotations"
    captions = annotations / f"captions_{split}2017.json"
    instances = annotations / f"instances_{split}2017.json"
    found = list(coco.records(coco_mini / f"{split}2017", captions, instances))
    expected = [
        annotation["caption"] for annotation in json.loads(captions.read_text())["annotations"]
    ]
    assert sorted(caption for record in found for caption in record.captions) == sorted(expected)
    assert all(read_image_bytes(record.locator).startswith(b"\xff\xd8") for record in found)
    assert (
        sum(len(record.extra["objects"]) for record in found) == {"train": 739, "val": 624}[split]
    )


Change = Callable[[CocoFolder], object]


def set_field(folder: CocoFolder, *, kind: str, name: str, field: str, value: object) -> None:
    """Changes a field of the first entry in a list of an annotation file."""
    entries = folder.read(kind)[name]
    folder.change(kind, **{name: [entries[0] | {field: value}, *entries[1:]]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.captions.write_text("a photo"), "captions.json: not JSON, expected a COCO"),
        (lambda f: f.captions.write_bytes(b"\xff\xd8"), "captions.json: not JSON, expected a COCO"),
        (lambda f: f.captions.write_text("[]"), "not a COCO annotation file: expected a JSON obj"),
        (
            lambda f: f.captions.write_text("{}"),
            'not a COCO captions file: it has no list "images"',
        ),
        (
            lambda f: f.captions.write_text(f.instances.read_text()),
            r"not a COCO captions file: annotations\[0\] has no 'caption', only \['bbox', 'cat",
        ),
        (
            lambda f: f.instances.write_text(f.captions.read_text()),
            r"instances.json: not a COCO instances file: annotations\[0\] has no 'bbox'",
        ),
        (
            lambda f: f.change("captions", images=[{"id": 1}]),
            r"images\[0\] has no 'file_name', only \['id'\]",
        ),
        (
            lambda f: f.change("captions", images=["a"]),
            r"images\[0\] is 'a', expected an object with",
        ),
        (
            lambda f: f.change("captions", images=f.read("captions")["images"][1:]),
            r'2 annotations name images that are not in "images", such as annotations\[0\]',
        ),
        (
            lambda f: f.change("captions", images=f.read("captions")["images"] * 2),
            "image id 1 is used 2 times, expected once",
        ),
        (
            lambda f: f.change("captions", images=[{"id": "x", "file_name": "a"}], annotations=[]),
            r"captions file: images\[0\] has id 'x', expected int",
        ),
        (
            lambda f: f.change("captions", images=[{"id": 1, "file_name": 5}], annotations=[]),
            r"images\[0\] has file_name 5, expected str",
        ),
        (
            lambda f: f.change("instances", images=[], annotations=[]),
            "has no image of the captions file: is it of another split",
        ),
        *(
            (
                partial(set_field, kind=kind, name=name, field=field, value=value),
                rf"{kind}\.json: .*{name}\[0\] has {field} {re.escape(shown)}.*, expected {wanted}",
            )
            for kind, name, field, value, shown, wanted in (
                ("captions", "images", "id", [1], "[1]", "int"),
                ("captions", "images", "id", True, "True", "int"),
                ("captions", "images", "id", -1, "-1", "0 to"),
                ("captions", "annotations", "image_id", [4], "[4]", "int"),
                ("captions", "annotations", "image_id", None, "None", "int"),
                ("instances", "annotations", "category_id", {"a": 1}, "{'a': 1}", "int"),
                ("instances", "annotations", "bbox", [1, 2, 3], "[1, 2, 3]", "four finite"),
                ("instances", "annotations", "bbox", [math.nan, 1, 1, 1], "[nan, 1, 1", "four"),
                ("instances", "annotations", "bbox", [10**400, 1, 1, 1], "[1000", "four finite"),
                ("instances", "annotations", "iscrowd", "no", "'no'", "0 or 1"),
                ("instances", "categories", "name", None, "None", "str"),
            )
        ),
        (lambda f: f.captions.write_text("[" * 10**6), "captions.json: not JSON, .*recursion"),
        (
            lambda f: os.truncate(f.captions, 30 * 10**9),
            "not a COCO annotation file: 30000000000 bytes, expected at most 2147483648",
        ),
        (
            lambda f: (f.captions.unlink(), os.mkfifo(f.captions)),
            "not a COCO annotation file: a pipe or a device, expected a regular file",
        ),
        (
            lambda f: f.change("instances", categories=[]),
            r'annotations\[0\] has category_id 1, which is not in "categories"',
        ),
    ],
)
def test_wrong_annotation_files(folder: CocoFolder, change: Change, message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        read(folder, instances=True)


def test_single_missing_files_are_left_to_stage_one(folder: CocoFolder) -> None:
    (folder.images / "000000000002.png").unlink()
    records = read(folder)
    assert [record.problem for record in records] == [None] * 3
    with pytest.raises(FileNotFoundError):
        read_image_bytes(records[1].locator)


def test_the_folder_of_another_split(folder: CocoFolder) -> None:
    for number in (2, 3):
        (folder.images / f"{number:012d}.png").rename(folder.images / f"{number}.png")
    message = r"2 of the 3 images in the captions file are not in .*000000000002\.png"
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_images_in_subfolders(folder: CocoFolder) -> None:
    names = ["a/1.png", "b/2.png"]
    for name, old in zip(names, ("1", "2"), strict=True):
        (folder.images / name).parent.mkdir()
        (folder.images / f"{old:0>12}.png").rename(folder.images / name)
    images = [{"id": n, "file_name": name} for n, name in enumerate(names, 1)]
    folder.change("captions", images=images, annotations=[])
    assert [Path(path_of(record)).is_file() for record in read(folder)] == [True, True]


def test_records_are_made_one_by_one(folder: CocoFolder) -> None:
    found = coco.records(folder.images, folder.captions)
    assert next(found).key == "000000000001"
    assert [record.key[-1] for record in found] == ["2", "3"]
