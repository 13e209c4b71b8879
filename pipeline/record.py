"""What a source gives for each image: the type that all sources share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """An image that is yet to be read, with its captions."""

    key: str
    """Unique in the source; letters, digits, `-` and `_`."""
    path: Path
    captions: tuple[str, ...]
    extra: Mapping[str, Any]
    """JSON that goes into the shard with the captions."""


def make_meta(
    record: Record, *, truncated: Sequence[int], source_size_px: tuple[int, int]
) -> dict[str, Any]:
    """Returns a record's JSON in the shard; sizes are (width, height), the right way up."""
    return {
        "captions": list(record.captions),
        "truncated": list(truncated),
        "source_size_px": list(source_size_px),
        **record.extra,
    }
