"""COCO: a folder of images and a captions file, in the layout of 2014 or of 2017.

With an instances file, `objects` in each record's JSON has boxes in pixels of the upright source
image. The key is the image id in twelve digits. pycocotools indexes the files, after checks with
errors that name the entry. The files are held in memory while the records are listed.
"""

import contextlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from latent_t2i.pipeline.sources.locators import (
    FileLocator,
    LocatorError,
    open_regular,
    replace_surrogates,
)
from latent_t2i.pipeline.sources.record import (
    Record,
    SourceError,
    parse_captions,
    problem_of_name,
    to_json,
)

Entry = Mapping[str, Any]
FIELDS: dict[str, dict[str, dict[str, type]]] = {
    "captions": {
        "images": {"id": int, "file_name": str},
        "annotations": {"image_id": int, "caption": object},
    },
    "instances": {
        "images": {"id": int},
        "annotations": {"image_id": int, "bbox": list, "category_id": int},
        "categories": {"id": int, "name": str},
    },
}
"""The lists of each kind of annotation file, and the fields of their entries."""
MAX_JSON_BYTES = 2**31  # COCO's largest has 0.5 GB
MAX_ID = 10**18  # fits a 64-bit integer
MAX_PX = 10**9


def records(images: Path, captions: Path, instances: Path | None = None) -> Iterator[Record]:
    """Yields a record with all its captions for each image, in the captions file's order.

    Raises SourceError if an annotation file is not JSON, not COCO's, of the other kind, or
    inconsistent, and if most of the images are missing in the folder.
    """
    document = _read_document(captions, "captions")
    objects = _read_objects(instances, document["images"]) if instances else {}
    _require_files(images, [image["file_name"] for image in document["images"]])
    annotations = _index_annotations(document)
    for image in document["images"]:
        image_id, name = image["id"], image["file_name"]
        texts, problem = parse_captions([a["caption"] for a in annotations[image_id]])
        yield Record(
            key=f"{image_id:012d}",
            locator=FileLocator(str(images / name)),
            captions=texts,
            extra={"image_id": image_id, "file_name": replace_surrogates(name)}
            | ({"objects": objects.get(image_id, [])} if instances else {}),
            problem=problem_of_name(name) or problem,
        )


def _index_annotations(document: Mapping[str, Any]) -> Mapping[int, list[Entry]]:
    """Returns the annotations by image id."""
    for number, annotation in enumerate(document["annotations"]):
        annotation.setdefault("id", number)  # pycocotools needs one, our records do not
    coco = COCO()
    coco.dataset = {"images": document["images"], "annotations": document["annotations"]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    by_image: Mapping[int, list[Entry]] = coco.imgToAnns
    return by_image


def _require_files(folder: Path, names: list[str]) -> None:
    """Raises SourceError if most images are missing. Single ones are quarantined later.

    Lists each folder once and opens no file.
    """
    listed: dict[str, set[str]] = {}  # a stat per image would take minutes on a network disk
    missing = []
    for name in names:
        if problem_of_name(name):
            continue
        parent, _, last = name.rpartition("/")
        if parent not in listed:
            below = folder / parent
            listed[parent] = {path.name for path in below.iterdir()} if below.is_dir() else set()
        if last not in listed[parent]:
            missing.append(name)
    if len(missing) > len(names) / 2:
        raise SourceError(
            f"--source.images: {len(missing)} of the {len(names)} images in the captions file are "
            f"not in {folder}, such as {missing[0]}: is it the folder of another split?"
        )


def _read_objects(path: Path, images: list[Entry]) -> dict[int, list[dict[str, Any]]]:
    document = _read_document(path, "instances")
    expected = {image["id"] for image in images}
    if not any(image["id"] in expected for image in document["images"]):
        raise SourceError(f"{path}: has no image of the captions file: is it of another split?")
    names = {category["id"]: to_json(category["name"]) for category in document["categories"]}
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    # An instance without its category or box would be a silent loss, so that it is an error.
    for number, annotation in enumerate(document["annotations"]):
        category_id, box, crowd = (annotation.get(k) for k in ("category_id", "bbox", "iscrowd"))
        place = f"{path}: annotations[{number}]"
        if category_id not in names:
            raise SourceError(
                f'{place} has category_id {category_id}, which is not in "categories"'
            )
        if len(box) != 4 or not all(type(x) in (int, float) and abs(x) < MAX_PX for x in box):
            raise SourceError(f"{place} has bbox {_show(box)}, expected four finite numbers")
        if crowd is not None and not isinstance(crowd, int):
            raise SourceError(f"{place} has iscrowd {_show(crowd)}, expected 0 or 1")
        found[annotation["image_id"]].append(
            {"category": names[category_id], "box_px": box, "crowd": crowd or 0}
        )
    return found


def _read_document(path: Path, kind: str) -> dict[str, Any]:
    """Returns an annotation file whose entries have the fields of FIELDS."""
    try:
        with open_regular(path, MAX_JSON_BYTES) as file:
            document = json.loads(file.read())
    except LocatorError as error:
        raise SourceError(f"{path}: not a COCO annotation file: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON, expected a COCO annotation file: {error}") from error
    if not isinstance(document, dict):
        raise SourceError(f"{path}: not a COCO annotation file: expected a JSON object")
    for name, fields in FIELDS[kind].items():
        if not isinstance(document.get(name), list):
            raise SourceError(f'{path}: not a COCO {kind} file: it has no list "{name}"')
        for number, entry in enumerate(document[name]):
            if problem := _problem_of_entry(entry, fields):
                raise SourceError(f"{path}: not a COCO {kind} file: {name}[{number}] {problem}")
    _require_consistent(path, document)
    return document


def _problem_of_entry(entry: Any, fields: Mapping[str, type]) -> str | None:
    if not isinstance(entry, dict):
        return f"is {_show(entry)}, expected an object with {', '.join(fields)}"
    for name, kind in fields.items():
        if name not in entry:
            return f"has no {name!r}, only {_show(sorted(entry))}"
        value = entry[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"has {name} {_show(value)}, expected {kind.__name__}"
        if kind is int and isinstance(value, int) and not 0 <= value < MAX_ID:
            return f"has {name} {_show(value)}, expected 0 to {MAX_ID - 1}"
    return None


def _show(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _require_consistent(path: Path, document: Entry) -> None:
    """Raises SourceError for ids that would lose captions without a message."""
    counts = Counter(image["id"] for image in document["images"])
    for image_id, count in counts.items():
        if count > 1:
            raise SourceError(f"{path}: image id {image_id} is used {count} times, expected once")
    ids = [annotation["image_id"] for annotation in document["annotations"]]
    strays = [number for number, image_id in enumerate(ids) if image_id not in counts]
    if strays:
        raise SourceError(
            f'{path}: {len(strays)} annotations name images that are not in "images", '
            f"such as annotations[{strays[0]}] with image_id {ids[strays[0]]!r}"
        )
