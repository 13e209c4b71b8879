"""The COCO source: a folder of images and COCO's captions file, read through pycocotools.

Both layouts work, 2014 (COCO_train2014_000000000009.jpg) and 2017 (000000000009.jpg), since the
annotations name the files. With an instances file too, each record's `objects` tell the boxes in
pixels of the source image, the right way up. The key is the image id in twelve digits.
"""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from latent_t2i.pipeline.sources.locators import FileLocator, clean
from latent_t2i.pipeline.sources.record import Record, clean_json


def records(images: Path, captions: Path, instances: Path | None = None) -> Iterator[Record]:
    """Yields a record for each image of the captions file, in its order, with all its captions.

    An image without a caption has none here; blank captions do not count. The files are held while
    the records are listed, and no longer. Raises ValueError for a file that is not JSON, not
    COCO's, of the other kind, or at odds with itself, and for a folder without most of the images.
    """
    index = _read_index(captions, "captions", {"caption"})
    objects = _read_objects(instances, index.imgs.keys()) if instances else {}
    _require_files(images, [image["file_name"] for image in index.imgs.values()])
    for image_id, image in index.imgs.items():
        name = image["file_name"]
        yield Record(
            key=f"{image_id:012d}",
            locator=FileLocator(str(images / name)),
            captions=_captions_of(index.imgToAnns.get(image_id, ())),
            extra={"image_id": image_id, "file_name": clean(name)}
            | ({"objects": objects.get(image_id, [])} if instances else {}),
        )


def _captions_of(annotations: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Returns the captions as they are; half a surrogate pair, which no UTF-8 can hold, goes."""
    texts = (str(annotation["caption"]) for annotation in annotations)
    return tuple(clean(text) for text in texts if text.strip())


def _require_files(folder: Path, names: list[str]) -> None:
    """Refuses a folder without most of the images: single ones are left out later, with reason.

    Lists each folder once and opens no file.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent not in listed:
            below = folder / parent
            listed[parent] = {path.name for path in below.iterdir()} if below.is_dir() else set()
        if last not in listed[parent]:
            missing.append(name)
    if len(missing) > len(names) / 2:
        raise ValueError(
            f"--source.images: {len(missing)} of the {len(names)} files that the captions name are "
            f"not in {folder}, {missing[0]} first: is it the folder of another split?"
        )


def _read_objects(path: Path, image_ids: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
    index = _read_index(path, "instances", {"bbox", "category_id"})
    if not index.imgs.keys() & set(image_ids):
        raise ValueError(f"{path}: has none of the captions file's images: of another split?")
    names = {category["id"]: category["name"] for category in index.dataset.get("categories", [])}
    for annotation in index.dataset["annotations"]:
        if annotation["category_id"] not in names:
            raise ValueError(
                f"{path}: annotation {annotation['id']} has category {annotation['category_id']}, "
                'which is not under "categories"'
            )
    found: dict[int, list[dict[str, Any]]] = {}
    for image_id, annotations in index.imgToAnns.items():
        found[image_id] = [
            {
                "category": clean_json(names[annotation["category_id"]]),
                "box_px": annotation["bbox"],
                "crowd": annotation.get("iscrowd", 0),
            }
            for annotation in annotations
        ]
    return found


def _read_index(path: Path, kind: str, fields: set[str]) -> COCO:
    """Reads an annotation file and checks it; pycocotools would fail without saying where."""
    document = _read_json(path)
    for name in ("images", "annotations"):
        if not isinstance(document.get(name), list):
            raise ValueError(f'{path}: not a COCO {kind} file: it has no list "{name}"')
    _require_fields(path, kind, document["images"], "images", {"id", "file_name"})
    _require_fields(path, kind, document["annotations"], "annotations", {"id", "image_id"} | fields)
    if kind == "instances":
        _require_fields(path, kind, document.get("categories", []), "categories", {"id", "name"})
    _require_consistent(path, document)
    index = COCO()
    index.dataset = document
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        index.createIndex()
    return index


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: a folder, expected a COCO annotation file (JSON)")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, expected a COCO annotation file: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: not a COCO annotation file: it holds no JSON object")
    return document


def _require_fields(path: Path, kind: str, items: list[Any], name: str, fields: set[str]) -> None:
    for number, item in enumerate(items):
        missing = sorted(fields - item.keys() if isinstance(item, dict) else fields)
        if missing:
            found = sorted(item) if isinstance(item, dict) else item
            raise ValueError(
                f"{path}: not a COCO {kind} file: {name}[{number}] has no {missing[0]!r}, "
                f"only {found}"
            )


def _require_consistent(path: Path, document: Mapping[str, Any]) -> None:
    """Holds ids to each other: what is not found would be a caption lost without a word."""
    counts = Counter(image["id"] for image in document["images"])
    for image_id, count in counts.items():
        if not isinstance(image_id, int) or image_id < 0:
            raise ValueError(f"{path}: image id {image_id!r}: expected a whole number")
        if count > 1:
            raise ValueError(f"{path}: image id {image_id} stands {count} times")
    for image in document["images"]:
        if not isinstance(image["file_name"], str):
            raise ValueError(
                f"{path}: image {image['id']} has file_name {image['file_name']!r}, expected text"
            )
    strays = [a for a in document["annotations"] if a["image_id"] not in counts]
    if strays:
        raise ValueError(
            f'{path}: {len(strays)} annotations name images that are not under "images": '
            f"annotation {strays[0]['id']} names {strays[0]['image_id']!r}"
        )
