"""Opening sources, finding files, and the parts of a record."""

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from latent_t2i.model.paths import ROOT
from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.images import Picture
from latent_t2i.pipeline.sources.locators import FileLocator, read_image_bytes
from latent_t2i.pipeline.sources.open import (
    SceneSettings,
    find_files,
    open_source,
    with_short_names,
)
from latent_t2i.pipeline.sources.record import (
    Record,
    extra_fields,
    make_key,
    make_meta,
    parse_captions,
)
from latent_t2i.shards.schema import KEY_PATTERN, encode_meta
from tests.coco_folders import CocoFolder, make_coco


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path, [2, 3, 1])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of empty files."""
    for name in ("00001.tar", "00000.tar", "00000_stats.json", "a/00002.tar", "b/00003.tar"):
        (tmp_path / "tars" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tars" / name).touch()
    return tmp_path / "tars"


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's memory file system, emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def read(split: str = "val", **source: Any) -> list[Record]:
    return list(open_source(SourceConfig(**source), split))


@pytest.mark.parametrize("part", ["images", "captions", "instances"])
def test_missing_paths_name_the_flag(folder: CocoFolder, part: str) -> None:
    paths = {"images": str(folder.images), "captions": str(folder.captions)} | {part: "nowhere"}
    message = f"--source.{part}: 'nowhere' does not exist in the current directory or the project"
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(**paths))
    for kind in ("folder", "webdataset", "parquet"):
        with pytest.raises(ValueError, match="'nowhere' does not exist in"):
            open_source(SourceConfig(kind=kind, images="nowhere"))


def test_files_and_folders_mixed_up(folder: CocoFolder) -> None:
    images, captions = str(folder.images), str(folder.captions)
    with pytest.raises(ValueError, match=r"captions\.json is a file, expected a folder of images"):
        read(images=captions, captions=captions)
    with pytest.raises(ValueError, match=r"captions\.json is a file, expected a folder of images"):
        read(kind="folder", images=captions)
    with pytest.raises(ValueError, match="images: not a COCO annotation file: a folder, expec"):
        read(images=images, captions=images)


def test_sources_without_images_name_the_place(tmp_path: Path, folder: CocoFolder) -> None:
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    folder.change("captions", images=[], annotations=[])
    sources: list[tuple[str, Any]] = [
        ("folder", {"images": str(tmp_path / "empty")}),
        ("webdataset", {"images": str(tmp_path / "a.tar")}),
        ("coco", {"images": str(tmp_path / "empty"), "captions": str(folder.captions)}),
    ]
    for kind, paths in sources:
        flag, path = list({f"--source.{name}": path for name, path in paths.items()}.items())[-1]
        with pytest.raises(ValueError, match=rf"^{flag}: {path}: found no images, expected "):
            read(kind=kind, **paths)


def test_only_the_first_images(folder: CocoFolder) -> None:
    coco = read(images=str(folder.images), captions=str(folder.captions), num_images=2)
    assert [record.key[-1] for record in coco] == ["1", "2"]
    same = read(kind="folder", images=str(folder.images), num_images=2)
    assert [record.locator for record in same] == [record.locator for record in coco]


def test_val_fraction_splits_by_key(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.jpg").touch()
    source = {"kind": "folder", "images": str(tmp_path)}
    everything = [record.key for record in read(**source)]
    train, val = (
        [record.key for record in read(split, **source, val_fraction=0.1)]
        for split in ("train", "val")
    )
    assert sorted(train + val) == sorted(everything)
    assert len(val) == 17 and val[:3] == ["100", "101", "102"]
    assert [record.key for record in read(**source, val_fraction=0.1, num_images=2)] == val[:2]
    assert {*val} < {record.key for record in read(**source, val_fraction=0.2)}
    (tmp_path / "new.jpg").touch()
    assert {*val} <= {record.key for record in read(**source, val_fraction=0.1)} <= {*val, "new"}
    with pytest.raises(ValueError, match="--split: expected train or val with"):
        read("test", **source, val_fraction=0.1)
    with pytest.raises(ValueError, match=r"found no images with --source.val-fraction 1e-09"):
        read("val", **source, val_fraction=1e-9)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_val_fractions_that_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected at least 0 and below 1"):
        SourceConfig(kind="folder", images="i", val_fraction=fraction)


def test_scenes_are_drawn_once_beside_the_shards(tmp_path: Path) -> None:
    source = SourceConfig(kind="scenes", num_images=3)
    scenes = SceneSettings(folder=tmp_path, split="val", image_size_px=64, seed=0)
    first = list(open_source(source, "val", scenes))
    paths = [
        Path(record.locator.path) for record in first if isinstance(record.locator, FileLocator)
    ]
    times = [path.stat().st_mtime_ns for path in paths]
    assert [path.parent for path in paths] == [tmp_path / "val"] * 3
    assert all(len(record.captions) == 5 and record.extra["objects"] for record in first)
    assert list(open_source(source, "val", scenes)) == first
    assert times == [path.stat().st_mtime_ns for path in paths]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "folder"}, "--source.images: required for a folder source"),
        ({"kind": "webdataset"}, "--source.images: required for a webdataset source"),
        (
            {"kind": "folder", "images": "i", "captions": "c"},
            "--source.captions: has no effect on a folder source, only on coco",
        ),
        (
            {"kind": "coco", "images": "i", "captions": "c", "caption_column": "text"},
            "--source.caption-column: has no effect on a coco source, only on folder, webdataset "
            "or parquet",
        ),
        (
            {"kind": "webdataset", "images": "i", "image_column": "image"},
            "--source.image-column: has no effect on a webdataset source, only on parquet",
        ),
        (
            {"kind": "parquet", "images": "i", "caption_per": "file"},
            "--source.caption-per: has no effect on a parquet source, only on folder",
        ),
        (
            {"kind": "coco", "images": "i", "captions": "c", "tar_members": "anywhere"},
            "--source.tar-members: has no effect on a coco source, only on webdataset",
        ),
        (
            {"kind": "scenes", "num_images": 1, "val_fraction": 0.1},
            "--source.val-fraction: has no effect on a scenes source, only on coco, folder, ",
        ),
        (
            {"kind": "scenes", "num_images": 1, "caption_per": "file"},
            "--source.caption-per: has no effect on a scenes source, only on folder",
        ),
    ],
)
def test_settings_without_effect_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        SourceConfig(**source)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_named_pipe_is_refused(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: .*a pipe or a device, expected a regular file"):
        read(kind=kind, images=str(tmp_path / "pipe"))


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


def test_paths_are_relative_to_here_or_to_the_project(tars: Path, elsewhere: Path) -> None:
    here = [str(Path("../tars/00000.tar")), str(Path("../tars/00001.tar"))]
    assert find_files("../tars/0*.tar", ".tar") == here
    assert find_files("pipeline/r*.py", ".py")[0] == str(ROOT / "pipeline" / "report.py")


def test_a_file_with_braces_in_its_name(tars: Path) -> None:
    (tars / "{a,b}.tar").touch()
    assert find_files(f"{tars}/{{a,b}}.tar", ".tar") == [f"{tars}/{{a,b}}.tar"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{00000..00002}.tar", r"'.*00002\.tar' does not exist"),
        ("{00000", ".* has a brace without its counterpart"),
        ("*.zip", r"no \.tar file in .*\*\.zip"),
        ("empty", r"no \.tar file in .*empty'; subfolders need a pattern, '\*\*/\*\.tar'"),
        ("packed", r".*packed/00000\.tar\.gz is compressed: decompress it first"),
        ("packed/00000.tar.gz", r".*packed/00000\.tar\.gz is compressed"),
    ],
)
def test_local_files_that_cannot_be_used(tars: Path, location: str, message: str) -> None:
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
        ("http://host/*.tar", "http has no patterns, name the files with braces"),
        ("memory://set/*.tar", "no .tar file in"),
        ("https://host/0.tar.gz?a=b", "https://host/0.tar.gz is compressed"),
    ],
)
def test_remote_files_that_cannot_be_used(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_files(location, ".tar")


def test_short_names_have_folders_where_needed() -> None:
    flat, deep = ["s3://b/x/00.tar", "s3://b/x/01.tar"], ["/d/x/00.tar", "/d/xy/00.tar"]
    assert [short for _, short in with_short_names(flat)] == ["00", "01"]
    assert [short for _, short in with_short_names(deep)] == ["x/00", "xy/00"]
    signed = "https://h/a.tar?key=b/c.d"
    assert with_short_names([signed]) == [(signed, "a")]


@pytest.mark.parametrize("name", ["000000000001", "a-B_9", "x" * 80])
def test_valid_keys_are_unchanged(name: str) -> None:
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


def test_other_names_get_distinct_keys() -> None:
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
def test_parse_captions(value: Any, captions: tuple[str, ...], problem: str | None) -> None:
    assert parse_captions(value) == (captions, problem)


def test_extra_fields_keep_what_is_json() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    values = {"url": "u", "similarity": 0.3, "nan": float("nan"), "bytes": b"b", "deep": deep}
    extra = extra_fields(values | {"captions": ["c"], "half": ["\ud83d"]}, "é.jpg")
    assert extra == {
        "url": "u",
        "similarity": 0.3,
        "source_captions": ["c"],
        "half": ["?"],
        "file_name": "é.jpg",
    }
    assert extra_fields({"file_name": "elsewhere"}, "a.jpg") == {"file_name": "a.jpg"}


def test_a_record_s_json() -> None:
    extra = {"file_name": "a.jpg", "image_id": 1}
    record = Record(key="a", locator=FileLocator("a.jpg"), captions=("c", "d"), extra=extra)
    picture = Picture(np.zeros((1, 8, 8, 3), np.uint8), (640, 480), ((80, 0, 560, 480),), "5" * 64)
    meta = make_meta(record, truncated=[1], picture=picture)
    assert encode_meta(meta).startswith(b'{"image_sha256":"5555')
    assert json.loads(encode_meta(meta)) == {
        "image_sha256": "5" * 64,
        "captions": ["c", "d"],
        "truncated": [1],
        "source_size_px": [640, 480],
        "crop_px": [80, 0, 560, 480],
        "file_name": "a.jpg",
        "image_id": 1,
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_real_photographs_in_a_folder(coco_mini: Path, tmp_path: Path, kind: str) -> None:
    """A folder gives the same records as COCO's layout."""
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
    """Returns each caption as one line, because some of COCO's have line breaks."""
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
