"""Opens a set of shards and gathers batches from it: memory-mapped, no tar parsing.

    shards = open_shards("shards/data/demo/train")
    batch = shards.gather(records, caption_u, view_u)

Every record of a shard has the same byte layout, so a field of all its records is one strided
array over the mapped file, and a batch is one gather per field and shard that reads only the chosen
caption and view. Opening looks at the manifest and the files' sizes; a shard is mapped, and its
first and last record held to the layout, on first use. The price: shards lie on a local disk.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.schema import (
    BLOCK_BYTES,
    MEMBERS,
    FileEntry,
    FormatError,
    Identity,
    Layout,
    Manifest,
    ShardEntry,
)

NAME_BYTES = 100
"""The size of a tar header's first field, the member's name."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """A batch: one caption and one view of each record asked for."""

    latent: Tensor  # (B, 2C, h, w) moments or (B, C, h, w), float16
    text: Tensor  # (B, T, D) float16
    tokens: Tensor  # (B, T) int32


def open_shards(
    path: str | Path,
    *,
    vae_sha256: str | None = None,
    text_sha256: str | None = None,
    verify: bool = False,
) -> "ShardSet":
    """Opens a finished set of shards.

    Given hashes are those of the encoders the caller will use; `verify` reads every file and
    compares its sha256, which takes as long as the disk does.

    Raises FormatError (a ValueError) naming what was expected and found: for an unfinished set,
    another schema version, a missing or cut file, a hash that differs, another encoder's output.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    for part, identity, asked in (
        ("vae", manifest.vae, vae_sha256),
        ("text_encoder", manifest.text_encoder, text_sha256),
    ):
        _require_encoder(folder, part, identity, asked)
    for entry in manifest.files:
        check_size(folder, entry)
        if verify:
            check_hash(folder, entry)
    return ShardSet(folder, manifest)


class ShardSet:
    """The records of a set, numbered from 0 in the order of the manifest."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.empty_text = _load_array(folder, manifest.empty_text)  # (T, D) float16
        self.empty_tokens = _load_array(folder, manifest.empty_tokens)  # (T,) int32
        counts = [shard.records for shard in manifest.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._mapped: dict[int, dict[str, NDArray[Any]]] = {}

    def __len__(self) -> int:
        return self.manifest.num_records

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
    ) -> Gathered:
        """Returns a batch of the records' numbers (B,), in that order.

        `caption_u` and `view_u` (B,), in [0, 1), choose a caption and a view of each record.
        """
        size = len(records)
        manifest = self.manifest
        latent = np.empty((size, *manifest.latent_shape), np.float16)
        text = np.empty((size, *self.empty_text.shape), np.float16)
        tokens = np.empty((size, *self.empty_tokens.shape), np.int32)
        view = _choose(view_u, manifest.num_views)
        for shard, places, local in self._split(records):
            fields = self._map(shard)
            caption = _choose(caption_u[places], fields["tokens"].shape[1])
            latent[places] = fields["latent"][local, view[places]]
            text[places] = fields["text"][local, caption]
            tokens[places] = fields["tokens"][local, caption]
        return Gathered(*(torch.from_numpy(array) for array in (latent, text, tokens)))

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Returns the records' keys, in that order."""
        found = [""] * len(records)
        for shard, places, local in self._split(records):
            names = self._map(shard)["record"][local, :NAME_BYTES]
            for place, name in zip(places, names, strict=True):
                found[place] = key_of(name.tobytes())
        return found

    def meta(self, record: int) -> dict[str, Any]:
        """Returns a record's JSON: `captions`, `truncated` and what the source told."""
        ((shard, _, local),) = self._split(np.array([record]))
        document: dict[str, Any] = json.loads(self._map(shard)["json"][local[0]].tobytes())
        return document

    def _split(
        self, records: NDArray[np.int64]
    ) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Sorts records by shard: (shard, places in the batch, numbers within the shard)."""
        records = np.asarray(records, np.int64)
        if not records.size:
            return []
        if not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"{self.folder}: a record outside 0..{len(self) - 1} was asked for")
        shards = np.searchsorted(self._starts, records, side="right") - 1
        order = np.argsort(shards, kind="stable")
        present, firsts = np.unique(shards[order], return_index=True)
        return [
            (int(shard), places, records[places] - self._starts[shard])
            for shard, places in zip(present, np.split(order, firsts[1:]), strict=True)
        ]

    def _map(self, shard: int) -> dict[str, NDArray[Any]]:
        """Returns a shard's fields as arrays over its mapped file, checked on the first call."""
        if shard not in self._mapped:
            entry = self.manifest.shards[shard]
            layout = self.manifest.layouts[entry.layout]
            self._mapped[shard] = map_shard(self.folder / entry.name, entry, layout)
        return self._mapped[shard]


def map_shard(path: Path, entry: ShardEntry, layout: Layout) -> dict[str, NDArray[Any]]:
    """Maps a shard and returns its fields, each (records, ...), and `record`, all bytes of each.

    Raises FormatError where the first or last record is not of the layout.
    """
    # torch maps without holding a file descriptor; a set may have more shards than a process may
    # have files.
    memory = torch.from_file(str(path), shared=False, size=entry.bytes, dtype=torch.uint8).numpy()
    memory.flags.writeable = False

    def view(dtype: str, offset_bytes: int, shape: tuple[int, ...]) -> NDArray[Any]:
        inner = np.empty(shape, dtype).strides
        return np.ndarray(
            (entry.records, *shape),
            np.dtype(dtype).newbyteorder("<"),
            memory.data,
            offset_bytes,
            (layout.record_bytes, *inner),
        )

    whole = view("uint8", 0, (layout.record_bytes,))
    for record in (0, -1):
        check_record(path, whole[record], layout)
    fields = {name: view(f.dtype, f.offset_bytes, f.shape) for name, f in layout.fields.items()}
    return fields | {"record": whole}


def check_record(path: Path, record: NDArray[np.uint8], layout: Layout) -> str:
    """Checks a record's tar headers and array headers against the layout; returns its key."""
    key = key_of(record[:NAME_BYTES].tobytes())
    for name, part in layout.fields.items():
        start = part.offset_bytes - part.header_bytes
        member = _text(record[start - BLOCK_BYTES :][:NAME_BYTES].tobytes())
        if member != f"{key}.{MEMBERS[name]}":
            raise FormatError(
                f"{path}: key {key!r}: field {name}: expected member "
                f"{key + '.' + MEMBERS[name]!r} at byte {start - BLOCK_BYTES}, found {member!r}: "
                "not a shard of this layout"
            )
        found = record[start : part.offset_bytes].tobytes()
        if found != part.header:
            raise FormatError(
                f"{path}: key {key!r}: field {name}: expected array header {part.header!r}, "
                f"found {found!r}"
            )
    return key


def key_of(name: bytes) -> str:
    """Returns the key from the name field of a record's first tar header."""
    return _text(name).removesuffix(f".{MEMBERS['json']}")


def check_size(folder: Path, entry: FileEntry) -> None:
    """Raises FormatError where a file is missing or has another size than the manifest says."""
    path = folder / entry.name
    if not path.is_file():
        raise FormatError(f"{path}: missing, expected a file of {entry.bytes} bytes")
    found = path.stat().st_size
    if found != entry.bytes:
        state = "cut short" if found < entry.bytes else "too long"
        raise FormatError(f"{path}: {state}: expected {entry.bytes} bytes, found {found}")


def check_hash(folder: Path, entry: FileEntry) -> None:
    """Raises FormatError where a file's sha256 differs from the manifest's."""
    with (folder / entry.name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise FormatError(
            f"{folder / entry.name}: sha256: expected {entry.sha256}, found {found}: "
            "the file changed after it was written"
        )


def _require_encoder(folder: Path, part: str, identity: Identity, asked: str | None) -> None:
    if asked is not None and asked != identity.sha256:
        raise FormatError(
            f"{folder}: {part}: the shards were made with {identity}, the run asks for one with "
            f"sha256 {asked}: give it the same weights, or make the shards again"
        )


def _load_array(folder: Path, entry: FileEntry) -> Tensor:
    return torch.from_numpy(np.load(folder / entry.name, allow_pickle=False))


def _choose(draw: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.minimum((np.asarray(draw) * count).astype(np.int64), count - 1)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")
