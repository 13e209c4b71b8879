"""Finds evaluation images that are in the training set.

A model that has seen the reference images or their captions gets better figures than it deserves,
and COCO invites it: train2017 contains most of val2014. Images are the same if

* their COCO ids are equal, whatever the layout (COCO_val2014_000000000042.jpg is 000000000042), and
  they share a caption if both have some: other data sets count their images, too;
* or the sha256 of their files are equal, where the source stored it in the records (img2dataset).

A prompt that is also a caption of the training set is no proof, and common in small grammars; it
is printed and not counted.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.evaluation.objects import coco_id
from latent_t2i.evaluation.training_set import choose, open_sets
from latent_t2i.model.paths import hash_file
from latent_t2i.shards.reader import ShardSet

KEYS_AT_ONCE = 10_000
MAX_READ = 200_000
"""Most records whose JSON is read for captions and hashes; the ids of all records are compared."""
NUM_EXAMPLES = 10


@dataclass(kw_only=True)
class Found:
    """Evaluation images that are in the training set, and why."""

    examples: dict[str, str] = field(default_factory=dict)
    """The training key, by the image's name."""
    same_captions: set[str] = field(default_factory=set)


def check(
    items: Sequence[Item], train_shards: Sequence[Path], files: Collection[Path] = ()
) -> dict[str, Any] | None:
    """Returns `count` and `examples` of the images that are in the training set; None if none is.

    `items` are the prompts' and the reference's images, `files` those of the reference. Raises
    ValueError for a folder that holds no shards.
    """
    known: dict[int, list[Item]] = {}
    for item in items:
        number = coco_id(item.key)
        if number is not None:
            known.setdefault(number, []).append(item)
    found = Found()
    for shards in open_sets(train_shards):
        if known:
            _compare_ids(shards, known, found)
        _compare_contents(shards, items, files, found)
    if found.same_captions and not found.examples:
        texts = sorted(found.same_captions)
        print(
            f"{len(texts)} of the prompts are also captions in the training set, such as "
            f"{texts[0]!r}: check that their images are not training images"
        )
    if not found.examples:
        return None
    names = sorted(found.examples)
    return {
        "count": len(names),
        "examples": names[:NUM_EXAMPLES],
        "train_keys": [found.examples[name] for name in names[:NUM_EXAMPLES]],
        "num_same_captions": len(found.same_captions),
    }


def _compare_ids(shards: ShardSet, known: Mapping[int, Sequence[Item]], found: Found) -> None:
    for record, key in _keys(shards):
        number = coco_id(key)
        for item in known.get(number, ()) if number is not None else ():
            captions = _captions(shards.meta(record)) if item.captions else set()
            if not captions or not captions.isdisjoint(map(_plain, item.captions)):
                found.examples[_name(item)] = key


def _keys(shards: ShardSet) -> Iterator[tuple[int, str]]:
    """Yields the number and key of every record."""
    for start in range(0, len(shards), KEYS_AT_ONCE):
        numbers = np.arange(start, min(start + KEYS_AT_ONCE, len(shards)))
        yield from zip(numbers.tolist(), shards.keys(numbers), strict=True)


def _compare_contents(
    shards: ShardSet, items: Sequence[Item], files: Collection[Path], found: Found
) -> None:
    """Compares captions, and hashes if the records have them."""
    prompts = {_plain(item.captions[0]): item.captions[0] for item in items if item.captions}
    has_hashes = bool(files) and isinstance(shards.meta(0).get("sha256"), str)
    hashes = {hash_file(path): path.name for path in files} if has_hashes else {}
    if not prompts and not hashes:
        return
    records = choose(len(shards), MAX_READ).tolist()
    for record in tqdm(records, desc="contamination", unit="record", disable=None, leave=False):
        meta = shards.meta(record)
        found.same_captions |= {prompts[c] for c in _captions(meta) & prompts.keys()}
        if meta.get("sha256") in hashes:
            key = shards.keys(np.array([record]))[0]
            found.examples[hashes[meta["sha256"]]] = key


def _name(item: Item) -> str:
    """Returns the name under which an image counts once, as a prompt's and as the reference's."""
    return item.key.rpartition("/")[2]


def _captions(meta: Mapping[str, Any]) -> set[str]:
    captions = meta.get("captions")
    return {_plain(text) for text in captions if isinstance(text, str)} if captions else set()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
