"""Folders of images with metadata or texts beside them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latent_t2i.pipeline.sources import folder
from latent_t2i.pipeline.sources.folder import FolderOptions
from latent_t2i.pipeline.sources.locators import FileLocator, read_image_bytes
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.schema import KEY_PATTERN, encode_meta


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    """Writes files. Listing does not open images, so any content will do."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path, **options: Any) -> list[Record]:
    return list(folder.records(FolderOptions(root, **options)))


def summary(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(record.extra["file_name"], record.captions, record.problem) for record in records]


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_beside_each_image(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "b.JPG": b"b",
        "b.txt": "first\n\n second \n",
        "a.webp": b"a",
        "a.TXT": "\ufeffone\r\ntwo\r\n",
        "c.png": b"c",
        "d.jpeg": b"d",
        "d.txt": " \n",
    }
    records = read(write(tmp_path, files))
    assert summary(records) == [
        ("a.webp", ("one", "two"), None),
        ("b.JPG", ("first", "second"), None),
        ("c.png", (), None),
        ("d.jpeg", (), None),
    ]
    assert [record.key for record in records] == ["a", "b", "c", "d"]
    assert [read_image_bytes(record.locator) for record in records] == [b"a", b"b", b"c", b"d"]


def test_a_whole_text_as_one_caption(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": b"", "a.txt": "A dog.\nIt runs.\n"})
    assert read(root, caption_per="file")[0].captions == ("A dog.\nIt runs.",)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_paragraphs_as_captions(tmp_path: Path, end: str) -> None:
    text = end.join(["", "A dog.", "It runs.", "", " \t", "A cat.", "", ""])
    root = write(tmp_path, {"a.jpg": b"", "a.txt": text})
    (record,) = read(root, caption_per="paragraph")
    assert record.captions == (f"A dog.{end}It runs.", "A cat.")


def test_texts_of_another_extension(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "a.jpg": b"",
        "a.caption": "one",
        "a.b.jpg": b"",
        "a.b.output.txt": "two",
        "c.jpg": b"",
        "c.txt": "three",
        "d.jpg": b"",
    }
    root = write(tmp_path, files)
    hint = "no .txt but a {0}: set --source.caption-extension {0}"
    found = {name: (captions, problem) for name, captions, problem in summary(read(root))}
    assert found == {
        "a.jpg": ((), hint.format(".caption")),
        "a.b.jpg": ((), hint.format(".output.txt")),
        "a.b.output.txt": ((), "a .txt without an image beside it"),
        "c.jpg": (("three",), None),
        "d.jpg": ((), None),
    }
    assert summary(read(root, caption_extension=".CAPTION"))[1] == ("a.jpg", ("one",), None)
    assert summary(read(root, caption_extension=".output.txt"))[0] == ("a.b.jpg", ("two",), None)


def test_subfolders_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["a-b.jpg", "a.jpg", "a/1.jpg", "a/b/1.jpg", "a/c.jpg", "a0.jpg", "日本/é 🐕.jpg"]
    assert names == sorted(names)
    records = read(write(tmp_path, {name: name for name in reversed(names)}))
    assert [record.extra["file_name"] for record in records] == names
    assert [read_image_bytes(record.locator).decode() for record in records] == names
    keys = [record.key for record in records]
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert len(set(keys)) == len(keys)
    assert keys[:2] == ["a-b", "a"]
    assert keys[2].startswith("a_1-")
    assert keys == [record.key for record in read(tmp_path)]


def test_two_images_of_one_name_are_left_to_stage_one(tmp_path: Path) -> None:
    records = read(write(tmp_path, {"a.jpg": b"", "a.png": b"", "a.txt": "t"}))
    assert [(record.key, record.captions) for record in records] == [("a", ("t",))] * 2


def test_a_text_without_an_image(tmp_path: Path) -> None:
    records = read(write(tmp_path, {"a.jpg": b"", "a.txt": "t", "README.txt": "t"}))
    problem = "a .txt without an image beside it"
    assert summary(records) == [("README.txt", (), problem), ("a.jpg", ("t",), None)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("é".encode("latin-1"), "caption is not UTF-8"),
        ("a dog".encode("utf-16"), "caption is not UTF-8"),
        ("a dog".encode("utf-16-le"), "caption is not UTF-8: it has NUL bytes"),
        (b"x" * (2**24 + 1), "caption of more than 16777216 bytes"),
    ],
    ids=["latin-1", "utf-16", "utf-16-le", "huge"],
)
def test_texts_that_cannot_be_captions(tmp_path: Path, content: bytes, problem: str) -> None:
    assert summary(read(write(tmp_path, {"a.jpg": b"", "a.txt": content}))) == [
        ("a.jpg", (), problem)
    ]


def test_a_text_that_cannot_be_read(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": b""})
    (root / "a.txt").symlink_to("nowhere")
    problem = "caption cannot be read: No such file or directory"
    assert summary(read(root)) == [("a.jpg", (), problem)]


def test_texts_and_metadata_that_are_not_regular_files(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": b"", "b.jpg": b"", "b.txt": ""})
    os.mkfifo(root / "a.txt")
    os.truncate(root / "b.txt", 30 * 10**9)  # sparse: needs no disk space
    problem = "caption cannot be read: a pipe or a device, expected a regular file"
    huge = "caption of more than 16777216 bytes"
    assert summary(read(root)) == [("a.jpg", (), problem), ("b.jpg", (), huge)]
    (root / "metadata.jsonl").touch()
    os.truncate(root / "metadata.jsonl", 30 * 10**9)
    with pytest.raises(ValueError, match=r"metadata\.jsonl: line 1: more than 16777216 bytes"):
        read(root)
    (root / "metadata.jsonl").unlink()
    os.mkfifo(root / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv: a pipe or a device, expected a regular"):
        read(root)


def test_unusual_captions(tmp_path: Path) -> None:
    long = "very " * 100_000 + "long"
    (record,) = read(write(tmp_path, {"a.jpg": b"", "a.txt": f"🐕👩‍👩‍👧\n{long}\nline\u2028break"}))
    assert record.captions == ("🐕👩‍👩‍👧", long, "line\u2028break")


def test_other_files_are_ignored(tmp_path: Path) -> None:
    names = ["a.npz", "b.json", ".c.jpg", "._d.jpg", ".e/f.jpg", "g.mpg", "h.h5", "jpg"]
    assert read(write(tmp_path, dict.fromkeys(names, b""))) == []


def test_photographs_that_pillow_cannot_read_are_counted(tmp_path: Path) -> None:
    names = ["a.HEIC", "b.jxl", "c.avif", "d.DNG", "e.cr2"]
    problem = "camera raw file: convert it to JPEG"
    assert summary(read(write(tmp_path, dict.fromkeys(names, b"")))) == [
        *((name, (), None) for name in names[:3]),
        *((name, (), problem) for name in names[3:]),
    ]
    write(tmp_path, {"d.jpg": b"", "e.txt": "e", "d.txt": "d"})
    assert summary(read(tmp_path))[3:] == [("d.jpg", ("d",), None), ("e.cr2", ("e",), problem)]


def test_an_image_that_is_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("nowhere")
    (record,) = read(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing file"):
        read_image_bytes(record.locator)


def test_links_to_folders_and_a_cycle(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"a/b.jpg": b""})
    (root / "c").symlink_to("a")
    assert [record.extra["file_name"] for record in read(root)] == ["a/b.jpg", "c/b.jpg"]
    (root / "a" / "ring").symlink_to(root)
    with pytest.raises(ValueError, match="ring: a link to a folder that contains it"):
        read(root)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(os.fsdecode(path))
    (record,) = read(tmp_path)
    assert record.extra["file_name"] == "?.png"
    assert encode_meta(record.extra)
    assert read_image_bytes(record.locator).startswith(b"\x89PNG")


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path: Path, kind: str, end: str, bom: str) -> None:
    lines = {
        "jsonl": ['{"file_name": "b.jpg", "text": "a dog", "likes": 3}', "",
                  '{"file_name": "./sub/a.png", "text": "two"}'],
        "csv": ["likes,file_name,text", '3,b.jpg,"a dog"', ",sub/a.png,two"],
    }[kind]  # fmt: skip
    text = bom + end.join(lines) + end
    files: dict[str, str | bytes] = {f"metadata.{kind}": text, "b.jpg": b"b", "sub/a.png": b"a"}
    first, second = read(write(tmp_path, files))
    assert (first.key, first.captions, first.problem) == ("b", ("a dog",), None)
    assert first.extra == {"likes": 3 if kind == "jsonl" else "3", "file_name": "b.jpg"}
    assert (second.captions, second.extra["file_name"]) == (("two",), "sub/a.png")
    assert [read_image_bytes(record.locator) for record in (first, second)] == [b"b", b"a"]


def test_problems_in_metadata(tmp_path: Path) -> None:
    metadata = jsonl(
        {"file_name": "z.jpg", "text": "missing"},
        {"file_name": "a.jpg", "text": ["one", " ", "two"]},
        {"file_name": "a.jpg", "text": "three", "more": 1},
        {"file_name": "b.jpg"},
        {"file_name": "c.jpg", "text": 5},
        {"file_name": "d.heic", "text": "d"},
        {"file_name": "../up.jpg", "text": "up"},
        {"file_name": "/etc/passwd", "text": "etc"},
        {"file_name": "e\0.jpg", "text": "e"},
    )
    names = ["a.jpg", "b.jpg", "c.jpg", "d.heic", "new.jpg", "a.txt"]
    root = write(tmp_path, dict.fromkeys(names, b"") | {"metadata.jsonl": metadata})
    records = read(root)
    assert summary(records) == [
        ("../up.jpg", ("up",), "file name points outside the folder"),
        ("/etc/passwd", ("etc",), "file name points outside the folder"),
        ("a.jpg", ("one", "two", "three"), None),
        ("b.jpg", (), None),
        ("c.jpg", (), "caption is not text but int"),
        ("d.heic", ("d",), None),
        ("e\0.jpg", ("e",), "file name has a NUL byte"),
        ("new.jpg", (), "not in metadata.jsonl"),
        ("z.jpg", ("missing",), None),
    ]
    with pytest.raises(FileNotFoundError):
        read_image_bytes(records[-1].locator)


def test_each_folder_has_its_own_metadata(tmp_path: Path) -> None:
    row = jsonl({"file_name": "1.jpg", "prompt": "p"})
    files: dict[str, str | bytes] = {
        "a/metadata.jsonl": row,
        "a/1.jpg": b"",
        "b/metadata.csv": "file_name,text\n1.jpg,t\n",
        "b/1.jpg": b"",
        "c/1.jpg": b"",
        "c/1.txt": "x",
    }
    assert summary(read(write(tmp_path, files))) == [
        ("a/1.jpg", ("p",), None),
        ("b/1.jpg", ("t",), None),
        ("c/1.jpg", ("x",), None),
    ]


def test_which_column_is_the_caption(tmp_path: Path) -> None:
    row = {"file_name": "a.jpg", "prompt": "p", "caption": "c", "alt": "x"}
    root = write(tmp_path, {"a.jpg": b"", "metadata.jsonl": jsonl(row)})
    (record,) = read(root)
    assert (record.captions, record.extra["prompt"]) == (("c",), "p")
    assert read(root, caption_column="alt")[0].captions == ("x",)
    with pytest.raises(
        ValueError, match=r"--source.caption-column: .*metadata.jsonl has no column 'no'"
    ):
        read(root, caption_column="no")


def test_long_captions_and_line_breaks_in_csv(tmp_path: Path) -> None:
    long = "very " * 100_000
    text = f'file_name,text\na.jpg,"{long}"\nb.jpg,"one ""two""\nthree"\n'
    root = write(tmp_path, {"a.jpg": b"", "b.jpg": b"", "metadata.csv": text})
    assert [record.captions for record in read(root)] == [(long,), ('one "two"\nthree',)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("jsonl", '{"file_name": "a.jpg", "text": "t"}\n{"a": ', "jsonl: line 2: not JSON: Expect"),
        ("jsonl", "[" * 100_000, "jsonl: line 1: not JSON: maximum recursion"),
        ("jsonl", "\n[1]\n", r"jsonl: line 2: expected a JSON object, found '\[1\]"),
        ("jsonl", '{"name": "a"}', r"jsonl: line 1: expected a file_name, found only \['name'\]"),
        ("jsonl", '{"file_name": 5}', "jsonl: line 1: file_name is 5, expected the name of a file"),
        ("jsonl", "", "metadata.jsonl: names no image"),
        ("jsonl", b'{"file_name": "\xe9.jpg"}', "jsonl: line 1: not UTF-8: invalid"),
        ("jsonl", '{"file_name": "a.jpg"}', "caption-column: .* has no column 'text' or 'cap"),
        ("csv", "file_name,text\na.jpg,t\nb.jpg,t,u\n", "csv: line 3: more fields than the 2 of"),
        ("csv", 'file_name,text\na.jpg,"t\nb.jpg,t\n', "csv: line 2: not CSV: unexpected end of"),
        ("csv", "name,text\na.jpg,t\n", r"csv: line 2: expected a file_name, found only \['name'"),
        ("csv", "file_name,text\n,t\n", "csv: line 2: file_name is '', expected the name"),
        ("csv", b"file_name,text\na.jpg,\xe9\n", "csv: line 2: not UTF-8"),
        ("parquet", b"", "metadata.parquet: expected metadata.jsonl or metadata.csv"),
    ],
)
def test_invalid_metadata(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, {"a.jpg": b"", f"metadata.{name}": content}))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("metadata.csv", r"found metadata\.jsonl and metadata\.csv, expected only one of them"),
        ("sub/metadata.jsonl", "sub: has metadata and so has .*, expected only one"),
    ],
)
def test_metadata_twice(tmp_path: Path, other: str, message: str) -> None:
    row = jsonl({"file_name": "a.jpg", "text": "t"})
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, {"metadata.jsonl": row, other: row}))


def test_records_are_made_one_by_one(tmp_path: Path) -> None:
    root = write(tmp_path, {"a/1.jpg": b"", "a/2.jpg": b"", "b/1.jpg": b""})
    found = folder.records(FolderOptions(root))
    assert next(found).locator == FileLocator(str(root / "a/1.jpg"))
    write(root, {"b/2.jpg": b""})  # b is not listed yet
    assert [record.extra["file_name"] for record in found] == ["a/2.jpg", "b/1.jpg", "b/2.jpg"]
