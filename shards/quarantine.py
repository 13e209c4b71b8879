"""The list of images that were not written: one JSON object a line, in a file of its own.

    {"key": "000000000139", "reason": "truncated file", "shard": 3}

`shard` is the number of the planned shard, or null for an image that was in none. The list is read
only when it is needed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from latent_t2i.shards.layout import FileEntry
from latent_t2i.shards.parsing import FormatError, from_json, load_json

QUARANTINE_NAME = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """An image that was not written."""

    key: str
    reason: str
    shard: int | None
    """Number of the shard that it was planned for."""

    def line(self) -> bytes:
        """Returns the image's line in the file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode() + b"\n"


def read_quarantine(path: Path, entry: FileEntry) -> Iterator[Quarantined]:
    """Yields the images of a list, in the order of the file.

    Raises FormatError if the file is missing or malformed and, after the last line, if its hash
    differs from the manifest's.
    """
    if not path.is_file():
        raise FormatError(f"{path}: missing, expected a file of {entry.bytes} bytes")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            place = f"{path}: line {number}"
            yield from_json(Quarantined, load_json(line, place), place)
    if digest.hexdigest() != entry.sha256:
        raise FormatError(
            f"{path}: sha256: expected {entry.sha256}, found {digest.hexdigest()}: the file "
            "changed after it was written"
        )


def read_reasons(path: Path, entry: FileEntry) -> dict[str, str]:
    """Returns the reason for each image of a list, by key. Raises like `read_quarantine`."""
    return {image.key: image.reason for image in read_quarantine(path, entry)}
