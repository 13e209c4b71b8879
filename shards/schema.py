"""The types that both stages share, and the manifest of a set of shards.

    FOLDER/manifest.json   empty_text.npy   empty_tokens.npy   shard-000000.tar ...

All records of a shard have the same byte layout, so a shard is a strided array as well as a tar:
item `i` of a field starts at `offset_bytes + i * record_bytes`. The cost: all images of a shard
have the same number of captions, and the JSON is padded. README.md is the specification.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.parsing import FormatError as FormatError
from latent_t2i.shards.parsing import from_json, load_json, printable, read_limited

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
BUCKETS_NAME = "buckets.json"
"""The list of a bucketed set (buckets.py), whose sub-folders hold the manifests."""
BUCKET_PATTERN = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
"""A bucket's name and sub-folder: WIDTHxHEIGHT of its images in pixels."""
FILE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
PROGRESS_DIR = "progress"
"""Holds the provenance and the shard reports while stage one runs; removed at the end."""

BLOCK_BYTES = 512
"""Size of a tar header; the data of each member is padded to a multiple of it."""
TAR_RECORD_BYTES = 10240
"""The size of a tar file is a multiple of this."""

MEMBERS = {"json": "json", "latent": "latent.npy", "text": "text.npy", "tokens": "tokens.npy"}
"""The extension of each field's member, in the order of the bytes."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""Keys are file names in the tar: no dot, where WebDataset cuts, and short enough for ustar."""

LatentKind = Literal["moments", "plain"]
TextDtype = Literal["float16", "int8"]
FieldDtype = Literal["uint8", "float16", "int8", "int32"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One encoded image with its captions: what stage one passes to the shard writer."""

    key: str
    latent: NDArray[np.float16]  # (views, 2C, h, w) moments, or (views, C, h, w)
    text: NDArray[np.float16 | np.int8]  # (captions, T, D)
    tokens: NDArray[np.int32]  # (captions, T)
    meta: Mapping[str, Any]
    """JSON: `captions` (list of text), `truncated` (indices of captions cut to T tokens), and
    further keys of the source."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A network or tokenizer: where it was loaded from, and the hash of its content."""

    name: str
    revision: str | None
    sha256: str

    def __str__(self) -> str:
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.name!r}{revision} (sha256 {self.sha256})"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field's position in a record, its dtype and its shape."""

    offset_bytes: int
    """From the start of the record to the first data byte."""
    header_bytes: int
    """Size of the .npy header, between the tar header and the data; 0 for the JSON."""
    dtype: FieldDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data, without padding."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> bytes:
        """The .npy header; empty for the JSON."""
        return npy_header(self.dtype, self.shape) if self.header_bytes else b""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The byte layout shared by all records of a shard."""

    record_bytes: int
    fields: dict[str, Field]

    @property
    def num_captions(self) -> int:
        """Number of captions of each record."""
        return self.fields["tokens"].shape[0]

    def shard_bytes(self, num_records: int) -> int:
        """Returns the size of a shard: its records, two empty blocks, and padding."""
        used = num_records * self.record_bytes + 2 * BLOCK_BYTES
        return round_up(used, TAR_RECORD_BYTES)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a set."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard."""

    layout: int
    """Index into the manifest's layouts."""
    records: int


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of unscaled latents, sampled from their posteriors."""

    mean: tuple[float, ...]  # (C,)
    std: tuple[float, ...]  # (C,)
    scaling_factor: float
    """1 / (standard deviation over all values), which is how Stable Diffusion's was chosen."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that determines the content of a set: equal provenance, equal records."""

    vae: Identity
    text_encoder: Identity
    tokenizer: Identity
    latent_kind: LatentKind
    text_dtype: TextDtype
    max_tokens: int
    preprocessing: dict[str, str | int | list[int]]
    source: dict[str, str | int]
    """Kind, number of records, and the hash of their keys, captions and other data."""
    records_per_shard: int
    max_shard_bytes: int
    """A shard ends at the first of the two limits."""


@dataclass(frozen=True, kw_only=True)
class TextScale:
    """The scale of int8 text, per channel: hidden states are text * scale."""

    file: FileEntry  # .npy (D,) float32
    relative_error: float
    """|| text - stored || / || text || over the sample of captions that gave the scale."""
    num_captions: int
    """Size of that sample."""


class Document:
    """A dataclass stored as JSON together with the hash of its content."""

    FILE_NAME: ClassVar[str]
    VERSION: ClassVar[int]

    @property
    def sha256(self) -> str:
        """Hash of the content, which contains the hashes of all files that it lists."""
        return hash_json(asdict(cast(Any, self)))

    def dump(self) -> str:
        """Returns the text of the file; equal content gives equal bytes."""
        version = {"schema_version": self.VERSION}
        document = version | asdict(cast(Any, self)) | {"sha256": self.sha256}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the file in a folder.

        Raises FormatError if it is missing, unreadable, altered, inconsistent, or of a schema
        version that this code does not read.
        """
        path = folder / cls.FILE_NAME
        document = read_document(path)
        version = document.get("schema_version")
        if type(version) is not int or version != cls.VERSION:
            raise FormatError(
                f"{path}: schema_version: expected {cls.VERSION}, found {version!r}: the set was "
                "written by another release; encode it again with this one"
            )
        stored = document.pop("sha256", None)
        loaded = from_json(cls, document, str(path))
        if stored != loaded.sha256:
            raise FormatError(
                f"{path}: sha256: expected {loaded.sha256}, found {stored!r}: the file was altered "
                "after it was written"
            )
        loaded.check(path)
        return loaded

    def check(self, path: Path) -> None:
        """Raises FormatError if the content is inconsistent; `path` is for the message."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Manifest(Provenance, Document):
    """The description of a finished set. It is written last, so an unfinished set has none."""

    FILE_NAME = MANIFEST_NAME
    VERSION = SCHEMA_VERSION

    schema_version: int = SCHEMA_VERSION
    layouts: tuple[Layout, ...]
    shards: tuple[ShardEntry, ...]
    num_source: int
    """Images in the source: written or quarantined."""
    num_records: int
    quarantined: dict[str, str] = field(default_factory=dict)
    """The reason for each image that was not written, by key."""
    num_captions: int
    num_truncated: int
    """Captions longer than `max_tokens`, including the start and end tokens."""
    latent_statistics: LatentStatistics
    empty_text: FileEntry  # .npy (T, D) float16: the empty prompt's hidden states
    empty_tokens: FileEntry  # .npy (T,) int32
    text_scale: TextScale | None = None
    """None for float16 text."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of the set except the manifest."""
        return (*self.shards, *self.small_files)

    @property
    def small_files(self) -> tuple[FileEntry, ...]:
        """The files that are read in full when a set is opened."""
        scale = (self.text_scale.file,) if self.text_scale else ()
        return (self.empty_text, self.empty_tokens, *scale)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one view of a stored latent: (2C, h, w) for moments, else (C, h, w)."""
        return self.layouts[0].fields["latent"].shape[1:]

    @property
    def num_views(self) -> int:
        """1, or 2 if the flipped image is encoded too."""
        return self.layouts[0].fields["latent"].shape[0]

    @property
    def latent_channels(self) -> int:
        """C, the channels of a sampled latent."""
        return self.latent_shape[0] // (2 if self.latent_kind == "moments" else 1)

    @property
    def text_width(self) -> int:
        """D, the size of a token's hidden state."""
        return self.layouts[0].fields["text"].shape[2]

    def check(self, path: Path) -> None:
        """Checks that names, sizes, layouts and counts are consistent with each other."""
        if not self.shards:
            raise FormatError(f"{path}: shards: expected at least one, found none")
        seen = {MANIFEST_NAME}
        for entry in self.files:
            if not FILE_NAME_PATTERN.fullmatch(entry.name) or entry.name in seen:
                raise FormatError(
                    f"{path}: expected unique file names of the form {FILE_NAME_PATTERN.pattern}, "
                    f"found {entry.name!r}"
                )
            seen.add(entry.name)
        for number in range(len(self.layouts)):
            self._check_layout(path, number)
        for shard in self.shards:
            self._check_shard(path, shard)
        written = sum(shard.records for shard in self.shards)
        pairs = {
            "num_records": (written, self.num_records),
            "num_source": (written + len(self.quarantined), self.num_source),
            "num_captions": (
                sum(s.records * self.layouts[s.layout].num_captions for s in self.shards),
                self.num_captions,
            ),
            "num_truncated": (
                min(max(self.num_truncated, 0), self.num_captions),
                self.num_truncated,
            ),
            "channels of latent_statistics": (
                [self.latent_channels] * 2,
                [len(self.latent_statistics.mean), len(self.latent_statistics.std)],
            ),
        }
        for name, (expected, found) in pairs.items():
            if expected != found:
                raise FormatError(f"{path}: {name}: expected {expected}, found {found}")
        if (self.text_dtype == "int8") != (self.text_scale is not None):
            raise FormatError(
                f"{path}: text_scale: expected one for int8 text and none for float16, found "
                f"{self.text_scale} for {self.text_dtype}"
            )

    def _check_shard(self, path: Path, shard: ShardEntry) -> None:
        place = f"{path}: shard {shard.name!r}"
        if not 0 <= shard.layout < len(self.layouts):
            last = len(self.layouts) - 1
            raise FormatError(f"{place}: layout: expected 0 to {last}, found {shard.layout}")
        if shard.records < 1:
            raise FormatError(f"{place}: records: expected at least 1, found {shard.records}")
        size = self.layouts[shard.layout].shard_bytes(shard.records)
        if shard.bytes != size:
            raise FormatError(
                f"{place}: bytes: expected {size} for {shard.records} records of this layout, "
                f"found {shard.bytes}"
            )

    def _check_layout(self, path: Path, number: int) -> None:
        """Checks a layout against the format, the settings and the first layout."""
        found, place = self.layouts[number], f"{path}: layout {number}"
        if list(found.fields) != list(MEMBERS):
            raise FormatError(f"{place}: expected fields {[*MEMBERS]}, found {[*found.fields]}")
        latent, text, room = (found.fields[name].shape for name in ("latent", "text", "json"))
        if (len(latent), len(text), len(room)) != (4, 3, 1) or min(*latent, *text, *room) < 1:
            raise FormatError(
                f"{place}: expected latent (views, channels, h, w), text (captions, T, D) and json "
                f"(bytes,), all at least 1, found {latent}, {text} and {room}"
            )
        expected_items = (self.layouts[0].fields["latent"].shape, self.max_tokens, self.text_width)
        if (latent, *text[1:]) != expected_items:
            raise FormatError(
                f"{place}: expected latents, tokens and text width of {expected_items}, "
                f"found {(latent, *text[1:])}"
            )
        if self.latent_kind == "moments" and latent[1] % 2:
            raise FormatError(
                f"{place}: latent: expected 2C channels of moments, found {latent[1]}"
            )
        expected = make_layout(
            latent=latent,
            text=(text[0], text[1], text[2]),
            json_bytes=room[0],
            text_dtype=self.text_dtype,
        )
        if found != expected:
            raise FormatError(f"{place}: expected {expected} for these shapes, found {found}")


def make_layout(
    *,
    latent: tuple[int, ...],
    text: tuple[int, int, int],
    json_bytes: int,
    text_dtype: TextDtype = "float16",
) -> Layout:
    """Returns the layout of records with latents (views, channels, h, w), text (captions, T, D)."""
    shapes = {"json": (json_bytes,), "latent": latent, "text": text, "tokens": text[:2]}
    kinds: dict[str, FieldDtype] = {
        "json": "uint8",
        "latent": "float16",
        "text": text_dtype,
        "tokens": "int32",
    }
    laid: dict[str, Field] = {}
    start = 0
    for name in MEMBERS:
        header_bytes = 0 if name == "json" else len(npy_header(kinds[name], shapes[name]))
        laid[name] = Field(
            offset_bytes=start + BLOCK_BYTES + header_bytes,
            header_bytes=header_bytes,
            dtype=kinds[name],
            shape=shapes[name],
        )
        start = round_up(laid[name].offset_bytes + laid[name].num_bytes, BLOCK_BYTES)
    return Layout(record_bytes=start, fields=laid)


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns the .npy header of a C-ordered, little-endian array."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def encode_meta(meta: Mapping[str, Any]) -> bytes:
    """Returns the JSON of a record, without padding."""
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def differences(found: Provenance, expected: Provenance) -> list[str]:
    """Returns one line with both values for each difference; none for the same set.

    Encoders are compared by hash only: the same weights loaded from elsewhere are the same. The
    device is compared if both have one.
    """
    lines = []
    for name in (part.name for part in fields(Provenance)):
        old, new = getattr(found, name), getattr(expected, name)
        if isinstance(old, Identity):
            if old.sha256 != new.sha256:
                lines.append(f"{name}: found {old}, expected {new}")
        elif isinstance(old, dict):
            for key in {**old, **new}:
                if old.get(key) != new.get(key):
                    if key == "device" and None in (old.get(key), new.get(key)):
                        continue  # older releases did not record it
                    if (name, key) == ("source", "sha256"):
                        lines.append(
                            "source: keys, file names, captions, other fields, image sizes or "
                            "unusable records have changed "
                            f"(sha256 {old.get(key)}, now {new.get(key)})"
                        )
                        continue
                    values = f"found {old.get(key)!r}, expected {new.get(key)!r}"
                    lines.append(f"{name}.{printable(key)}: {values}")
        elif old != new:
            lines.append(f"{name}: found {old!r}, expected {new!r}")
    return lines


def hash_json(document: Any) -> str:
    """Returns the sha256 of a JSON document; key order and spacing do not matter."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def round_up(value: int, multiple: int) -> int:
    """Rounds up to a multiple."""
    return -(-value // multiple) * multiple


def read_document(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises FormatError if there is none."""
    if not path.parent.is_dir():
        raise FormatError(f"{path.parent}: no such folder of shards")
    if not path.is_file():
        raise FormatError(f"{path}: missing ({_why_missing(path.parent)})")
    with path.open("rb") as file:
        document = load_json(read_limited(file, str(path)), str(path))
    if not isinstance(document, dict):
        raise FormatError(f"{path}: expected a JSON object, found a {type(document).__name__}")
    return document


def _why_missing(folder: Path) -> str:
    """Returns why a folder has no manifest, or no list of buckets."""
    if (folder / BUCKETS_NAME).is_file():
        return "a bucketed set: open it with shards.access.open_set, or open one of its sub-folders"
    parts = [path for path in folder.iterdir() if BUCKET_PATTERN.fullmatch(path.name)]
    if parts or (folder / PROGRESS_DIR).is_dir():
        return "stage one did not finish: run the same command again"
    return "no shards"
