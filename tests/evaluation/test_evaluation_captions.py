"""Evaluation prompts from every kind of dataset, and the errors of unusable ones."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from latent_t2i.evaluation.captions import read_items
from tests.shard_sets import make_examples, write_buckets, write_set


def write_coco(folder: Path) -> Path:
    captions = [(3, "third"), (1, None), (1, " first "), (1, "again"), (2, "second"), (4, " ")]
    annotations = [{"image_id": number, "caption": text} for number, text in captions]
    images = [{"id": 2, "file_name": "two.jpg"}, {"id": 1}, "broken"]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def write_jsonl(folder: Path) -> Path:
    # Only a newline ends a line of JSON: other line separators may be part of a string.
    rows = [
        {"text": "\u2028first"},
        {"caption": "second"},
        {"captions": ["", "third"]},
        {"text": None},
    ]
    path = folder / "captions.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def write_jsonl_folder(folder: Path) -> Path:
    rows = [("a.png", "first"), ("a.png", "again"), ("b.png", "second"), ("c.png", "third")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8-sig")
    return folder


def write_csv_folder(folder: Path) -> Path:
    rows = "file_name,text\na.png,first\na.png,again\nb.png,second\nc.png,third\n"
    (folder / "metadata.csv").write_text(rows)
    return folder


def write_text_folder(folder: Path) -> Path:
    (folder / "deep").mkdir()
    (folder / "a.txt").write_text("\n first\nagain\n")
    (folder / "b.caption").write_text("second")
    (folder / "deep" / "c.txt").write_text("third")
    (folder / "deep" / "d.txt").write_text("\n")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


@pytest.mark.parametrize(
    "write", [write_coco, write_jsonl, write_jsonl_folder, write_csv_folder, write_text_folder]
)
def test_the_first_caption_of_each_image_is_a_prompt(
    tmp_path: Path, write: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    items = read_items(str(path), 3)
    assert [item.captions[0] for item in items] == ["first", "second", "third"]
    assert [item.prompt.text for item in items] == ["first", "second", "third"]
    assert [item.position for item in items] == [0, 1, 2]
    assert {item.group for item in items} == {"captions"}
    assert capsys.readouterr().out == ""
    assert [item.captions[0] for item in read_items(str(path), 2)] == ["first", "second"]
    assert len(read_items(str(path), 9)) == 3
    assert "captions of 3 images, fewer than --num-prompts 9" in capsys.readouterr().out


def test_shards_give_captions_of_all_parts(tmp_path: Path) -> None:
    examples = make_examples(6)
    write_set(tmp_path / "set", [examples[:4], examples[4:]])
    texts = [item.captions[0] for item in read_items(str(tmp_path / "set"), 3)]
    assert texts == ["caption 0 of 0", "caption 0 of 2", "caption 0 of 4"]
    write_buckets(tmp_path / "buckets", {"32x32": [4], "64x32": [2]})
    texts = [item.captions[0] for item in read_items(str(tmp_path / "buckets"), 6)]
    assert texts == [f"caption 0 of {number}" for number in (0, 1, 2, 3, 0, 1)]


@pytest.mark.parametrize(
    ("write", "keys", "captions"),
    [
        (write_coco, ["000000000001", "two.jpg", "000000000003"], ("first", "again")),
        (write_jsonl, ["1", "2", "3"], ("first",)),
        (write_jsonl_folder, ["a.png", "b.png", "c.png"], ("first", "again")),
        (write_csv_folder, ["a.png", "b.png", "c.png"], ("first", "again")),
        (write_text_folder, ["a.txt", "b.caption", "deep/c.txt"], ("first", "again")),
    ],
)
def test_all_captions_of_an_image_are_references(
    tmp_path: Path, write: Callable[[Path], Path], keys: list[str], captions: tuple[str, ...]
) -> None:
    items = read_items(str(write(tmp_path)), 3)
    assert [item.key for item in items] == keys
    assert items[0].captions == captions


def test_records_of_shards_keep_their_captions_and_names(tmp_path: Path) -> None:
    (example,) = make_examples(1)
    named = replace(example, key="x", meta={**example.meta, "file_name": "photo.jpg"})
    write_set(tmp_path / "set", [[example, named]])
    first, second = read_items(str(tmp_path / "set"), 2)
    assert first.key == example.key
    assert first.captions == tuple(example.meta["captions"])
    assert second.key == "photo.jpg"


def test_a_seed_chooses_images_and_prompts_at_random(tmp_path: Path) -> None:
    lines = [
        {"file_name": f"{n}.png", "captions": [f"{n} caption {c}" for c in range(5)]}
        for n in range(200)
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    items = read_items(str(path), 100, seed=1)
    assert items == read_items(str(path), 100, seed=1)
    assert items != read_items(str(path), 100, seed=2)
    assert items[:10] == read_items(str(path), 10, seed=1), "fewer images are the first of more"
    numbers = [int(item.key.removesuffix(".png")) for item in items]
    assert len(set(numbers)) == 100
    assert numbers != sorted(numbers)
    assert max(numbers) > 150, "of the whole dataset"
    for item, number in zip(items, numbers, strict=True):
        assert sorted(item.captions) == lines[number]["captions"]
    chosen = [item.captions[0].rpartition(" ")[2] for item in items]
    assert all(10 <= chosen.count(str(c)) <= 32 for c in range(5)), chosen


def test_each_row_of_a_prompt_list_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "val2014_30k.tsv"
    path.write_text('id\timage_id\tcaption\n7\t42\tA dog.\n8\t42\t"A ""big"" dog"\n9\t3\tA cat\n')
    items = read_items(str(path), 9)
    assert [(item.key, item.captions) for item in items] == [
        ("000000000042", ("A dog.",)),
        ("000000000042", ('A "big" dog',)),
        ("000000000003", ("A cat",)),
    ]


def annotated(**annotation: object) -> str:
    return json.dumps({"annotations": [annotation]})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{", r"x\.json is not JSON"),
        ("x.json", "[" * 100_000, r"x\.json is not JSON"),
        ("x.json", "[]", "is not a COCO captions file"),
        (
            "x.json",
            annotated(image_id=1, bbox=[]),
            "annotation 0: expected an object",
        ),
        ("x.json", annotated(image_id=[4], caption="a"), r"annotation 0: image_id is \[4\]"),
        (
            "x.json",
            annotated(image_id=1, caption=3),
            "annotation 0: the caption is 3",
        ),
        (
            "x.json",
            annotated(image_id=1, caption=float("nan")),
            "the caption is nan",
        ),
        ("x.json", annotated(image_id=1, caption=None), r"no captions in .*; expected a COCO"),
        ("x.jsonl", '{"text": "a"}\n{"text": {}}', "row 2: the caption is {}, expected text"),
        ("x.jsonl", '{"text": "a"}\n"b"', "row 2: expected a JSON object, found 'b'"),
        (
            "x.jsonl",
            '{"title": "a"}',
            "row 1: expected one of text, .*, found title",
        ),
        ("x.jsonl", "", "no captions in"),
        ("x/metadata.csv", "file_name,title\na," + "x" * 200_000, "row 1: expected one of text"),
        ("x/a.txt", b"\xff\xfea", r"a\.txt is not UTF-8"),
        ("x/a.png", "", r"no captions in .*/x; expected"),
    ],
)
def test_unusable_captions_are_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = str(tmp_path / name.partition("/")[0])
    with pytest.raises(ValueError, match=rf"^--captions: .*{message}"):
        read_items(given, 5)


def test_missing_and_endless_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--captions: no file 'gone\.json'"):
        read_items("gone.json", 1)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(2**31)
    for name, message in (
        ("pipe.jsonl", "not a regular file"),
        ("zero.json", "not a regular file"),
        ("sparse.json", "2,147,483,648 bytes, expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            read_items(str(tmp_path / name), 1)
