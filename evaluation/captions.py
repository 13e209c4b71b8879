"""Reads evaluation prompts: the captions of a dataset's images.

A dataset is a COCO captions file, a .jsonl file, a list of prompts (.tsv), a folder with captions
as stage one reads them (metadata.jsonl, metadata.csv, or a .txt or .caption file per image), or a
folder of shards. An image's first caption is its prompt; all of them are kept as references. With a
seed, images and prompts are chosen at random instead, as in U-ViT's protocol.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.model.paths import find_path
from latent_t2i.sample.pictures import read_text
from latent_t2i.scenes.prompts import Prompt
from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.schema import MANIFEST_NAME

csv.field_size_limit(2**31 - 1)  # the default refuses captions above 128 kB
COLUMNS = ("text", "caption", "captions", "prompt")
GROUP = "captions"
KINDS = (
    "a COCO captions file, a .jsonl or .tsv file, a folder with metadata.jsonl, metadata.csv, .txt "
    "or .caption files, or a folder of shards"
)


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """An image of a dataset, with the captions that are not blank."""

    key: str
    """Its file's name, or what else names it."""
    captions: tuple[str, ...]


Entry = Callable[[], Captioned]
"""Reads one image's captions; most datasets are read only as far as needed."""


def read_items(name: str, num: int | None = None, *, seed: int | None = None) -> list[Item]:
    """Returns the captions of `num` images, or of all if there are fewer or `num` is None.

    Images without captions are passed over. They are the dataset's first, or of shards at equal
    distances. With a `seed` the images are a random choice in random order, and so is the prompt
    among an image's captions; it becomes the first. Raises ValueError for a path without captions,
    and for a caption that is not text.
    """
    path = find_path(name)
    if path is None:
        raise ValueError(f"--captions: no file {name!r} in the current directory or the project")
    try:
        found = _choose(_entries(path, num, seed), num, seed)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--captions: {error}") from error
    if not found:
        raise ValueError(f"--captions: found no captions in {path}; expected {KINDS}")
    if num is not None and len(found) < num:
        print(f"{path}: captions of {len(found)} images, fewer than --num-prompts {num}")
    return [
        Item(
            position=number,
            key=image.key,
            captions=image.captions,
            prompt=Prompt(text=image.captions[0]),
            group=GROUP,
        )
        for number, image in enumerate(found)
    ]


class Names:
    """Finds items by the name of an image file: by its path in its folder, else by its last part.

    Suffixes do not count. A last part that several keys share, such as that of a/1.jpg and b/1.jpg,
    finds none of them.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        by_stem: dict[str, dict[str, Item]] = {}
        for item in items:
            path = PurePosixPath(item.key)
            by_stem.setdefault(path.stem, {})[_without_suffix(path)] = item
        unique = {stem: found for stem, found in by_stem.items() if len(found) == 1}
        self._known = {stem: item for stem, found in unique.items() for item in found.values()}
        for found in by_stem.values():
            self._known |= found

    def find(self, path: Path, folder: Path) -> Item | None:
        """Returns the item of an image file in `folder`, or None."""
        relative = PurePosixPath(path.relative_to(folder).as_posix())
        return self._known.get(_without_suffix(relative)) or self._known.get(relative.stem)


def _without_suffix(path: PurePosixPath) -> str:
    return (path.parent / path.stem).as_posix()


def _choose(entries: Sequence[Entry], num: int | None, seed: int | None) -> list[Captioned]:
    """Returns `num` images with captions, or all: the first ones, or a random choice."""
    order: Iterable[int] = range(len(entries))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(entries))
    found: list[Captioned] = []
    for number in order:
        if len(found) == num:
            break
        image = entries[number]()
        if image.captions:
            found.append(image if seed is None else _with_random_prompt(image, seed, number))
    return found


def _with_random_prompt(image: Captioned, seed: int, number: int) -> Captioned:
    """Returns the image with one of its captions, chosen at random, as the first."""
    chosen = int(np.random.default_rng([seed, number]).integers(len(image.captions)))
    rest = image.captions[:chosen] + image.captions[chosen + 1 :]
    return Captioned(key=image.key, captions=(image.captions[chosen], *rest))


def _entries(path: Path, num: int | None, seed: int | None) -> Sequence[Entry]:
    if path.is_dir() and ((path / MANIFEST_NAME).exists() or holds_buckets(path)):
        return _from_shards(path, num if seed is None else None)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".tsv":
        return _from_prompt_list(path)
    return _known(_from_rows(path) if path.suffix == ".jsonl" else _from_coco(path))


def _known(images: Iterable[Captioned]) -> list[Entry]:
    return [lambda image=image: image for image in images]  # type: ignore[misc]


def _from_shards(folder: Path, num: int | None) -> list[Entry]:
    """Returns `num` records at equal distances, so that every bucket takes part, or all."""
    sets = open_buckets(folder).sets if holds_buckets(folder) else (open_shards(folder),)
    records = [(part, number) for part in sets for number in range(len(part))]
    count = len(records) if num is None else min(num, len(records))
    chosen = (records[i * len(records) // count] for i in range(count))
    return [lambda part=part, n=n: _read_record(part, n) for part, n in chosen]  # type: ignore[misc]


def _read_record(part: ShardSet, number: int) -> Captioned:
    meta = part.meta(number)
    place = f"{part.folder}, record {number}"
    name = meta.get("file_name")
    key = name if isinstance(name, str) else part.keys(np.array([number]))[0]
    return Captioned(key=key, captions=_texts(meta.get("captions"), place))


def _from_folder(folder: Path) -> list[Entry]:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).exists():
            return _known(_from_rows(folder / name))
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".caption"))
    paths = [p for p in paths if not any(s.startswith(".") for s in p.relative_to(folder).parts)]
    return [lambda path=path: _read_lines(path, folder) for path in paths]  # type: ignore[misc]


def _read_lines(path: Path, folder: Path) -> Captioned:
    # The file's own name: its stem is the image's, also if that has a full stop.
    key = path.relative_to(folder).as_posix()
    return Captioned(key=key, captions=_texts(read_text(path).split("\n"), str(path)))


def _from_rows(path: Path) -> list[Captioned]:
    """Returns the captions by `file_name`; a row without one is an image of its own."""
    rows = _csv_rows(path, ",") if path.suffix == ".csv" else _json_rows(path)
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        texts = _texts(_caption_of(row, place), place)
        found.setdefault(str(row.get("file_name", number)), []).extend(texts)
    return [Captioned(key=key, captions=tuple(texts)) for key, texts in found.items()]


def _from_prompt_list(path: Path) -> list[Entry]:
    """Returns a prompt per row, also for several rows of an image, as in MLPerf's list."""
    found = []
    for number, row in enumerate(_csv_rows(path, "\t"), start=1):
        place = f"{path}, row {number}"
        image_id = row.get("image_id")
        key = row.get("file_name") or (_coco_key(image_id) if image_id else str(number))
        found.append(Captioned(key=key, captions=_texts(_caption_of(row, place), place)))
    return _known(found)


def _caption_of(row: Any, place: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, found {str(row)[:60]!r}")
    column = next((name for name in COLUMNS if name in row), None)
    if column is None:
        found = ", ".join(map(str, row))[:200]
        raise ValueError(f"{place}: expected one of {', '.join(COLUMNS)}, found {found}")
    return row[column]


def _csv_rows(path: Path, delimiter: str) -> Iterator[Any]:
    return iter(csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter))


def _json_rows(path: Path) -> Iterator[Any]:
    return (_parse(line, path) for line in read_text(path).split("\n") if line.strip())


def _from_coco(path: Path) -> list[Captioned]:
    """Returns the captions of each image, by its id."""
    document = _parse(read_text(path), path)
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f"{path} is not a COCO captions file: it has no list of annotations")
    found: dict[int | str, list[str]] = {}
    for number, annotation in enumerate(annotations):
        place = f"{path}, annotation {number}"
        if not (isinstance(annotation, dict) and {"image_id", "caption"} <= annotation.keys()):
            raise ValueError(f"{place}: expected an object with image_id and caption")
        image_id = annotation["image_id"]
        if not isinstance(image_id, int | str):
            raise ValueError(f"{place}: image_id is {image_id!r}, expected an integer")
        found.setdefault(image_id, []).extend(_texts(annotation["caption"], place))
    names = _coco_names(document.get("images"))
    return [
        Captioned(key=names.get(image_id) or _coco_key(image_id), captions=tuple(found[image_id]))
        for image_id in sorted(found, key=lambda key: (isinstance(key, str), key))
    ]


def _coco_names(images: Any) -> dict[Any, str]:
    """Returns the images' file names by id, of those that have both."""
    entries = [image for image in images if isinstance(image, dict)] if images else []
    return {
        image["id"]: image["file_name"]
        for image in entries
        if isinstance(image.get("file_name"), str) and isinstance(image.get("id"), int | str)
    }


def _coco_key(image_id: int | str) -> str:
    """Returns an image's id as in COCO's file names."""
    return f"{int(image_id):012d}" if str(image_id).isdecimal() else str(image_id)


def _texts(value: Any, place: str) -> tuple[str, ...]:
    """Returns the captions that are not blank; null means that there is none."""
    texts: Iterable[Any] = value if isinstance(value, list) else [value]
    found = []
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{place}: the caption is {text!r}, expected text")
        if text and text.strip():
            found.append(text.strip())
    return tuple(found)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error)[:100]}: {text[:60]!r}") from error
