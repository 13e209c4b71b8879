"""Opens a set of shards and gathers batches from memory-mapped files, without parsing tars.

    shards = open_shards("shards/data/demo/train")
    batch = shards.gather(records, caption_u, view_u)

The byte offset of any caption is computed, not looked up, so a batch is one indexed copy per field,
straight into the caller's buffer, and reads only the chosen caption and view. The cost: the shards
must be on a local disk; remote/cache.py downloads them there.
"""

import math
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.checks import BackgroundVerifier, check_hash, check_size
from latent_t2i.shards.mapping import Region
from latent_t2i.shards.order import Order
from latent_t2i.shards.parsing import load_json, show
from latent_t2i.shards.schema import (
    BLOCK_BYTES,
    KEY_PATTERN,
    FileEntry,
    FormatError,
    Layout,
    Manifest,
    ShardEntry,
    member_of,
    npy_header,
)
from latent_t2i.shards.settings import Verify

NAME_BYTES = 100
"""Size of a tar header's first field, the name of the member."""
HASH_START, HASH_CHARACTERS = b'{"image_sha256":"', 64
"""How the JSON of a record with the hash of its image begins, and the length of the hash."""
TORCH_DTYPES = {"float16": torch.float16, "int8": torch.int8, "int32": torch.int32}
CARRIERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""Bytes are copied as the widest integers that divide them, because torch copies those fastest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RawBatch:
    """One view and one caption of each record; the trainer's batch adds fields of its own."""

    latent: Tensor  # (B, 2C, h, w) moments or (B, C, h, w), float16
    text: Tensor  # (B, T, D) float16, or int8 in units of the set's text_scale
    tokens: Tensor  # (B, T) int32

    def __len__(self) -> int:
        return len(self.latent)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Returns the batch with `change` applied to each tensor."""
        return type(self)(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> Self:
        """Returns the batch on a device; copies from pinned memory do not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> list[Self]:
        """Returns the batch in pieces of `size` records, the last one possibly smaller."""
        return [self.map(itemgetter(slice(i, i + size))) for i in range(0, len(self), size)]


BatchT = TypeVar("BatchT", bound=RawBatch)


def open_shards(
    path: str | Path,
    *,
    vae_sha256: str | None = None,
    text_sha256: str | None = None,
    verify: Verify = "lazy",
) -> "ShardSet":
    """Opens a finished set of shards: reads the manifest and the shard table, but no shard.

    `vae_sha256` and `text_sha256` are the hashes of the encoders that the caller will use.

    The size of a shard is compared when it is first mapped, and with `verify` full all files are
    hashed here. Raises FormatError for an unfinished set, another schema version, a wrong hash, a
    missing file, or the output of other encoders.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    require_encoders(folder, manifest, vae_sha256=vae_sha256, text_sha256=text_sha256)
    for entry in manifest.files if verify == "full" else manifest.small_files:
        check_size(folder, entry)
        if verify == "full":
            check_hash(folder, entry)
    return ShardSet(folder, manifest, is_lazy=verify == "lazy")


class ShardSet:
    """The records of a set, numbered from 0 in the order of the manifest."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, is_lazy: bool = False, remedy: str = ""
    ) -> None:
        if sys.byteorder != "little":
            raise FormatError(f"{folder}: shards need a little-endian machine, this one is not")
        self.folder = folder
        self.manifest = manifest
        small = {
            name: torch.from_numpy(load_array(folder, *expected))
            for name, expected in small_arrays(manifest).items()
        }
        self.empty_text = small["empty_text"]  # (T, D) float16
        self.empty_tokens = small["empty_tokens"]  # (T,) int32
        self.text_scale = small.get("text_scale")  # (D,) float32 for int8 text, else None
        self._starts = np.concatenate([[0], np.cumsum(manifest.shards.records)])
        self._region = Region(manifest.shards.bytes)
        self._layout = manifest.shards.layouts
        self._record_bytes = np.array([layout.record_bytes for layout in manifest.layouts])
        self._rows = {name: _Rows(name, manifest, self._region) for name in ITEM_FIELDS}
        self._verifier = BackgroundVerifier(folder, remedy) if is_lazy else None

    def __len__(self) -> int:
        return self.manifest.num_records

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which contains the hashes of all files."""
        return self.manifest.sha256

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one view of a stored latent; a bucketed set has one per bucket."""
        return (self.manifest.latent_shape,)

    def order(self, *, batch_size: int, seed: int, **settings: Any) -> Order:
        """Returns an order to visit the records in; `settings` are those of Order."""
        sizes = tuple(self.manifest.shards.records.tolist())
        return Order(sizes=sizes, batch_size=batch_size, seed=seed, **settings)

    def buffer(self, size: int, *, pin_memory: bool = False) -> RawBatch:
        """Returns an uninitialised batch of `size` records, to gather into."""
        shapes = {name: (size, *rows.shape) for name, rows in self._rows.items()}
        return RawBatch(
            **{
                name: torch.empty(shapes[name], dtype=rows.dtype, pin_memory=pin_memory)
                for name, rows in self._rows.items()
            }
        )

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
    ) -> RawBatch:
        """Returns a batch of the records (B,), given by number, in `out` if given.

        `caption_u` and `view_u` (B,) in [0, 1) choose a caption and a view of each record.
        """
        shard, first = self._locate(records)
        layout = self._layout[shard]
        out = self.buffer(len(first)) if out is None else out
        for name, rows in self._rows.items():
            # Text and tokens share a draw, so they belong to the same caption.
            item = _choose(view_u if name == "latent" else caption_u, rows.num_items[layout])
            rows.gather(first + rows.offsets[layout] + item * rows.item_bytes, getattr(out, name))
        return out

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Returns the keys of some records, in that order."""
        _, first = self._locate(records)
        names = self._region.bytes[first[:, None] + np.arange(NAME_BYTES)]
        return [key_of(name.tobytes()) for name in names]

    def image_hashes(self, records: NDArray[np.int64]) -> NDArray[np.bytes_] | None:
        """Returns the sha256 of the records' image files, in hex (B,); None if a record has none.

        The hash has the same place in each JSON, so none is parsed.
        """
        _, first = self._locate(records)
        first = first + self.manifest.layouts[0].fields["json"].offset_bytes  # of each layout
        size = len(HASH_START) + HASH_CHARACTERS
        heads = self._region.bytes[first[:, None] + np.arange(size)]
        if (heads[:, : len(HASH_START)] != np.frombuffer(HASH_START, np.uint8)).any():
            return None
        return np.ascontiguousarray(heads[:, len(HASH_START) :]).view(f"S{HASH_CHARACTERS}")[:, 0]

    def meta(self, record: int) -> dict[str, Any]:
        """Returns the JSON of a record: `captions`, `truncated` and the source's own keys."""
        (shard,), (first,) = self._locate(np.array([record]))
        part = self.manifest.layouts[self._layout[shard]].fields["json"]
        content = self._region.bytes[first + part.offset_bytes :][: part.num_bytes].tobytes()
        place = f"{self.folder / self.manifest.shards[shard].name}: key "
        place += f"{self.keys(np.array([record]))[0]!r}: field json"
        document = load_json(content, place)
        if not isinstance(document, dict):
            raise FormatError(f"{place}: expected a JSON object, found {show(document)}")
        return document

    def shards_of(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the index of the shard of each record."""
        return np.searchsorted(self._starts, records, side="right") - 1

    def finish_verification(self) -> None:
        """Waits until all shards used so far are hashed. Raises FormatError for a mismatch."""
        if self._verifier is not None:
            self._verifier.finish()

    def _locate(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Maps the shards of some records; returns shard (B,) and offset in the region (B,)."""
        records = np.asarray(records, np.int64)
        if records.size and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"{self.folder}: expected records in 0..{len(self) - 1}")
        if self._verifier is not None:
            self._verifier.check()
        shard = self.shards_of(records)
        for absent in np.unique(shard[~self._region.is_mapped[shard]]):
            self._map(int(absent))
        within = (records - self._starts[shard]) * self._record_bytes[self._layout[shard]]
        return shard, self._region.starts[shard] + within

    def _map(self, shard: int) -> None:
        """Maps a shard and checks its first and last record."""
        entry = self.manifest.shards[shard]
        layout, path = self.manifest.layouts[entry.layout], self.folder / entry.name
        check_size(self.folder, entry)  # the set may have been opened long ago
        self._region.map(shard, path)
        try:
            start = int(self._region.starts[shard])
            for record in (0, entry.records - 1):
                place = start + record * layout.record_bytes
                check_record(path, self._region.bytes[place:][: layout.record_bytes], layout)
        except FormatError:
            self._region.unmap(shard)
            raise
        if self._verifier is not None and not self._is_hashed(shard):
            self._verifier.add(entry)

    def _is_hashed(self, shard: int) -> bool:
        return False


ITEM_FIELDS = tuple(part.name for part in fields(RawBatch))


class _Rows:
    """One field of a whole set, as rows of a matrix: a row per item (view or caption)."""

    def __init__(self, name: str, manifest: Manifest, region: Region) -> None:
        parts = [layout.fields[name] for layout in manifest.layouts]
        self.shape = parts[0].shape[1:]
        self.dtype = TORCH_DTYPES[parts[0].dtype]
        self.offsets = np.array([part.offset_bytes for part in parts])
        self.num_items = np.array([part.shape[0] for part in parts])
        self.item_bytes = parts[0].num_bytes // parts[0].shape[0]
        steps = [layout.record_bytes for layout in manifest.layouts]
        # All items start at multiples of `_unit`. A row starts at each multiple, so rows overlap.
        self._unit = math.gcd(mmap.PAGESIZE, self.item_bytes, *steps, *self.offsets.tolist())
        width = math.gcd(8, self._unit)
        self._carrier = CARRIERS[width]
        self._matrix = (
            torch.from_numpy(region.bytes)
            .view(self._carrier)
            .as_strided(
                ((len(region.bytes) - self.item_bytes) // self._unit + 1, self.item_bytes // width),
                (self._unit // width, 1),
            )
        )

    def gather(self, places: NDArray[np.int64], out: Tensor) -> None:
        """Copies the items at some offsets (B,) in the region to `out` (B, ...)."""
        target = out.view(len(out), -1).view(self._carrier) if len(out) else out
        if len(out):
            torch.index_select(self._matrix, 0, torch.from_numpy(places // self._unit), out=target)


def map_shard(path: Path, entry: ShardEntry, layout: Layout) -> dict[str, NDArray[Any]]:
    """Maps one shard; returns its fields (records, ...) by name.

    Raises FormatError if its size is wrong, or the first or last record does not match the layout.
    """
    check_size(path.parent, entry)
    region = Region([entry.bytes])
    region.map(0, path)

    records = region.bytes[: entry.records * layout.record_bytes].reshape(entry.records, -1)
    for record in (0, -1):
        check_record(path, records[record], layout)
    return {
        name: np.ndarray(
            (entry.records, *part.shape),
            np.dtype(part.dtype).newbyteorder("<"),
            region.bytes.data,
            part.offset_bytes,
            (layout.record_bytes, *np.empty(part.shape, part.dtype).strides),
        )
        for name, part in layout.fields.items()
    }


def check_record(path: str | Path, record: NDArray[np.uint8], layout: Layout) -> str:
    """Checks the tar and .npy headers of a record against the layout; returns its key."""
    key = key_of(record[:NAME_BYTES].tobytes())
    if not KEY_PATTERN.fullmatch(key):
        raise FormatError(f"{path}: key {key!r}: expected a key of the form {KEY_PATTERN.pattern}")
    for name, part in layout.fields.items():
        start = part.offset_bytes - part.header_bytes
        member = _text(record[start - BLOCK_BYTES :][:NAME_BYTES].tobytes())
        if member != f"{key}.{member_of(name)}":
            raise FormatError(
                f"{path}: key {key!r}: field {name}: expected member "
                f"{key + '.' + member_of(name)!r} at byte {start - BLOCK_BYTES}, found {member!r}: "
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
    """Returns the key from the name field of a tar header."""
    return _text(name).partition(".")[0]


def small_arrays(manifest: Manifest) -> dict[str, tuple[FileEntry, str, tuple[int, ...]]]:
    """Returns file, dtype and shape of each array beside the shards, by manifest key."""
    tokens, width = manifest.max_tokens, manifest.text_width
    arrays: dict[str, tuple[FileEntry, str, tuple[int, ...]]] = {
        "empty_text": (manifest.empty_text, "float16", (tokens, width)),
        "empty_tokens": (manifest.empty_tokens, "int32", (tokens,)),
    }
    if manifest.text_scale:
        arrays["text_scale"] = (manifest.text_scale.file, "float32", (width,))
    for spec in manifest.fields:
        if spec.scale:
            arrays[f"{spec.name}_scale"] = (spec.scale, "float32", spec.shape[-1:])
    return arrays


def load_array(folder: Path, entry: FileEntry, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Reads an .npy file. Raises FormatError for another size, dtype or shape."""
    path = folder / entry.name
    expected = npy_header(dtype, shape)
    size = len(expected) + math.prod(shape) * np.dtype(dtype).itemsize
    if entry.bytes != size:
        raise FormatError(f"{path}: expected {size} bytes for {dtype} {shape}, found {entry.bytes}")
    check_size(folder, entry)
    content = path.read_bytes()
    found = content[: len(expected)]
    if found != expected:
        raise FormatError(f"{path}: expected array header {expected!r}, found {found!r}")
    array = np.frombuffer(content, np.dtype(dtype).newbyteorder("<"), offset=len(expected))
    return array.reshape(shape).copy()


def require_encoders(
    location: str | Path, manifest: Manifest, *, vae_sha256: str | None, text_sha256: str | None
) -> None:
    """Raises FormatError if a set was made with other encoders than those given."""
    pairs = (
        ("vae", manifest.vae, vae_sha256),
        ("text_encoder", manifest.text_encoder, text_sha256),
    )
    for part, found, expected in pairs:
        if expected is not None and expected != found.sha256:
            raise FormatError(
                f"{location}: {part}: the shards were made with {found}, this run uses one with "
                f"sha256 {expected}: use the same weights, or encode the shards again"
            )


def _choose(draw: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    # The minimum guards against a caller's draw of exactly 1.
    return np.minimum((np.asarray(draw) * count).astype(np.int64), count - 1)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")
