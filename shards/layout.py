"""The fields of a record and the position of their bytes.

Every record of a shard has the same layout, so item `i` of a field starts at
`offset_bytes + i * record_bytes`. Besides the four fields that every set has, a set may declare
further arrays (`FieldSpec`), which follow in the order of their declaration.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from latent_t2i.shards.parsing import FormatError

BLOCK_BYTES = 512
"""Size of a tar header; the data of each member is padded to a multiple of it."""
TAR_RECORD_BYTES = 10240
"""The size of a tar file is a multiple of this."""

MEMBERS = {"json": "json", "latent": "latent.npy", "text": "text.npy", "tokens": "tokens.npy"}
"""The extension of the member of each field that all sets have, in the order of the bytes."""
FIELD_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,14}")
"""Names of further fields. The longest one with the longest key fits into a tar header."""

TextDtype = Literal["float16", "int8"]
FieldDtype = Literal["uint8", "int8", "int32", "float16", "float32"]
Per = Literal["view", "caption", "record"]
"""What a field has one item of."""


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
class FileEntry:
    """A file of a set."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """A further array of each record."""

    name: str
    dtype: FieldDtype
    shape: tuple[int, ...]
    """Shape of one item. A field per record is stored in this shape, others with the number of
    views or captions in front."""
    per: Per
    made_by: Identity
    scale: FileEntry | None = None
    """int8 only: .npy float32 over the last axis; values are stored * scale. It is known, and
    set, when the set is finished."""

    def stored_shape(self, *, num_views: int, num_captions: int) -> tuple[int, ...]:
        """Returns the shape of the field in a record."""
        items = {"view": (num_views,), "caption": (num_captions,), "record": ()}
        return (*items[self.per], *self.shape)


def check_fields(place: str, specs: Sequence[FieldSpec]) -> None:
    """Raises FormatError for a field whose name, shape or scale the format does not allow."""
    seen = {*MEMBERS}
    for spec in specs:
        where = f"{place}: field {spec.name!r}"
        if not FIELD_PATTERN.fullmatch(spec.name) or spec.name in seen:
            raise FormatError(
                f"{where}: expected unique names of the form {FIELD_PATTERN.pattern}, other than "
                f"{', '.join(MEMBERS)}"
            )
        if not spec.shape or min(spec.shape) < 1:
            raise FormatError(
                f"{where}: shape: expected at least one axis, all of at least 1, found {spec.shape}"
            )
        if spec.scale and spec.dtype != "int8":
            raise FormatError(f"{where}: scale: expected none for {spec.dtype}, only for int8")
        seen.add(spec.name)


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


def member_of(name: str) -> str:
    """Returns the extension of a field's member."""
    return MEMBERS.get(name, f"{name}.npy")


def make_layout(
    *,
    latent: tuple[int, ...],
    text: tuple[int, int, int],
    json_bytes: int,
    text_dtype: TextDtype = "float16",
    extra: Sequence[FieldSpec] = (),
) -> Layout:
    """Returns the layout of records with latents (views, channels, h, w), text (captions, T, D)."""
    arrays: dict[str, tuple[FieldDtype, tuple[int, ...]]] = {
        "json": ("uint8", (json_bytes,)),
        "latent": ("float16", latent),
        "text": (text_dtype, text),
        "tokens": ("int32", text[:2]),
    }
    for spec in extra:
        shape = spec.stored_shape(num_views=latent[0], num_captions=text[0])
        arrays[spec.name] = spec.dtype, shape
    laid: dict[str, Field] = {}
    start = 0
    for name, (dtype, shape) in arrays.items():
        header_bytes = 0 if name == "json" else len(npy_header(dtype, shape))
        laid[name] = Field(
            offset_bytes=start + BLOCK_BYTES + header_bytes,
            header_bytes=header_bytes,
            dtype=dtype,
            shape=shape,
        )
        start = round_up(laid[name].offset_bytes + laid[name].num_bytes, BLOCK_BYTES)
    return Layout(record_bytes=start, fields=laid)


def npy_header(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """Returns the .npy header of a C-ordered, little-endian array."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def round_up(value: int, multiple: int) -> int:
    """Rounds up to a multiple."""
    return -(-value // multiple) * multiple
