"""Reads evaluation prompts: the first caption of each image of a dataset.

A dataset is a COCO captions file, a .jsonl file, a folder with captions as stage one reads them
(metadata.jsonl, metadata.csv, or a .txt or .caption file per image), or a folder of shards.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from latent_t2i.model.paths import find_path
from latent_t2i.sample.pictures import read_text
from latent_t2i.scenes.prompts import Prompt
from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import MANIFEST_NAME

csv.field_size_limit(2**31 - 1)  # the default refuses captions above 128 kB
COLUMNS = ("text", "caption", "captions", "prompt")
KINDS = (
    "a COCO captions file, a .jsonl file, a folder with metadata.jsonl, metadata.csv, .txt or "
    ".caption files, or a folder of shards"
)


def read_captions(name: str, num: int) -> list[Prompt]:
    """Returns the first caption of each of `num` images, or of all if there are fewer.

    Raises ValueError for a path without captions, and for a caption that is not text.
    """
    path = find_path(name)
    if path is None:
        raise ValueError(f"--captions: no file {name!r} in the current directory or the project")
    try:
        texts = list(islice(_first_captions(path, num), num))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--captions: {error}") from error
    if not texts:
        raise ValueError(f"--captions: found no captions in {path}; expected {KINDS}")
    if len(texts) < num:
        print(f"{path}: captions of {len(texts)} images, fewer than --num-prompts {num}")
    return [Prompt(text=text) for text in texts]


def _first_captions(path: Path, num: int) -> Iterator[str]:
    if path.is_dir() and ((path / MANIFEST_NAME).exists() or holds_buckets(path)):
        return _from_shards(path, num)
    if path.is_dir():
        return _from_folder(path)
    return _from_rows(path) if path.suffix == ".jsonl" else _from_coco(path)


def _from_shards(folder: Path, num: int) -> Iterator[str]:
    """Yields captions of `num` records at equal distances, so that every bucket takes part."""
    sets = open_buckets(folder).sets if holds_buckets(folder) else (open_shards(folder),)
    records = [(part, number) for part in sets for number in range(len(part))]
    count = min(num, len(records))
    for part, number in (records[i * len(records) // count] for i in range(count)):
        captions = part.meta(number).get("captions")
        text = _first_text(captions, f"{part.folder}, record {number}")
        if text is not None:
            yield text


def _from_folder(folder: Path) -> Iterator[str]:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).exists():
            yield from _from_rows(folder / name)
            return
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".caption")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            text = _first_text(read_text(path).split("\n"), str(path))
            if text is not None:
                yield text


def _from_rows(path: Path) -> Iterator[str]:
    """Yields the first caption of each `file_name`, or of each row without one."""
    seen: set[str] = set()
    rows = (
        csv.DictReader(io.StringIO(read_text(path))) if path.suffix == ".csv" else _json_rows(path)
    )
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, found {str(row)[:60]!r}")
        column = next((name for name in COLUMNS if name in row), None)
        if column is None:
            found = ", ".join(map(str, row))[:200]
            raise ValueError(f"{place}: expected one of {', '.join(COLUMNS)}, found {found}")
        text = _first_text(row[column], place)
        file_name = str(row.get("file_name", number))
        if text is not None and file_name not in seen:
            seen.add(file_name)
            yield text


def _json_rows(path: Path) -> Iterator[Any]:
    return (_parse(line, path) for line in read_text(path).split("\n") if line.strip())


def _from_coco(path: Path) -> Iterator[str]:
    document = _parse(read_text(path), path)
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f"{path} is not a COCO captions file: it has no list of annotations")
    first: dict[int | str, str] = {}
    for number, annotation in enumerate(annotations):
        place = f"{path}, annotation {number}"
        if not (isinstance(annotation, dict) and {"image_id", "caption"} <= annotation.keys()):
            raise ValueError(f"{place}: expected an object with image_id and caption")
        image_id = annotation["image_id"]
        if not isinstance(image_id, int | str):
            raise ValueError(f"{place}: image_id is {image_id!r}, expected an integer")
        text = _first_text(annotation["caption"], place)
        if text is not None:
            first.setdefault(image_id, text)
    for image_id in sorted(first, key=lambda key: (isinstance(key, str), key)):
        yield first[image_id]


def _first_text(value: Any, place: str) -> str | None:
    """Returns the first caption that is not blank; null means that there is none."""
    texts: Iterable[Any] = value if isinstance(value, list) else [value]
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{place}: the caption is {text!r}, expected text")
        if text and text.strip():
            return text.strip()
    return None


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error)[:100]}: {text[:60]!r}") from error
