"""COCO: a folder of images and a captions file, in the layout of 2014 or of 2017.

With an instances file, `objects` in each record's JSON has boxes in pixels of the upright source
image. The key is the image id in twelve digits. The annotation files are held in memory while the
records are listed.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_t2i.pipeline.sources.locators import FileLocator, replace_surrogates
from latent_t2i.pipeline.sources.record import Record, to_json

Entry = Mapping[str, Any]


def records(images: Path, captions: Path, instances: Path | None = None) -> Iterator[Record]:
    """Yields a record with all its captions for each image, in the captions file's order.

    Raises ValueError if an annotation file is not JSON, not COCO's, of the other kind, or
    inconsistent, and if most of the images are missing in the folder.
    """
    document = _read_document(captions, "captions", "caption")
    objects = _read_objects(instances, document["images"]) if instances else {}
    _require_files(images, [image["file_name"] for image in document["images"]])
    annotations = _by_image(document)
    for image in document["images"]:
        image_id, name = image["id"], image["file_name"]
        yield Record(
            key=f"{image_id:012d}",
            locator=FileLocator(str(images / name)),
            captions=_captions(annotations[image_id]),
            extra={"image_id": image_id, "file_name": replace_surrogates(name)}
            | ({"objects": objects.get(image_id, [])} if instances else {}),
        )


def _captions(annotations: list[Entry]) -> tuple[str, ...]:
    texts = (str(annotation["caption"]) for annotation in annotations)
    return tuple(replace_surrogates(text) for text in texts if text.strip())


def _by_image(document: Entry) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = defaultdict(list)
    for annotation in document["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def _require_files(folder: Path, names: list[str]) -> None:
    """Raises ValueError if most images are missing. Single ones are quarantined later.

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
            f"--source.images: {len(missing)} of the {len(names)} images in the captions file are "
            f"not in {folder}, such as {missing[0]}: is it the folder of another split?"
        )


def _read_objects(path: Path, images: list[Entry]) -> dict[int, list[dict[str, Any]]]:
    document = _read_document(path, "instances", "bbox", "category_id")
    expected = {image["id"] for image in images}
    if not any(image["id"] in expected for image in document["images"]):
        raise ValueError(f"{path}: has no image of the captions file: is it of another split?")
    names = {category["id"]: to_json(category["name"]) for category in document["categories"]}
    for number, annotation in enumerate(document["annotations"]):
        if annotation["category_id"] not in names:
            raise ValueError(
                f"{path}: annotations[{number}] has category_id {annotation['category_id']}, "
                'which is not in "categories"'
            )
    return {
        image_id: [
            {
                "category": names[annotation["category_id"]],
                "box_px": annotation["bbox"],
                "crowd": annotation.get("iscrowd", 0),
            }
            for annotation in annotations
        ]
        for image_id, annotations in _by_image(document).items()
    }


def _read_document(path: Path, kind: str, *fields: str) -> dict[str, Any]:
    """Returns an annotation file whose annotations have the fields."""
    if not path.is_file():
        raise ValueError(f"{path}: a folder, expected a COCO annotation file (JSON)")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, expected a COCO annotation file: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: not a COCO annotation file: expected a JSON object")
    needed = {"images": ("id", "file_name"), "annotations": ("image_id", *fields)}
    if kind == "instances":
        needed["categories"] = ("id", "name")
    for name, names in needed.items():
        if not isinstance(document.get(name), list):
            raise ValueError(f'{path}: not a COCO {kind} file: it has no list "{name}"')
        for number, entry in enumerate(document[name]):
            _require_fields(f"{path}: not a COCO {kind} file: {name}[{number}]", entry, names)
    _require_consistent(path, document)
    return document


def _require_fields(place: str, entry: Any, names: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {entry!r}, expected an object with {', '.join(names)}")
    for name in names:
        if name not in entry:
            raise ValueError(f"{place} has no {name!r}, only {sorted(entry)}")


def _require_consistent(path: Path, document: Entry) -> None:
    """Raises ValueError for ids that would lose captions without a message."""
    counts = Counter(image["id"] for image in document["images"])
    for image_id, count in counts.items():
        if not isinstance(image_id, int) or image_id < 0:
            raise ValueError(f"{path}: image id {image_id!r}: expected a whole number")
        if count > 1:
            raise ValueError(f"{path}: image id {image_id} is used {count} times, expected once")
    for image in document["images"]:
        if not isinstance(image["file_name"], str):
            raise ValueError(
                f"{path}: image {image['id']} has file_name {image['file_name']!r}, expected text"
            )
    ids = [annotation["image_id"] for annotation in document["annotations"]]
    strays = [number for number, image_id in enumerate(ids) if image_id not in counts]
    if strays:
        raise ValueError(
            f'{path}: {len(strays)} annotations name images that are not in "images", '
            f"such as annotations[{strays[0]}] with image_id {ids[strays[0]]!r}"
        )
