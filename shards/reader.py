"""Opens a set of shards and gathers batches from files of equal records, without parsing tars.

    shards = open_shards("shards/data/demo/train")
    batch = shards.gather(records, caption_u, view_u)

The byte offset of any caption is computed, not looked up, so a batch of mapped shards is one
indexed copy per field, straight into the caller's buffer, and reads only the chosen caption and
view. Shards on a network file system are read instead of mapped (pread.py). The cost: the shards
must be files of the local system; remote/cache.py downloads them there.
"""

import math
import mmap
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.checks import BackgroundVerifier, check_hash, check_size
from latent_t2i.shards.filesystems import choose_read
from latent_t2i.shards.mapping import Region
from latent_t2i.shards.order import Cursor, Order
from latent_t2i.shards.parsing import load_json, show
from latent_t2i.shards.pread import FileReader
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
from latent_t2i.shards.settings import ReadMode, Verify
from latent_t2i.shards.source import Part, Source

NAME_BYTES = 100
"""Size of a tar header's first field, the name of the member."""
HASH_START, HASH_CHARACTERS = b'{"image_sha256":"', 64
"""How the JSON of a record with the hash of its image begins, and the length of the hash."""
FIELDS = ("latent", "text")
"""The fields that training uses."""
TORCH_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RawBatch:
    """One view and one caption of each record; the trainer's batch adds fields of its own.

    A `latent` or `text` that was not requested has the shape (B, 0).
    """

    latent: Tensor  # (B, 2C, h, w) moments or (B, C, h, w), float16
    text: Tensor  # (B, T, D) float16, or int8 in units of the set's text_scale
    extra: dict[str, Tensor] = field(default_factory=dict)  # (B, ...)
    """The other requested fields; int8 ones in units of the set's `field_scales`."""

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def gathered(self) -> dict[str, Tensor]:
        """The tensors that come from the shards, by field."""
        return {"latent": self.latent, "text": self.text, **self.extra}

    def with_gathered(self, tensors: Mapping[str, Tensor]) -> Self:
        """Returns the batch with other tensors for all fields of the shards."""
        extra = {name: tensors[name] for name in self.extra}
        return replace(self, latent=tensors["latent"], text=tensors["text"], extra=extra)

    def tensors(self) -> list[Tensor]:
        """Returns all tensors of the batch, in a fixed order."""
        names = [part.name for part in fields(self) if part.name != "extra"]
        return [*(getattr(self, name) for name in names), *self.extra.values()]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Returns the batch with `change` applied to each tensor."""
        names = [part.name for part in fields(self) if part.name != "extra"]
        changed = {name: change(getattr(self, name)) for name in names}
        extra = {name: change(tensor) for name, tensor in self.extra.items()}
        return type(self)(**changed, extra=extra)

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
    fields: Sequence[str] = FIELDS,
    vae_sha256: str | None = None,
    text_sha256: str | None = None,
    verify: Verify = "lazy",
    read: ReadMode = "auto",
) -> "ShardSet":
    """Opens a finished set of shards: reads the manifest and the shard table, but no shard.

    `fields` are those that batches contain. `vae_sha256` and `text_sha256` are the hashes of the
    encoders that the caller will use. A shard is checked when it is first used.

    The size of a shard is compared when it is first used, and with `verify` full all files are
    hashed here. Raises FormatError for an unfinished set, another schema version, a wrong hash, a
    missing file, an unknown field, or the output of other encoders.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    require_encoders(folder, manifest, vae_sha256=vae_sha256, text_sha256=text_sha256)
    for entry in manifest.files if verify == "full" else manifest.small_files:
        check_size(folder, entry)
        if verify == "full":
            check_hash(folder, entry)
    return ShardSet(
        folder, manifest, fields=fields, is_lazy=verify == "lazy", read=choose_read(read, folder)
    )


class ShardSet:
    """The records of a set, numbered from 0 in the order of the manifest.

    Several threads may use it; they take turns.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        fields: Sequence[str] = FIELDS,
        is_lazy: bool = False,
        remedy: str = "",
        read: Literal["map", "pread"] = "map",
        num_slots: int | None = None,
    ) -> None:
        """Raises FormatError for an unknown field, or for a wrong array beside the shards.

        `num_slots` bounds how many shards are open at a time; None: what the system allows.
        """
        if sys.byteorder != "little":
            raise FormatError(f"{folder}: shards need a little-endian machine, this one is not")
        self.folder = folder
        self.manifest = manifest
        self.read = read
        small = {
            name: torch.from_numpy(load_array(folder, *expected))
            for name, expected in small_arrays(manifest).items()
        }
        self.empty_text = small["empty_text"]  # (T, D) float16
        self.empty_tokens = small["empty_tokens"]  # (T,) int32
        self.text_scale = small.get("text_scale")  # (D,) float32 for int8 text, else None
        self.field_scales = {  # (last axis,) float32, for further fields that have one
            spec.name: small[f"{spec.name}_scale"] for spec in manifest.fields if spec.scale
        }
        self._starts = np.concatenate([[0], np.cumsum(manifest.shards.records)])
        self._layout = manifest.shards.layouts
        self._record_bytes = np.array([layout.record_bytes for layout in manifest.layouts])
        self.items = {name: make_items(str(folder), name, manifest) for name in fields}
        num_shards, largest = len(manifest.shards), int(manifest.shards.bytes.max())
        self._source: Source = (
            Region(num_shards, largest, num_slots)
            if read == "map"
            else FileReader(num_shards, num_slots)
        )
        self._lock = threading.Lock()  # held while a piece of a batch is read from its slots
        self._is_checked = np.zeros(num_shards, np.bool_)
        self._is_verified = np.zeros(num_shards, np.bool_)  # or in the queue for it
        self._verifier = BackgroundVerifier(folder, remedy) if is_lazy else None

    def __len__(self) -> int:
        return self.manifest.num_records

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which contains the hashes of all files."""
        return self.manifest.sha256

    @property
    def sets(self) -> "tuple[ShardSet, ...]":
        """This set; a bucketed set and a union have several."""
        return (self,)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Number of records of each shard (num_shards,)."""
        return self.manifest.shards.records

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of an item of each field of a batch."""
        return dict.fromkeys(FIELDS, (0,)) | {
            name: items.shape for name, items in self.items.items()
        }

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one view of a stored latent; a bucketed set has one per bucket."""
        return (self.manifest.latent_shape,)

    def order(self, *, batch_size: int, seed: int, **settings: Any) -> Order:
        """Returns an order to visit the records in; `settings` are those of Order."""
        return Order(sizes=self.shard_sizes, batch_size=batch_size, seed=seed, **settings)

    def buffer(self, size: int, *, pin_memory: bool = False) -> RawBatch:
        """Returns an uninitialised batch of `size` records, to gather into."""
        tensors = {}
        for name, shape in self.shapes.items():
            dtype = self.items[name].dtype if name in self.items else torch.float16
            tensors[name] = torch.empty((size, *shape), dtype=dtype, pin_memory=pin_memory)
        return RawBatch(latent=tensors.pop("latent"), text=tensors.pop("text"), extra=tensors)

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> RawBatch:
        """Returns a batch of the records (B,), given by number, in `out` if given.

        `caption_u` and `view_u` (B,) in [0, 1) choose a caption and a view of each record. With
        `rows` (B,), the records go to these rows of `out`.
        """
        shards, first = self._locate(records)
        layouts = self._layout[shards]
        out = self.buffer(len(first)) if out is None else out
        tensors = out.gathered
        parts = []
        for name, items in self.items.items():
            offsets = first + items.offsets[layouts]
            if items.per != "record":
                # Fields per caption share a draw, so they belong to the same caption.
                u = view_u if items.per == "view" else caption_u
                offsets += _choose(u, items.num_items[layouts]) * items.item_bytes
            parts.append(Part(offsets, items.item_bytes, items.unit, tensors[name], rows))
        self._gather(shards, parts)
        return out

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Returns the keys of some records, in that order."""
        shards, first = self._locate(records)
        names = torch.empty((len(first), NAME_BYTES), dtype=torch.uint8)
        self._gather(shards, [Part(first, NAME_BYTES, BLOCK_BYTES, names)])
        return [key_of(name.tobytes()) for name in names.numpy()]

    def image_hashes(self, records: NDArray[np.int64]) -> NDArray[np.bytes_] | None:
        """Returns the sha256 of the records' image files, in hex (B,); None if a record has none.

        The hash has the same place in each JSON, so none is parsed.
        """
        shards, first = self._locate(records)
        first = first + self.manifest.layouts[0].fields["json"].offset_bytes  # of each layout
        size = len(HASH_START) + HASH_CHARACTERS
        found = torch.empty((len(first), size), dtype=torch.uint8)
        self._gather(shards, [Part(first, size, BLOCK_BYTES, found)])
        heads = found.numpy()
        if (heads[:, : len(HASH_START)] != np.frombuffer(HASH_START, np.uint8)).any():
            return None
        return np.ascontiguousarray(heads[:, len(HASH_START) :]).view(f"S{HASH_CHARACTERS}")[:, 0]

    def meta(self, record: int) -> dict[str, Any]:
        """Returns the JSON of a record: `captions`, `truncated` and the source's own keys."""
        shards, (first,) = self._locate(np.array([record]))
        shard = int(shards[0])
        part = self.manifest.layouts[self._layout[shard]].fields["json"]
        with self._lock:
            self._open(shards)
            content = self._source.read(shard, int(first) + part.offset_bytes, part.num_bytes)
            key = key_of(self._source.read(shard, int(first), NAME_BYTES))
        place = f"{self.folder / self.manifest.shards[shard].name}: key {key!r}: field json"
        document = load_json(content, place)
        if not isinstance(document, dict):
            raise FormatError(f"{place}: expected a JSON object, found {show(document)}")
        return document

    def shards_of(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the index of the shard of each record."""
        return np.searchsorted(self._starts, records, side="right") - 1

    def advance(self, order: Order, cursor: Cursor, shards: slice = slice(None)) -> None:
        """Announces the upcoming order and cursor; only sets that download shards use them."""

    def finish_verification(self) -> None:
        """Waits until all shards used so far are hashed. Raises FormatError for a mismatch."""
        if self._verifier is not None:
            self._verifier.finish()

    def _locate(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the shard (B,) of some records, and their first bytes in it (B,)."""
        records = np.asarray(records, np.int64)
        if records.size and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"{self.folder}: expected records in 0..{len(self) - 1}")
        if self._verifier is not None:
            self._verifier.check()
        shards = self.shards_of(records)
        return shards, (records - self._starts[shards]) * self._record_bytes[self._layout[shards]]

    def _gather(self, shards: NDArray[np.int64], parts: Sequence[Part]) -> None:
        """Copies an item per part from each of some shards (B,)."""
        for piece in self._source.slots.pieces(shards):
            with self._lock:
                self._open(shards[piece])
                self._source.gather(shards[piece], [part.piece(piece) for part in parts])

    def _open(self, shards: NDArray[np.int64]) -> None:
        """Opens those of some shards that are not in slots. Use it with the lock held."""
        is_missing = self._source.slots.touch(shards) < 0
        if is_missing.any():
            missing = np.unique(shards[is_missing]).tolist()
            self._source.for_each(self._open_one, missing)
            self._verify(missing)

    def _open_one(self, shard: int, *, replace: bool = True) -> None:
        """Opens a shard; if it is opened for the first time, checks its first and last record.

        Without `replace`, nothing happens if all slots are taken.
        """
        entry = self.manifest.shards[shard]
        path = self.folder / entry.name
        check_size(self.folder, entry)  # each time: a mapping beyond the end is fatal
        self._source.open(shard, path, replace=replace)
        if self._is_checked[shard] or self._source.slots.of[shard] < 0:
            return
        layout = self.manifest.layouts[entry.layout]
        try:
            for record in (0, entry.records - 1):
                start = record * layout.record_bytes
                check_record(path, partial(self._read_in, shard, start), layout)
        except FormatError:
            self._source.close(shard)
            raise
        self._is_checked[shard] = True

    def _read_in(self, shard: int, start: int, offset: int, size: int) -> bytes:
        return self._source.read(shard, start + offset, size)

    def _verify(self, shards: Sequence[int]) -> None:
        """Hashes shards in the background, each once."""
        for shard in shards if self._verifier is not None else ():
            if not self._is_verified[shard] and not self._is_hashed(shard):
                self._is_verified[shard] = True
                assert self._verifier
                self._verifier.add(self.manifest.shards[shard])

    def _is_hashed(self, shard: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Items:
    """One field of a set: an item per view, per caption, or per record."""

    per: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: NDArray[np.int64]  # (layouts,) of the first item in a record
    num_items: NDArray[np.int64]  # (layouts,) of a record
    item_bytes: int
    unit: int
    """All items start at multiples of it."""


def make_items(location: str, name: str, manifest: Manifest) -> Items:
    """Returns a field of a set. Raises FormatError if the set has no such array."""
    per = {"latent": "view", "text": "caption", "tokens": "caption"}
    per |= {spec.name: spec.per for spec in manifest.fields}
    if name not in per:
        raise FormatError(f"{location}: fields: expected some of {[*per]}, found {name!r}")
    parts = [layout.fields[name] for layout in manifest.layouts]
    shape = parts[0].shape if per[name] == "record" else parts[0].shape[1:]
    item_bytes = math.prod(shape) * np.dtype(parts[0].dtype).itemsize
    offsets = [part.offset_bytes for part in parts]
    steps = [layout.record_bytes for layout in manifest.layouts]
    return Items(
        per=per[name],
        shape=shape,
        dtype=TORCH_DTYPES[parts[0].dtype],
        offsets=np.array(offsets),
        num_items=np.array([part.num_bytes // item_bytes for part in parts]),
        item_bytes=item_bytes,
        unit=math.gcd(mmap.PAGESIZE, item_bytes, *steps, *offsets),
    )


def map_shard(path: Path, entry: ShardEntry, layout: Layout) -> dict[str, NDArray[Any]]:
    """Maps one shard; returns its fields (records, ...) by name.

    Raises FormatError if its size is wrong, or the first or last record does not match the layout.
    """
    check_size(path.parent, entry)
    region = Region(1, entry.bytes)
    region.open(0, path)
    for record in (0, entry.records - 1):
        content = region.bytes[record * layout.record_bytes :][: layout.record_bytes]
        check_record(path, partial(_bytes_at, content), layout)
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


def check_record(path: str | Path, read: Callable[[int, int], bytes], layout: Layout) -> str:
    """Checks the tar and .npy headers of a record against the layout; returns its key.

    `read(offset, size)` returns some bytes of the record.
    """
    key = key_of(read(0, NAME_BYTES))
    if not KEY_PATTERN.fullmatch(key):
        raise FormatError(f"{path}: key {key!r}: expected a key of the form {KEY_PATTERN.pattern}")
    for name, part in layout.fields.items():
        start = part.offset_bytes - part.header_bytes
        header = read(start - BLOCK_BYTES, BLOCK_BYTES + part.header_bytes)
        member = _text(header[:NAME_BYTES])
        if member != f"{key}.{member_of(name)}":
            raise FormatError(
                f"{path}: key {key!r}: field {name}: expected member "
                f"{key + '.' + member_of(name)!r} at byte {start - BLOCK_BYTES}, found {member!r}: "
                "not a shard of this layout"
            )
        found = header[BLOCK_BYTES:]
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


def _bytes_at(content: NDArray[np.uint8], offset: int, size: int) -> bytes:
    return content[offset : offset + size].tobytes()


def _choose(draw: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    # The minimum guards against a caller's draw of exactly 1.
    return np.minimum((np.asarray(draw) * count).astype(np.int64), count - 1)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")
