"""The record that all sources yield for an image, and functions that make its parts.

A source never drops an image. An unusable image becomes a record with a `problem`, and one without
captions a record without captions, so that stage one can count each.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from latent_t2i.pipeline.images import Picture
from latent_t2i.pipeline.sources.locators import ImageLocator, printable, replace_surrogates
from latent_t2i.shards.schema import KEY_PATTERN

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Columns to search for captions, in this order, if none is named."""
MAX_KEY_CHARACTERS = 80
MAX_NAME_BYTES = 255
HASH_DIGITS = 12
NOT_JSON = (TypeError, ValueError, RecursionError)
RESERVED_FIELDS = ("image_sha256", "captions", "truncated", "source_size_px", "crop_px")


class SourceError(ValueError):
    """A file of the source is missing, broken or of another kind; the message names it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True, kw_only=True)
class Record:
    """An image that is not read yet, with its captions."""

    key: str
    """Letters, digits, `-` and `_`. Of two records with one key the second is quarantined."""
    locator: ImageLocator
    """Where the image's bytes are."""
    captions: tuple[str, ...]
    """Captions that are not blank; may be empty."""
    extra: Mapping[str, Any]
    """Further JSON fields of the record in the shard."""
    problem: str | None = None
    """Why the record cannot be used, if the source found a reason."""


def make_meta(record: Record, *, truncated: Sequence[int], picture: Picture) -> dict[str, Any]:
    """Returns a record's JSON in the shard."""
    return {
        "image_sha256": picture.sha256,  # first, so that it has the same place in every record
        "captions": list(record.captions),
        "truncated": list(truncated),
        "source_size_px": list(picture.source_size_px),
        "crop_px": [round(side) for side in picture.crops_px[0]],
        **record.extra,
    }


def make_key(name: str) -> str:
    """Returns the name if it is a valid key, else its valid characters with a hash of it."""
    if KEY_PATTERN.fullmatch(name):
        return name
    # The hash keeps names apart that have the same readable part.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")
    return f"{readable[: MAX_KEY_CHARACTERS - HASH_DIGITS - 1]}-{digest}".lstrip("-")


def parse_captions(value: object) -> tuple[tuple[str, ...], str | None]:
    """Returns the captions in a text or a list of texts, and why there are none if it is neither.

    Null and blank text are no captions.
    """
    captions = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(text, str | None):
            return (), f"caption is not text but {type(text).__name__}"
        if text is not None and text.strip():
            captions.append(replace_surrogates(text))
    return tuple(captions), None


def in_split(key: str, split: str, val_fraction: float) -> bool:
    """Returns whether a record belongs to the split train or val.

    A hash of the key decides, so that a record stays in its split when others are added.
    """
    digest = hashlib.sha256(f"val {key}".encode()).digest()
    is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
    return is_val == (split == "val")


def problem_of_name(file_name: str) -> str | None:
    """Returns why a file name must not be opened, or None if it is a path below the folder."""
    path = PurePosixPath(file_name)
    if path.is_absolute() or ".." in path.parts:
        return "file name points outside the folder"
    if any(len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES for part in path.parts):
        return f"file name of more than {MAX_NAME_BYTES} bytes"
    return "file name has a NUL byte" if "\0" in file_name else None


def extra_fields(values: Mapping[str, Any], file_name: str) -> dict[str, Any]:
    """Returns the values that JSON can hold, with the image's file name.

    Fields that stage one writes itself, such as `captions`, are stored as `source_captions`.
    """
    named = {f"source_{k}" if k in RESERVED_FIELDS else k: v for k, v in values.items()}
    try:
        fields = to_json(named)
    except NOT_JSON:  # at least one field is not JSON: test them one by one
        fields = {replace_surrogates(k): to_json(v) for k, v in named.items() if _is_json(v)}
    return fields | {"file_name": replace_surrogates(file_name)}


def to_json(value: Any) -> Any:
    """Returns a copy that UTF-8 can encode. Raises TypeError or ValueError if it is not JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.loads(replace_surrogates(text))


def find_caption_column(columns: Iterable[str], wanted: str | None, file: str) -> str:
    """Returns the name of the caption column. Raises SourceError if there is none."""
    columns = list(columns)
    names = CAPTION_COLUMNS if wanted is None else (wanted,)
    for name in names:
        if name in columns:
            return name
    raise SourceError(
        f"--source.caption-column: {file} has no column {' or '.join(map(repr, names))}, "
        f"only {', '.join(map(repr, columns))}"
    )


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except NOT_JSON:
        return False
    return True
