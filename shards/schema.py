"""What a set of shards is: the types that cross between the stages, and the manifest.

    FOLDER/manifest.json   empty_text.npy   empty_tokens.npy   shard-000000.tar ...

A shard is a plain WebDataset tar of KEY.json, KEY.latent.npy, KEY.text.npy and KEY.tokens.npy
whose records all have one byte layout, so that it is a strided array too: item `i` of a field
starts at `offset_bytes + i * record_bytes`. The price is that all images of a shard have equally
many captions and that the JSON is padded with spaces. The manifest carries its own hash.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
BUCKETS_NAME = "buckets.json"
"""In the folder of a bucketed set (buckets.py), whose sub-folders hold the manifests."""
BUCKET_PATTERN = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
"""A bucket's name and sub-folder: WIDTHxHEIGHT of its images in pixels."""
PROGRESS_DIR = "progress"
"""Holds the plan and the finished shards' reports while stage one runs; removed at the end."""

BLOCK_BYTES = 512
"""A tar header's size; every member's data is padded to a multiple of it."""
TAR_RECORD_BYTES = 10240
"""A tar file is padded to a multiple of this."""

MEMBERS = {"json": "json", "latent": "latent.npy", "text": "text.npy", "tokens": "tokens.npy"}
"""The member's extension by field, in the order of the bytes."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A key is a file name in the tar: no dot (WebDataset cuts there), and short enough for ustar."""

LatentKind = Literal["moments", "plain"]
TextDtype = Literal["float16", "int8"]


class FormatError(ValueError):
    """A file is not what the format says it is; the message names the place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One image with its captions, encoded: what crosses from stage one to the shards."""

    key: str
    latent: NDArray[np.float16]  # (views, 2C, h, w) moments, or (views, C, h, w)
    text: NDArray[np.float16 | np.int8]  # (captions, T, D)
    tokens: NDArray[np.int32]  # (captions, T)
    meta: Mapping[str, Any]
    """JSON: `captions` (a list of text) and `truncated` (indices of those cut at T tokens), and
    whatever else the source knows."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A network or tokenizer: where it was loaded from, and the hash that tells it from others."""

    name: str
    revision: str | None
    sha256: str

    def __str__(self) -> str:
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.name!r}{revision} (sha256 {self.sha256})"


@dataclass(frozen=True, kw_only=True)
class Field:
    """Where an item of a record lies."""

    offset_bytes: int
    """Of the first data byte, from the record's start."""
    header_bytes: int
    """What stands before the data and after the tar header: .npy's header; 0 for the JSON."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the data, without padding."""
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
        """How many captions each record has."""
        return self.fields["tokens"].shape[0]

    def shard_bytes(self, num_records: int) -> int:
        """The size of a shard: its records, two empty blocks, and tar's padding."""
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
    """A shard; `layout` is an index into the manifest's layouts."""

    layout: int
    records: int


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Of latents sampled from their posteriors, unscaled: per channel, and over all values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaling_factor: float
    """1 / (standard deviation over all values), as Stable Diffusion's 0.18215 was found."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What decides a set's content. Two sets with equal hashes and settings hold equal records."""

    vae: Identity
    text_encoder: Identity
    tokenizer: Identity
    latent_kind: LatentKind
    text_dtype: TextDtype
    max_tokens: int
    preprocessing: dict[str, str | int]
    source: dict[str, str | int]
    """Kind, number of records and the hash of their keys, captions and further data."""
    records_per_shard: int
    max_shard_bytes: int
    """A shard ends at whichever of the two comes first."""


@dataclass(frozen=True, kw_only=True)
class TextScale:
    """How int8 text becomes numbers again: text * scale, one scale per channel."""

    file: FileEntry  # .npy (D,) float32
    relative_error: float
    """|| text - stored || / || text || over the captions that the scales were found on."""
    num_captions: int
    """How many those were."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Provenance):
    """All about a finished set. Written last: a folder without one is not finished."""

    schema_version: int = SCHEMA_VERSION
    layouts: tuple[Layout, ...]
    shards: tuple[ShardEntry, ...]
    num_source: int
    """Images that came in: those written and those quarantined."""
    num_records: int
    quarantined: dict[str, str] = field(default_factory=dict)
    """The reason by key of each image that was left out."""
    num_captions: int
    num_truncated: int
    """Captions longer than `max_tokens`, start and end included."""
    latent_statistics: LatentStatistics
    empty_text: FileEntry  # .npy (T, D) float16: the empty prompt's hidden states
    empty_tokens: FileEntry  # .npy (T,) int32
    text_scale: TextScale | None = None
    """None for float16 text."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the set but the manifest."""
        return (*self.shards, *self.small_files)

    @property
    def small_files(self) -> tuple[FileEntry, ...]:
        """The files that are read whole when a set is opened."""
        scale = (self.text_scale.file,) if self.text_scale else ()
        return (self.empty_text, self.empty_tokens, *scale)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """One view of a stored latent.  # (2C, h, w) moments, or (C, h, w)"""
        return self.layouts[0].fields["latent"].shape[1:]

    @property
    def num_views(self) -> int:
        """1, or 2 when the flipped image is encoded too."""
        return self.layouts[0].fields["latent"].shape[0]

    @property
    def latent_channels(self) -> int:
        """C, whether stored as moments or plain."""
        return self.latent_shape[0] // (2 if self.latent_kind == "moments" else 1)

    @property
    def text_width(self) -> int:
        """D, the size of a token's hidden state."""
        return self.layouts[0].fields["text"].shape[2]

    @property
    def sha256(self) -> str:
        """The hash of the manifest's content, and through it of every shard's."""
        return hash_json(asdict(self))

    def dump(self) -> str:
        """The manifest as it stands in the file: the same content, the same bytes."""
        version = {"schema_version": self.schema_version}
        document = version | asdict(self) | {"sha256": self.sha256}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the manifest of a set.

        Raises FormatError for a missing, unreadable, altered or inconsistent one, and for a schema
        version this code does not know.
        """
        path = folder / MANIFEST_NAME
        document = read_document(path, folder)
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"{path}: schema_version: expected {SCHEMA_VERSION}, found {version!r}: "
                "written by another release; make the shards again with this one"
            )
        stored = document.pop("sha256", None)
        try:
            manifest = cls(**_parse(document))
            computed = manifest.sha256
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: not a manifest of version {version}: {error!r}") from error
        if stored != computed:
            raise FormatError(
                f"{path}: sha256: expected {computed}, found {stored}: "
                "the manifest was altered after it was written"
            )
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Holds the numbers to each other, so that what opens is also consistent."""
        if not self.shards:
            raise FormatError(f"{path}: shards: expected at least one, found none")
        seen: set[str] = set()
        for entry in self.files:
            if Path(entry.name).name != entry.name or entry.name in seen:
                raise FormatError(f"{path}: expected file names, each once, found {entry.name!r}")
            seen.add(entry.name)
        for number in range(len(self.layouts)):
            self._check_layout(path, number)
        for shard in self.shards:
            self._check_shard(path, shard)
        written = sum(shard.records for shard in self.shards)
        pairs = {
            "num_records": (written, self.num_records),
            "num_source": (written + len(self.quarantined), self.num_source),
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
        """Holds a layout to the format and to the settings, and its items to the first layout's."""
        found = self.layouts[number]
        latent, text, room = (found.fields[name].shape for name in ("latent", "text", "json"))
        place = f"{path}: layout {number}"
        if (len(latent), len(text), len(room)) != (4, 3, 1):
            raise FormatError(
                f"{place}: expected latent (views, channels, h, w), text (captions, T, D) and json "
                f"(bytes,), found {latent}, {text} and {room}"
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
    """Lays out a record of latents (views, channels, h, w) and text (captions, T, D)."""
    shapes = {"json": (json_bytes,), "latent": latent, "text": text, "tokens": text[:2]}
    kinds = {"json": "uint8", "latent": "float16", "text": text_dtype, "tokens": "int32"}
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
    """The bytes that NumPy's .npy format puts before a C-ordered array's data."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def encode_meta(meta: Mapping[str, Any]) -> bytes:
    """A record's JSON, without its padding."""
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


def differences(found: Provenance, asked: Provenance) -> list[str]:
    """What tells two sets apart, a line each naming both values; empty for the same set.

    An encoder is told by its hash alone: the same weights loaded from elsewhere are the same.
    """
    lines = []
    for name in (part.name for part in fields(Provenance)):
        old, new = getattr(found, name), getattr(asked, name)
        if isinstance(old, Identity):
            if old.sha256 != new.sha256:
                lines.append(f"{name}: found {old}, asked for {new}")
        elif isinstance(old, dict):
            for key in {**old, **new}:
                if old.get(key) != new.get(key):
                    found_value, asked_value = old.get(key), new.get(key)
                    if (name, key) == ("source", "sha256"):
                        lines.append(
                            "source: keys, file names, captions, other fields, image sizes or "
                            "unusable records have changed "
                            f"(sha256 {found_value}, now {asked_value})"
                        )
                        continue
                    lines.append(f"{name}.{key}: found {found_value!r}, asked for {asked_value!r}")
        elif old != new:
            lines.append(f"{name}: found {old!r}, asked for {new!r}")
    return lines


def hash_json(document: Any) -> str:
    """The sha256 of a JSON document, whatever its key order or spacing."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return -(-value // multiple) * multiple


def parse_provenance(document: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `Provenance` from its JSON."""
    parts = {name: Identity(**document[name]) for name in ("vae", "text_encoder", "tokenizer")}
    return {**document, **parts}


def parse_layout(document: Mapping[str, Any]) -> Layout:
    """A `Layout` from its JSON."""
    parts = {name: document["fields"][name] for name in MEMBERS}
    laid = {name: Field(**{**part, "shape": tuple(part["shape"])}) for name, part in parts.items()}
    return Layout(record_bytes=document["record_bytes"], fields=laid)


def _parse(document: Mapping[str, Any]) -> dict[str, Any]:
    statistics = document["latent_statistics"]
    return {
        **parse_provenance(document),
        "layouts": tuple(parse_layout(layout) for layout in document["layouts"]),
        "shards": tuple(ShardEntry(**shard) for shard in document["shards"]),
        "latent_statistics": LatentStatistics(
            mean=tuple(statistics["mean"]),
            std=tuple(statistics["std"]),
            scaling_factor=statistics["scaling_factor"],
        ),
        "empty_text": FileEntry(**document["empty_text"]),
        "empty_tokens": FileEntry(**document["empty_tokens"]),
        "text_scale": _parse_text_scale(document["text_scale"]),
    }


def _parse_text_scale(document: Mapping[str, Any] | None) -> TextScale | None:
    if document is None:
        return None
    return TextScale(**{**document, "file": FileEntry(**document["file"])})


def read_document(path: Path, folder: Path) -> dict[str, Any]:
    """Reads the JSON object in a file of a set. Raises FormatError where there is none."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder of shards")
    if not path.is_file():
        raise FormatError(f"{path}: missing ({_why_missing(folder)})")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: expected a JSON object, found a {type(document).__name__}")
    return document


def _why_missing(folder: Path) -> str:
    """Says why a folder has no manifest, or no list of its buckets."""
    if (folder / BUCKETS_NAME).is_file():
        return "a bucketed set: open it with shards.access.open_set, or one of its sub-folders"
    parts = [path for path in folder.iterdir() if BUCKET_PATTERN.fullmatch(path.name)]
    if parts or (folder / PROGRESS_DIR).is_dir():
        return "stage one did not finish: start the same command again"
    return "no shards"
