"""One door to all sources: the flag is named for what is missing, files are found in order."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from latent_t2i.model.paths import ROOT
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.sources.locators import FileLocator, read_image_bytes
from latent_t2i.pipeline.sources.open import find_files, open_source, with_short_names
from latent_t2i.pipeline.sources.record import (
    Record,
    make_extra,
    make_key,
    make_meta,
    read_captions,
)
from latent_t2i.shards.schema import KEY_PATTERN, encode_meta
from tests.coco_folders import CocoFolder, make_coco


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path, [2, 3, 1])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of files that have only their names."""
    for name in ("00001.tar", "00000.tar", "00000_stats.json", "a/00002.tar", "b/00003.tar"):
        (tmp_path / "tars" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tars" / name).touch()
    return tmp_path / "tars"


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def config_of(**source: Any) -> PipelineConfig:
    return PipelineConfig(
        name="n", split="val", vae="v", text_encoder="t", source=SourceConfig(**source)
    )


def read(**source: Any) -> list[Record]:
    return list(open_source(config_of(**source), Path("out")))


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
        open_source(config_of(**paths), Path("out"))


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_missing_places_name_the_flag(kind: str) -> None:
    message = "--source.images: nothing at 'nowhere', here or in the project"
    with pytest.raises(ValueError, match=message):
        open_source(config_of(kind=kind, images="nowhere"), Path("out"))


def test_files_and_folders_mixed_up(folder: CocoFolder) -> None:
    images, captions = str(folder.images), str(folder.captions)
    with pytest.raises(ValueError, match=r"captions\.json is a file, expected a folder of images"):
        read(images=captions, captions=captions)
    with pytest.raises(ValueError, match=r"captions\.json is a file, expected a folder of images"):
        read(kind="folder", images=captions)
    with pytest.raises(ValueError, match="images: a folder, expected a COCO annotation file"):
        read(images=images, captions=images)


def test_only_the_first_so_many(folder: CocoFolder) -> None:
    coco = read(images=str(folder.images), captions=str(folder.captions), num_images=2)
    assert [record.key[-1] for record in coco] == ["1", "2"]
    same = read(kind="folder", images=str(folder.images), num_images=2)
    assert [record.locator for record in same] == [record.locator for record in coco]


def test_scenes_are_drawn_beside_the_shards_and_kept(tmp_path: Path) -> None:
    config = config_of(kind="scenes", num_images=3)
    first = list(open_source(config, tmp_path / "val"))
    paths = [
        Path(record.locator.path) for record in first if isinstance(record.locator, FileLocator)
    ]
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.parent for path in paths] == [tmp_path / "val-source" / "val"] * 3
    assert all(len(record.captions) == 5 and record.extra["objects"] for record in first)
    assert list(open_source(config, tmp_path / "val")) == first
    assert times == [path.stat().st_mtime_ns for path in paths]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "folder"}, "--source.images: a folder source needs it"),
        ({"kind": "webdataset"}, "--source.images: a webdataset source needs it"),
        (
            {"kind": "folder", "images": "i", "captions": "c"},
            "--source.captions: has no effect on a folder source; it is for coco",
        ),
        (
            {"kind": "coco", "images": "i", "captions": "c", "caption_column": "text"},
            "--source.caption-column: has no effect on a coco source; it is for folder, webdataset "
            "or parquet",
        ),
        (
            {"kind": "webdataset", "images": "i", "image_column": "image"},
            "--source.image-column: has no effect on a webdataset source; it is for parquet",
        ),
        (
            {"kind": "parquet", "images": "i", "caption_per": "file"},
            "--source.caption-per: has no effect on a parquet source; it is for folder",
        ),
        (
            {"kind": "scenes", "num_images": 1, "caption_per": "file"},
            "--source.caption-per: has no effect on scenes, which are drawn",
        ),
    ],
)
def test_settings_that_do_nothing_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        SourceConfig(**source)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("", ["00000", "00001"]),
        ("00001.tar", ["00001"]),
        ("*/*.tar", ["a/00002", "b/00003"]),
        ("**/*.tar", ["00000", "00001", "a/00002", "b/00003"]),
        ("{00001..00000}.tar", ["00001", "00000"]),
        ("{b/00003,a/00002}.tar", ["b/00003", "a/00002"]),
    ],
)
def test_local_files(tars: Path, location: str, expected: list[str]) -> None:
    names = [f"{tars}/{name}.tar" for name in expected]
    assert find_files(f"{tars}/{location}", ".tar") == names


def test_paths_count_from_here_and_from_the_project(tars: Path, elsewhere: Path) -> None:
    here = [str(Path("../tars/00000.tar")), str(Path("../tars/00001.tar"))]
    assert find_files("../tars/0*.tar", ".tar") == here
    assert find_files("pipeline/r*.py", ".py")[0] == str(ROOT / "pipeline" / "report.py")


def test_a_name_with_braces_is_a_name(tars: Path) -> None:
    (tars / "{a,b}.tar").touch()
    assert find_files(f"{tars}/{{a,b}}.tar", ".tar") == [f"{tars}/{{a,b}}.tar"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{00000..00002}.tar", r"nothing at '.*00002\.tar'"),
        ("{00000", "braces of .* do not close"),
        ("*.zip", r"no \.tar at .*\*\.zip"),
        ("empty", r"no \.tar at .*empty'; folders below take a pattern, '\*\*/\*\.tar'"),
        ("packed", r".*packed/00000\.tar\.gz is compressed: decompress it first"),
        ("packed/00000.tar.gz", r".*packed/00000\.tar\.gz is compressed"),
    ],
)
def test_local_files_that_are_not_there(tars: Path, location: str, message: str) -> None:
    (tars / "empty").mkdir()
    (tars / "packed").mkdir()
    (tars / "packed" / "00000.tar.gz").touch()
    with pytest.raises(ValueError, match=f"^--source.images: {message}"):
        find_files(f"{tars}/{location}", ".tar")


def test_remote_files(memory: Any) -> None:
    for name in ("01.tar", "00.tar", "00.txt", "a/02.tar"):
        memory.pipe(f"/set/{name}", b"")
    both = ["memory:///set/00.tar", "memory:///set/01.tar"]
    assert find_files("memory://set", ".tar") == both
    assert find_files("memory://set/0*.tar", ".tar") == both
    assert find_files("memory://set/a/02.tar", ".tar") == ["memory:///set/a/02.tar"]
    urls = ["http://host/00.tar?key=1", "http://host/01.tar?key=1"]
    assert find_files("http://host/{00..01}.tar?key=1", ".tar") == urls


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://host/*.tar", "a web server lists no files; braces spell them out"),
        ("memory://set/*.tar", "no .tar at"),
        ("https://host/0.tar.gz?a=b", "https://host/0.tar.gz is compressed"),
    ],
)
def test_remote_files_that_cannot_be(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_files(location, ".tar")


def test_short_names_tell_folders_apart() -> None:
    flat, deep = ["s3://b/x/00.tar", "s3://b/x/01.tar"], ["/d/x/00.tar", "/d/xy/00.tar"]
    assert [short for _, short in with_short_names(flat)] == ["00", "01"]
    assert [short for _, short in with_short_names(deep)] == ["x/00", "xy/00"]
    signed = "https://h/a.tar?key=b/c.d"
    assert with_short_names([signed]) == [(signed, "a")]


@pytest.mark.parametrize("name", ["000000000001", "a-B_9", "x" * 80])
def test_a_name_that_can_be_a_key_is_the_key(name: str) -> None:
    assert make_key(name) == name


NAMES = [
    "a b",
    "a_b.c",
    "a/b",
    "日本",
    "🐕",
    "",
    "x" * 81,
    "x" * 82,
    "half \ud83d",
    "\udcff",
    "a\0",
]


def test_other_names_become_keys_that_differ() -> None:
    keys = [make_key(name) for name in NAMES]
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert len(set(keys)) == len(NAMES)
    assert keys == [make_key(name) for name in NAMES]
    assert make_key("cats/a b").startswith("cats_a_b-")


@pytest.mark.parametrize(
    ("value", "captions", "problem"),
    [
        ("a dog 🐕", ("a dog 🐕",), None),
        (["a", None, " ", "b"], ("a", "b"), None),
        (None, (), None),
        ("half \ud83d", ("half ?",), None),
        (5, (), "caption is not text but int"),
        (["a", ["b"]], (), "caption is not text but list"),
    ],
)
def test_captions_of_a_field(value: Any, captions: tuple[str, ...], problem: str | None) -> None:
    assert read_captions(value) == (captions, problem)


def test_what_is_json_is_kept_beside_the_captions() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    values = {"url": "u", "similarity": 0.3, "nan": float("nan"), "bytes": b"b", "deep": deep}
    extra = make_extra(values | {"captions": ["c"], "half": ["\ud83d"]}, "é.jpg")
    assert extra == {
        "url": "u",
        "similarity": 0.3,
        "source_captions": ["c"],
        "half": ["?"],
        "file_name": "é.jpg",
    }
    assert make_extra({"file_name": "elsewhere"}, "a.jpg") == {"file_name": "a.jpg"}


class Picture:
    """Sizes, and no pixels."""

    source_size_px = (640, 480)
    crop_px = (80, 0, 560, 480)


def test_a_record_s_json() -> None:
    extra = {"file_name": "a.jpg", "image_id": 1}
    record = Record(key="a", locator=FileLocator("a.jpg"), captions=("c", "d"), extra=extra)
    meta = make_meta(record, truncated=[1], picture=Picture())
    assert json.loads(encode_meta(meta)) == {
        "captions": ["c", "d"],
        "truncated": [1],
        "source_size_px": [640, 480],
        "crop_px": [80, 0, 560, 480],
        "file_name": "a.jpg",
        "image_id": 1,
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_real_photographs_in_a_folder(coco_mini: Path, tmp_path: Path, kind: str) -> None:
    """The same photographs with the same captions come out of COCO's layout and of a folder."""
    captions = coco_mini / "annotations" / "captions_val2017.json"
    expected = read(images=str(coco_mini / "val2017"), captions=str(captions))
    _write_folder(tmp_path, kind, expected)
    found = read(kind="folder", images=str(tmp_path))
    assert [record.key for record in found] == sorted(record.key for record in expected)
    assert {r.key: _lines(r) for r in found} == {r.key: _lines(r) for r in expected}
    assert {r.key: read_image_bytes(r.locator) for r in found} == {
        r.key: read_image_bytes(r.locator) for r in expected
    }


def _lines(record: Record) -> list[str]:
    """The captions, each as one line: some of COCO's have a line break in them."""
    return [" ".join(text.split()) for text in record.captions]


def _write_folder(folder: Path, kind: str, records: list[Record]) -> None:
    rows = []
    for record in records:
        name = f"{record.key}.jpg"
        (folder / name).write_bytes(read_image_bytes(record.locator))
        rows += [{"file_name": name, "text": text} for text in record.captions]
        if kind == "txt":
            (folder / f"{record.key}.txt").write_text("\n".join(_lines(record)), "utf-8")
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_text(text, "utf-8")
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
