"""What a source gives for each image: the type that all sources share, and how its parts are made.

A source never drops an image. What it can tell to be of no use is a record with a `problem`, and
one without captions is a record all the same, so that stage one can account for each. Text is kept
as it came, but for half surrogate pairs, which no UTF-8 can hold.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from latent_t2i.pipeline.sources.locators import ImageLocator, clean
from latent_t2i.shards.schema import KEY_PATTERN

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Where captions are looked for, in this order, when no column is named."""
MOST_KEY_CHARACTERS = 80
HASH_DIGITS = 12
NOT_JSON = (TypeError, ValueError, RecursionError)
OUR_FIELDS = ("captions", "truncated", "source_size_px", "crop_px")


@dataclass(frozen=True, kw_only=True)
class Record:
    """An image that is yet to be read, with its captions."""

    key: str
    """Letters, digits, `-` and `_`; where two records have one, the second is left out later."""
    locator: ImageLocator
    """Where the image's bytes are."""
    captions: tuple[str, ...]
    """Without blank ones; there may be none."""
    extra: Mapping[str, Any]
    """JSON that goes into the shard with the captions."""
    problem: str | None = None
    """Why the image cannot be used, if the source knows it already."""


class Measured(Protocol):
    """What `make_meta` asks of a picture."""

    @property
    def source_size_px(self) -> tuple[int, int]:
        """Width and height before anything was cut, the right way up."""

    @property
    def crop_px(self) -> tuple[float, float, float, float]:
        """What was kept of it: left, top, right, bottom in the source's pixels."""


def make_meta(record: Record, *, truncated: Sequence[int], picture: Measured) -> dict[str, Any]:
    """Returns a record's JSON in the shard; what the source tells comes last."""
    return {
        "captions": list(record.captions),
        "truncated": list(truncated),
        "source_size_px": list(picture.source_size_px),
        "crop_px": [round(side) for side in picture.crop_px],
        **record.extra,
    }


def make_key(name: str) -> str:
    """Returns a name as a key: unchanged if it can be one, else readable and with a hash of it."""
    if KEY_PATTERN.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")
    return f"{readable[: MOST_KEY_CHARACTERS - HASH_DIGITS - 1]}-{digest}".lstrip("-")


def read_captions(value: object) -> tuple[tuple[str, ...], str | None]:
    """Returns the captions of a field, a text or a list of texts, or what is wrong with it."""
    captions = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(text, str | None):
            return (), f"caption is not text but {type(text).__name__}"
        if text is not None and text.strip():
            captions.append(clean(text))
    return tuple(captions), None


def make_extra(values: Mapping[str, Any], file_name: str) -> dict[str, Any]:
    """Returns what can be JSON of `values`, with the file's name.

    A field that stage one writes itself, such as `captions`, is kept as `source_captions`.
    """
    named = {f"source_{name}" if name in OUR_FIELDS else name: v for name, v in values.items()}
    try:
        kept = clean_json(named)
    except NOT_JSON:
        kept = {clean(name): clean_json(value) for name, value in named.items() if _is_json(value)}
    return kept | {"file_name": clean(file_name)}


def clean_json(value: Any) -> Any:
    """Returns a copy that any UTF-8 can hold. Raises TypeError or ValueError if it is not JSON."""
    return json.loads(clean(json.dumps(value, ensure_ascii=False, allow_nan=False)))


def find_column(columns: Iterable[str], wanted: str | None, where: str) -> str:
    """Returns the column with the captions. Raises ValueError if there is none."""
    columns = list(columns)
    names = CAPTION_COLUMNS if wanted is None else (wanted,)
    for name in names:
        if name in columns:
            return name
    raise ValueError(
        f"--source.caption-column: {where} has no {' or '.join(map(repr, names))}, "
        f"only {', '.join(map(repr, columns))}"
    )


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except NOT_JSON:
        return False
    return True
