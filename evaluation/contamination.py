"""Finds evaluation images that are in the training set.

A model that has seen the reference images or their captions gets better figures than it deserves,
and COCO invites it: train2017 contains most of val2014. Images are the same if

* their COCO ids are equal, whatever the layout (COCO_val2014_000000000042.jpg is 000000000042), and
  they share a caption if both have some: other data sets count their images, too;
* or the sha256 of their files are equal. Stage one stores it in each record (image_sha256), and
  img2dataset that of the file before its own resizing (sha256).

A prompt that is also a caption of the training set is no proof, and common in small grammars; it
is printed and not counted.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.evaluation.objects import coco_id
from latent_t2i.evaluation.training_set import choose, open_sets
from latent_t2i.model.paths import hash_file
from latent_t2i.shards.duplicates import MAX_COMPARED, read_image_hashes
from latent_t2i.shards.reader import ShardSet

KEYS_AT_ONCE = 10_000
MAX_READ = 200_000
"""Most records of a set whose JSON is read for captions and both hashes. Of a larger set, stage
one's hashes of up to MAX_COMPARED records are compared as well, and the ids of all records."""
HASH_FIELDS = ("image_sha256", "sha256")
NUM_EXAMPLES = 10
CHECKED, PARTLY, NOT_CHECKED, NOT_NEEDED = "checked", "partly checked", "not checked", "not needed"


@dataclass(kw_only=True)
class Found:
    """Evaluation images that are in the training set, and what was compared."""

    examples: dict[str, str] = field(default_factory=dict)
    """The training key, by the image's name."""
    same_captions: set[str] = field(default_factory=set)
    num_records: int = 0
    num_ids: int = 0
    """Records whose key has a COCO id."""
    num_hashes: int = 0
    """Records whose hash was compared."""
    num_read: int = 0
    """Records whose captions were compared."""


def check(
    items: Sequence[Item], train_shards: Sequence[Path], files: Collection[Path] = ()
) -> dict[str, Any]:
    """Returns the images that are in the training set, and how many were compared.

    `items` are the prompts' and the reference's images, `files` those of the reference. `status` is
    CHECKED, or PARTLY or NOT_CHECKED with a `reason`. Raises ValueError for a folder that holds no
    shards.
    """
    known: dict[int, list[Item]] = {}
    for item in items:
        number = coco_id(item.key)
        if number is not None:
            known.setdefault(number, []).append(item)
    hashes = {hash_file(path): path.name for path in files}
    prompts = {_plain(item.captions[0]): item.captions[0] for item in items if item.captions}
    found = Found()
    for shards in open_sets(train_shards):
        found.num_records += len(shards)
        if known:
            _compare_ids(shards, known, found)
        if prompts or hashes:
            _compare_contents(shards, prompts, hashes, found)
        if hashes and len(shards) > MAX_READ:
            _compare_hashes(shards, hashes, found)
    if found.same_captions and not found.examples:
        texts = sorted(found.same_captions)
        print(
            f"{len(texts)} of the prompts are also captions in the training set, such as "
            f"{texts[0]!r}: check that their images are not training images ({found.num_read:,} "
            f"of {found.num_records:,} records compared)"
        )
    return _coverage(items, files, found) | _summary(found)


def unchecked(status: str, reason: str) -> dict[str, Any]:
    """Returns the record of a check that was not made."""
    return {"status": status, "reason": reason, "num_images_compared": 0} | _summary(Found())


def _summary(found: Found) -> dict[str, Any]:
    names = sorted(found.examples)
    return {
        "count": len(names),
        "examples": names[:NUM_EXAMPLES],
        "train_keys": [found.examples[name] for name in names[:NUM_EXAMPLES]],
        "num_same_captions": len(found.same_captions),
        "num_records": found.num_records,
        "num_hashes_compared": found.num_hashes,
    }


def _coverage(items: Sequence[Item], files: Collection[Path], found: Found) -> dict[str, Any]:
    """Returns status, reason, and the numbers of images and of compared images."""
    hashed = {_image(path.name) for path in files} if found.num_hashes else set()
    by_id = {_image(i.key) for i in items if found.num_ids and coco_id(i.key) is not None}
    images = {_image(item.key) for item in items} | {_image(path.name) for path in files}
    compared = hashed | by_id
    reasons = []
    if images - compared:
        reasons.append(
            f"{len(images - compared)} of the {len(images)} images of the prompts and the "
            "reference have no COCO id or file that could be compared with the training set"
        )
    if hashed - by_id and found.num_hashes < found.num_records:
        reasons.append(
            f"hashes of {found.num_hashes:,} of {found.num_records:,} records were compared"
        )
    return {
        "status": CHECKED if not reasons else PARTLY if compared else NOT_CHECKED,
        "reason": "; ".join(reasons) or None,
        "num_images": len(images),
        "num_images_compared": len(compared),
    }


def _compare_ids(shards: ShardSet, known: Mapping[int, Sequence[Item]], found: Found) -> None:
    for record, key in _keys(shards):
        number = coco_id(key)
        if number is None:
            continue
        found.num_ids += 1
        for item in known.get(number, ()):
            captions = _captions(shards.meta(record)) if item.captions else set()
            if not captions or not captions.isdisjoint(map(_plain, item.captions)):
                found.examples[_name(item)] = key


def _keys(shards: ShardSet) -> Iterator[tuple[int, str]]:
    """Yields the number and key of every record."""
    for start in range(0, len(shards), KEYS_AT_ONCE):
        numbers = np.arange(start, min(start + KEYS_AT_ONCE, len(shards)))
        yield from zip(numbers.tolist(), shards.keys(numbers), strict=True)


def _compare_contents(
    shards: ShardSet, prompts: Mapping[str, str], hashes: Mapping[str, str], found: Found
) -> None:
    """Compares captions and hashes of all records, or of MAX_READ of them."""
    records = choose(len(shards), MAX_READ).tolist()
    for record in tqdm(records, desc="contamination", unit="record", disable=None, leave=False):
        meta = shards.meta(record)
        found.num_read += 1
        found.same_captions |= {prompts[c] for c in _captions(meta) & prompts.keys()}
        digests = [meta[name] for name in HASH_FIELDS if isinstance(meta.get(name), str)]
        found.num_hashes += bool(digests) and bool(hashes)
        for name in (hashes[digest] for digest in digests if digest in hashes):
            found.examples[name] = shards.keys(np.array([record]))[0]


def _compare_hashes(shards: ShardSet, hashes: Mapping[str, str], found: Found) -> None:
    """Compares stage one's hashes, which are read without the rest of the JSON."""
    read = set(choose(len(shards), MAX_READ).tolist())
    known = np.array([digest.encode() for digest in hashes])
    for records, digests in read_image_hashes(shards, -(-len(shards) // MAX_COMPARED)):
        if digests is None:
            continue
        found.num_hashes += sum(record not in read for record in records.tolist())
        for index in np.flatnonzero(np.isin(digests, known)):
            key = shards.keys(records[[index]])[0]
            found.examples[hashes[digests[index].decode()]] = key


def _name(item: Item) -> str:
    """Returns the name under which an image counts once, as a prompt's and as the reference's."""
    return item.key.rpartition("/")[2]


def _image(name: str) -> int | str:
    """Returns an image's COCO id, else its name without folder and suffix."""
    number = coco_id(name)
    return PurePosixPath(name).stem if number is None else number


def _captions(meta: Mapping[str, Any]) -> set[str]:
    captions = meta.get("captions")
    return {_plain(text) for text in captions if isinstance(text, str)} if captions else set()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
