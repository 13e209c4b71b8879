"""The types that both stages share, and the manifest of a set of shards.

    FOLDER/manifest.json   shards.npy   quarantine.jsonl   empty_text.npy   shard-000000.tar ...

All records of a shard have the same byte layout (layout.py), so a shard is a strided array as well
as a tar. The cost: all images of a shard have the same number of captions, and the JSON is padded.
The manifest stays small: what grows with the set is in files of its own, which the manifest hashes.
README.md is the specification.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.layout import BLOCK_BYTES as BLOCK_BYTES
from latent_t2i.shards.layout import MEMBERS as MEMBERS
from latent_t2i.shards.layout import TAR_RECORD_BYTES as TAR_RECORD_BYTES
from latent_t2i.shards.layout import Field as Field
from latent_t2i.shards.layout import FieldDtype as FieldDtype
from latent_t2i.shards.layout import FieldSpec as FieldSpec
from latent_t2i.shards.layout import FileEntry as FileEntry
from latent_t2i.shards.layout import Identity as Identity
from latent_t2i.shards.layout import Layout as Layout
from latent_t2i.shards.layout import TextDtype as TextDtype
from latent_t2i.shards.layout import check_fields
from latent_t2i.shards.layout import make_layout as make_layout
from latent_t2i.shards.layout import member_of as member_of
from latent_t2i.shards.layout import npy_header as npy_header
from latent_t2i.shards.layout import round_up as round_up
from latent_t2i.shards.parsing import FormatError as FormatError
from latent_t2i.shards.parsing import from_json, load_json, printable, read_limited
from latent_t2i.shards.quarantine import read_reasons
from latent_t2i.shards.shard_table import ShardEntry as ShardEntry
from latent_t2i.shards.shard_table import ShardTable as ShardTable
from latent_t2i.shards.shard_table import shard_number

T = TypeVar("T")

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"
BUCKETS_NAME = "buckets.json"
"""The list of a bucketed set (buckets.py), whose sub-folders hold the manifests."""
BUCKET_PATTERN = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
"""A bucket's name and sub-folder: WIDTHxHEIGHT of its images in pixels."""
FILE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
PROGRESS_DIR = "progress"
"""Holds the provenance and the shard reports while stage one runs; removed at the end."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""Keys are file names in the tar: no dot, where WebDataset cuts, and short enough for ustar."""

LatentKind = Literal["moments", "plain"]
Fetch = Callable[[FileEntry], object]
"""Brings a file of a set into the local folder from which the set is being opened."""


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
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """The further fields of the set, by name."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of unscaled latents, sampled from their posteriors."""

    mean: tuple[float, ...]  # (C,)
    std: tuple[float, ...]  # (C,)
    scaling_factor: float
    """1 / (standard deviation over all values), which is how Stable Diffusion's was chosen."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What determines the content of a set, in all versions of the format."""

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
class Provenance(Origin):
    """Everything that determines the content of a set: equal provenance, equal records."""

    fields: tuple[FieldSpec, ...] = ()
    """The further fields of each record, in the order of their members."""


@dataclass(frozen=True, kw_only=True)
class TextScale:
    """The scale of int8 text, per channel: hidden states are text * scale."""

    file: FileEntry  # .npy (D,) float32
    relative_error: float
    """|| text - stored || / || text || over the sample of captions that gave the scale."""
    num_captions: int
    """Size of that sample."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shards that one run of stage one added to a set, and the source that it saw."""

    kind: str
    num_records: int
    """Records of the whole source, also those that were in the set before."""
    sha256: str
    first_shard: int
    num_shards: int
    """Shards planned, also those of which all images were quarantined."""


class Document:
    """A JSON file that contains the hash of its content."""

    FILE_NAME: ClassVar[str]

    def content(self) -> dict[str, Any]:
        """Returns the content without the hash, with the keys in the order of the file."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """Hash of the content, which contains the hashes of all files that it lists."""
        return hash_json(self.content())

    def dump(self) -> str:
        """Returns the text of the file; equal content gives equal bytes."""
        content = self.content()
        document = {"schema_version": 0} | content | {"sha256": hash_json(content)}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path, fetch: Fetch | None = None) -> Self:
        """Reads and checks the file in a folder; `fetch` brings further files that this needs.

        Raises FormatError if a file is missing, unreadable, altered, inconsistent, or of a schema
        version that this code does not read.
        """
        raise NotImplementedError


def read_stored(path: Path, kinds: Mapping[int, type[Any]]) -> Any:
    """Returns the content of a document, as the dataclass of its schema version in `kinds`.

    Raises FormatError like `Document.load`.
    """
    document = read_document(path)
    version = document.get("schema_version")
    if type(version) is not int or version not in kinds:
        expected = " or ".join(map(str, kinds))
        raise FormatError(
            f"{path}: schema_version: expected {expected}, found {version!r}: the set was written "
            "by another release; encode it again with this one"
        )
    sha256 = document.pop("sha256", None)
    stored = from_json(kinds[version], document, str(path))
    if sha256 != (expected := hash_json(asdict(stored))):
        raise FormatError(
            f"{path}: sha256: expected {expected}, found {sha256!r}: the file was altered after it "
            "was written"
        )
    return stored


@dataclass(frozen=True, kw_only=True)
class Version2(Origin):
    """The content of a manifest of version 2, which lists each shard and quarantined image."""

    schema_version: int
    layouts: tuple[Layout, ...]
    shards: tuple[ShardEntry, ...]
    num_source: int
    num_records: int
    quarantined: dict[str, str]
    num_captions: int
    num_truncated: int
    latent_statistics: LatentStatistics
    empty_text: FileEntry
    empty_tokens: FileEntry
    text_scale: TextScale | None


@dataclass(frozen=True, kw_only=True)
class Version3(Provenance):
    """The content of a manifest of version 3."""

    schema_version: int = SCHEMA_VERSION
    layouts: tuple[Layout, ...]
    shard_table: FileEntry | None  # shards.npy; None in version 2 only, as the next two
    quarantine: FileEntry | None  # quarantine.jsonl
    shard_sums: FileEntry | None  # shard_sums.npy
    num_source: int
    """Images in the source: written or quarantined."""
    num_records: int
    num_quarantined: int
    num_captions: int
    num_truncated: int
    """Captions longer than `max_tokens`, including the start and end tokens."""
    latent_statistics: LatentStatistics
    empty_text: FileEntry  # .npy (T, D) float16: the empty prompt's hidden states
    empty_tokens: FileEntry  # .npy (T,) int32
    text_scale: TextScale | None = None
    """None for float16 text."""
    parts: tuple[Part, ...] = ()
    """The runs that made the set, if there are several."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Version3, Document):
    """The description of a finished set. It is written last, so an unfinished set has none."""

    FILE_NAME = MANIFEST_NAME

    shards: ShardTable
    folder: Path = field(compare=False)
    """Holds the quarantine."""
    version_2: Version2 | None = field(default=None, repr=False)
    """The content of the file, if it is of version 2."""

    @classmethod
    def load(cls, folder: Path, fetch: Fetch | None = None) -> Self:
        """See `Document.load`. Of the set's other files, only the shard table is read."""
        path = folder / cls.FILE_NAME
        stored = read_stored(path, {3: Version3, 2: Version2})
        if isinstance(stored, Version2):
            manifest = cls._of_version_2(path, stored)
        else:
            manifest = cls._of_version_3(path, stored, fetch)
        manifest.check(path)
        return manifest

    @classmethod
    def _of_version_3(cls, path: Path, stored: Version3, fetch: Fetch | None) -> Self:
        entries = [stored.shard_table, stored.quarantine, stored.shard_sums]
        if stored.shard_table is None or None in entries:
            raise FormatError(
                f"{path}: shard_table, quarantine, shard_sums: expected files, found null"
            )
        check_file_names(path, (*listed_files(stored), *small_files(stored)))
        if fetch is not None:
            fetch(stored.shard_table)
        table = path.parent / stored.shard_table.name
        shards = ShardTable.open(table, stored.shard_table, stored.layouts)
        return cls(**_values(stored), shards=shards, folder=path.parent)

    @classmethod
    def _of_version_2(cls, path: Path, stored: Version2) -> Self:
        check_file_names(path, small_files(stored))
        try:
            shards = ShardTable.of(stored.shards, stored.layouts)
        except ValueError as error:
            raise FormatError(
                f"{path}: shards: expected names of the form shard-000000.tar, indices of layouts, "
                f"numbers of records, and hashes in hexadecimal, found {error}"
            ) from None
        shared = {k: v for k, v in _values(stored).items() if k not in ("shards", "quarantined")}
        absent: dict[str, Any] = dict.fromkeys(("shard_table", "quarantine", "shard_sums"))
        return cls(
            **shared | absent,
            num_quarantined=len(stored.quarantined),
            shards=shards,
            folder=path.parent,
            version_2=stored,
        )

    def content(self) -> dict[str, Any]:
        """Returns the content of the file without its hash."""
        if self.version_2 is not None:
            return asdict(self.version_2)
        return asdict(
            Version3(**{part.name: getattr(self, part.name) for part in fields(Version3)})
        )

    @property
    def files(self) -> Iterator[FileEntry]:
        """All files of the set except the manifest."""
        return chain(self.shards, self.small_files, self.other_files)

    @property
    def small_files(self) -> tuple[FileEntry, ...]:
        """The files that are read in full when a set is opened."""
        table = (self.shard_table,) if self.shard_table else ()
        return (*table, *small_files(self))

    @property
    def other_files(self) -> tuple[FileEntry, ...]:
        """The files that training does not need."""
        return tuple(entry for entry in (self.quarantine, self.shard_sums) if entry)

    @property
    def num_bytes(self) -> int:
        """Size of the files that training needs, without the manifest."""
        return int(self.shards.bytes.sum()) + sum(entry.bytes for entry in self.small_files)

    def read_quarantined(self) -> dict[str, str]:
        """Reads the reason for each image that was not written, by key.

        Raises FormatError if the file is missing, altered or malformed.
        """
        if self.version_2 is not None:
            return dict(self.version_2.quarantined)
        assert self.quarantine is not None
        return read_reasons(self.folder / self.quarantine.name, self.quarantine)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one view of a stored latent: (2C, h, w) for moments, else (C, h, w)."""
        return self.layouts[0].fields["latent"].shape[1:]

    @property
    def num_views(self) -> int:
        """Encodings per image: crop 0, with flips crop 0 flipped, crop 1, ..."""
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
        check_fields(str(path), self.fields)
        for number in range(len(self.layouts)):
            self._check_layout(path, number)
        self.shards.check(path)
        if self.version_2 is not None:
            self._check_sizes(path, self.version_2)
        written = int(self.shards.records.sum())
        captions = np.array([layout.num_captions for layout in self.layouts])[self.shards.layouts]
        pairs = {
            "num_records": (written, self.num_records),
            "num_quarantined": (max(self.num_quarantined, 0), self.num_quarantined),
            "num_source": (written + self.num_quarantined, self.num_source),
            "num_captions": (int(captions @ self.shards.records), self.num_captions),
            "num_truncated": (
                min(max(self.num_truncated, 0), self.num_captions),
                self.num_truncated,
            ),
            "channels of latent_statistics": (
                [self.latent_channels] * 2,
                [len(self.latent_statistics.mean), len(self.latent_statistics.std)],
            ),
            "first_shard of parts": (
                [sum(p.num_shards for p in self.parts[:n]) for n in range(len(self.parts))],
                [part.first_shard for part in self.parts],
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

    def _check_sizes(self, path: Path, stored: Version2) -> None:
        """Checks the sizes that version 2 lists against those that follow from the layouts."""
        found = np.array([entry.bytes for entry in stored.shards])
        (places,) = np.nonzero(found != self.shards.bytes)
        if len(places):
            entry = self.shards[int(places[0])]
            raise FormatError(
                f"{path}: shard {entry.name!r}: bytes: expected {entry.bytes} for {entry.records} "
                f"records of this layout, found {found[places[0]]}"
            )

    def _check_layout(self, path: Path, number: int) -> None:
        """Checks a layout against the format, the settings and the first layout."""
        found, place = self.layouts[number], f"{path}: layout {number}"
        names = [*MEMBERS, *(spec.name for spec in self.fields)]
        if list(found.fields) != names:
            raise FormatError(f"{place}: expected fields {names}, found {[*found.fields]}")
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
            extra=self.fields,
        )
        if found != expected:
            raise FormatError(f"{place}: expected {expected} for these shapes, found {found}")


def listed_files(stored: Version3) -> tuple[FileEntry, ...]:
    """Returns the files with one row or line per shard or quarantined image."""
    entries = (stored.shard_table, stored.quarantine, stored.shard_sums)
    return tuple(entry for entry in entries if entry)


def small_files(stored: Version2 | Version3) -> tuple[FileEntry, ...]:
    """Returns the arrays that are loaded when a set is opened."""
    text = (stored.text_scale.file,) if stored.text_scale else ()
    specs = stored.fields if isinstance(stored, Version3) else ()
    scales = tuple(spec.scale for spec in specs if spec.scale)
    return (stored.empty_text, stored.empty_tokens, *text, *scales)


def check_file_names(path: Path, entries: Iterable[FileEntry]) -> None:
    """Raises FormatError if a name is not unique, unsafe, or that of a shard."""
    seen = {path.name}
    for entry in entries:
        is_taken = entry.name in seen or shard_number(entry.name) is not None
        if is_taken or not FILE_NAME_PATTERN.fullmatch(entry.name):
            raise FormatError(
                f"{path}: expected unique file names of the form {FILE_NAME_PATTERN.pattern}, "
                f"found {entry.name!r}"
            )
        seen.add(entry.name)


def _values(stored: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, as they are."""
    return {part.name: getattr(stored, part.name) for part in fields(stored)}


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
        elif name == "fields":
            lines += _field_differences(old, new)
        elif old != new:
            lines.append(f"{name}: found {old!r}, expected {new!r}")
    return lines


def _field_differences(found: Sequence[FieldSpec], expected: Sequence[FieldSpec]) -> list[str]:
    """Compares further fields, with the networks that made them by hash, and without scales."""

    def identify(specs: Sequence[FieldSpec]) -> list[tuple[Any, ...]]:
        return [(s.name, s.dtype, s.shape, s.per, s.made_by.sha256) for s in specs]

    old, new = identify(found), identify(expected)
    return [] if old == new else [f"fields: found {old}, expected {new}"]


def hash_json(document: Any) -> str:
    """Returns the sha256 of a JSON document; key order and spacing do not matter."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
