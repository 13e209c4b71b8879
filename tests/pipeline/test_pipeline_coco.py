"""The COCO source: both layouts, real annotations, and files that are not what was asked for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import coco, sources
from pipeline.config import PipelineConfig, SourceConfig
from tests.coco_folders import CocoFolder, make_coco


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path, [2, 3, 1])


def read(folder: CocoFolder, *, instances: bool = False) -> list[coco.Record]:
    return coco.records(folder.images, folder.captions, folder.instances if instances else None)


def test_records_in_the_file_s_order(folder: CocoFolder) -> None:
    first, second, third = read(folder)
    assert first.key == "000000000001"
    assert first.path == folder.images / "000000000001.png"
    assert second.captions == ("a picture", "picture 2", "picture 2")
    assert third.extra == {"image_id": 3, "file_name": "000000000003.png"}


def test_2014_names_its_files_otherwise(folder: CocoFolder) -> None:
    name = "COCO_train2014_000000000009.jpg"
    folder.change("captions", images=[{"id": 9, "file_name": name}], annotations=[])
    (record,) = read(folder)
    assert (record.key, record.path.name, record.captions) == ("000000000009", name, ())


def test_instances_become_objects(folder: CocoFolder) -> None:
    assert read(folder, instances=True)[0].extra["objects"] == [
        {"category": "noise", "box_px": [1.5, 2.0, 3.0, 4.0], "crowd": 0}
    ]


def test_blank_captions_do_not_count_and_others_stay_as_they_are(folder: CocoFolder) -> None:
    texts = [" ", "", " A dog.\n", "half a pair \ud83d", "emoji 🐕"]
    folder.change(
        "captions",
        images=[{"id": 1, "file_name": "a.png"}],
        annotations=[{"id": n, "image_id": 1, "caption": t} for n, t in enumerate(texts)],
    )
    assert read(folder)[0].captions == (" A dog.\n", "half a pair ?", "emoji 🐕")


def test_pycocotools_prints_nothing(folder: CocoFolder, capsys: pytest.CaptureFixture[str]) -> None:
    read(folder, instances=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_annotations(coco_mini: Path, split: str) -> None:
    annotations = coco_mini / "annotations"
    captions = annotations / f"captions_{split}2017.json"
    found = coco.records(
        coco_mini / f"{split}2017", captions, annotations / f"instances_{split}2017.json"
    )
    expected = [
        annotation["caption"] for annotation in json.loads(captions.read_text())["annotations"]
    ]
    assert sorted(caption for record in found for caption in record.captions) == sorted(expected)
    assert all(record.path.is_file() for record in found)
    assert (
        sum(len(record.extra["objects"]) for record in found) == {"train": 739, "val": 624}[split]
    )


Change = Callable[[CocoFolder], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.captions.write_text("a photo"), "captions.json: not JSON, expected a COCO"),
        (lambda f: f.captions.write_bytes(b"\xff\xd8"), "captions.json: not JSON, expected a COCO"),
        (lambda f: f.captions.write_text("[]"), "not a COCO annotation file: it holds no JSON obj"),
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
        (lambda f: f.change("captions", images=["a"]), r"images\[0\] has no 'file_name', only a"),
        (
            lambda f: f.change("captions", images=f.read("captions")["images"][1:]),
            '2 annotations name images that are not under "images": annotation 0 names 1',
        ),
        (
            lambda f: f.change("captions", images=f.read("captions")["images"] * 2),
            "image id 1 stands 2 times",
        ),
        (
            lambda f: f.change("captions", images=[{"id": "x", "file_name": "a"}], annotations=[]),
            "image id 'x': expected a whole number",
        ),
        (
            lambda f: f.change("instances", images=[], annotations=[]),
            "has none of the captions file's images: of another split",
        ),
        (
            lambda f: f.change("instances", categories=[]),
            'annotation 1 has category 1, which is not under "categories"',
        ),
    ],
)
def test_refused(folder: CocoFolder, change: Change, message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        read(folder, instances=True)


def config_of(**source: str) -> PipelineConfig:
    return PipelineConfig(name="n", vae="v", text_encoder="t", source=SourceConfig(**source))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("images", "--source.images: nothing at 'nowhere', here or in the project"),
        ("captions", "--source.captions: nothing at 'nowhere', here or in the project"),
        ("instances", "--source.instances: nothing at 'nowhere', here or in the project"),
    ],
)
def test_missing_paths_name_the_flag(folder: CocoFolder, part: str, message: str) -> None:
    paths = {"images": str(folder.images), "captions": str(folder.captions)} | {part: "nowhere"}
    with pytest.raises(ValueError, match=message):
        sources.records(config_of(**paths), Path("out"))


def test_files_and_folders_mixed_up(folder: CocoFolder) -> None:
    images, captions = str(folder.images), str(folder.captions)
    with pytest.raises(ValueError, match=r"captions\.json is a file, expected a folder of images"):
        sources.records(config_of(images=captions, captions=captions), Path("out"))
    with pytest.raises(ValueError, match="images: a folder, expected a COCO annotation file"):
        sources.records(config_of(images=images, captions=images), Path("out"))


def test_only_the_first_so_many(folder: CocoFolder) -> None:
    config = PipelineConfig(
        name="n",
        vae="v",
        text_encoder="t",
        source=SourceConfig(images=str(folder.images), captions=str(folder.captions), num_images=2),
    )
    assert [record.key[-1] for record in sources.records(config, Path("out"))] == ["1", "2"]


def test_scenes_are_drawn_beside_the_shards_and_kept(tmp_path: Path) -> None:
    config = PipelineConfig(
        name="n",
        split="val",
        vae="v",
        text_encoder="t",
        source=SourceConfig(kind="scenes", num_images=3),
    )
    first = sources.records(config, tmp_path / "val")
    times = {record.path: record.path.stat().st_mtime_ns for record in first}
    assert {path.parent for path in times} == {tmp_path / "val-source" / "val"}
    assert all(len(record.captions) == 5 and record.extra["objects"] for record in first)
    assert sources.records(config, tmp_path / "val") == first
    assert times == {record.path: record.path.stat().st_mtime_ns for record in first}
