"""The table of a set's shards: numpy columns, and a `ShardEntry` on demand.

    table = ShardTable.open(folder / entry.name, entry, layouts)
    table.records.sum(), table[3].name

A set may have a million shards, so the table is mapped from a binary file of 48 bytes per shard.
What follows from others is not stored: a shard's name comes from its number, and its size from its
layout and records.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.layout import (
    BLOCK_BYTES,
    TAR_RECORD_BYTES,
    FileEntry,
    Layout,
    npy_header,
)
from latent_t2i.shards.parsing import FormatError

TABLE_DTYPE = np.dtype(
    [("number", "<u4"), ("layout", "<u4"), ("records", "<u8"), ("sha256", "V32")]
)
NAME_PATTERN = re.compile(r"shard-(\d{6}|[1-9]\d{6,8})\.tar")
MAX_BYTES = 2**62
"""Upper bound for the bytes of all shards, so that offsets fit into 64 bits."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard."""

    layout: int
    """Index into the manifest's layouts."""
    records: int


def shard_name(number: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:06d}.tar"


def shard_number(name: str) -> int | None:
    """Returns the number in the file name of a shard; None for other names."""
    found = NAME_PATTERN.fullmatch(name)
    return int(found[1]) if found else None


class ShardTable(Sequence[ShardEntry]):
    """The shards of a set, in the order of their numbers."""

    def __init__(self, rows: NDArray[Any], record_bytes: Sequence[int]) -> None:
        """`rows` (shards,) have TABLE_DTYPE, `record_bytes` is the size of a record by layout."""
        self.rows = rows
        self._record_bytes = record_bytes

    @classmethod
    def open(cls, path: Path, entry: FileEntry, layouts: Sequence[Layout]) -> Self:
        """Maps a table. Raises FormatError for another size, hash, dtype or shape."""
        rows = map_rows(path, entry, TABLE_DTYPE)
        return cls(rows, [layout.record_bytes for layout in layouts])

    @classmethod
    def of(cls, entries: Iterable[ShardEntry], layouts: Sequence[Layout]) -> Self:
        """Returns a table in memory. Raises ValueError for an entry that has no row."""
        rows = [_row_of(entry) for entry in entries]
        return cls(np.array(rows, TABLE_DTYPE), [layout.record_bytes for layout in layouts])

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """Number of each shard (shards,), ascending."""
        return self.rows["number"].astype(np.int64)

    @cached_property
    def layouts(self) -> NDArray[np.int64]:
        """Index of each shard's layout (shards,)."""
        return self.rows["layout"].astype(np.int64)

    @cached_property
    def records(self) -> NDArray[np.int64]:
        """Number of records of each shard (shards,)."""
        return self.rows["records"].astype(np.int64)

    @cached_property
    def bytes(self) -> NDArray[np.int64]:
        """Size of each shard (shards,)."""
        used = self.records * np.array(self._record_bytes, np.int64)[self.layouts]
        used += 2 * BLOCK_BYTES
        return -(-used // TAR_RECORD_BYTES) * TAR_RECORD_BYTES

    def find(self, names: Iterable[str]) -> list[int]:
        """Returns the indices of the shards among some file names, in that order."""
        numbers = [number for name in names if (number := shard_number(name)) is not None]
        places = np.searchsorted(self.numbers, numbers)
        return [
            int(place)
            for place, number in zip(places, numbers, strict=True)
            if place < len(self) and self.numbers[place] == number
        ]

    def check(self, path: Path) -> None:
        """Raises FormatError if a row contradicts the layouts or the other rows."""
        if not len(self.rows):
            raise FormatError(f"{path}: shards: expected at least one, found none")
        last = len(self._record_bytes) - 1
        self._require(path, self.rows["layout"] <= last, "layout", f"0 to {last}")
        self._require(path, self.rows["records"] >= 1, "records", "at least 1")
        later = self.rows["number"][1:] > self.rows["number"][:-1]
        self._require(path, np.append(True, later), "number", "ascending numbers")
        sizes = np.array(self._record_bytes, np.float64)[self.rows["layout"]]
        if not sizes @ self.rows["records"].astype(np.float64) < MAX_BYTES:
            raise FormatError(f"{path}: shards: expected fewer than {MAX_BYTES} bytes, found more")

    def _require(self, path: Path, is_right: NDArray[np.bool_], column: str, what: str) -> None:
        if not is_right.all():
            row = self.rows[int(np.argmin(is_right))]
            place = f"{path}: shard {shard_name(int(row['number']))!r}: {column}"
            raise FormatError(f"{place}: expected {what}, found {row[column]}")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[ShardEntry]: ...

    def __getitem__(self, index: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number, layout, records, sha256 = self.rows[index].item()
        return ShardEntry(
            name=shard_name(number),
            bytes=int(self.bytes[index]),
            sha256=sha256.hex(),
            layout=layout,
            records=records,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.rows.tobytes() == other.rows.tobytes()

    def __hash__(self) -> int:
        return hash(self.rows.tobytes())

    def __reduce__(self) -> Any:
        # The rows, because the mapped file may be gone when they are loaded again.
        return type(self), (np.array(self.rows), self._record_bytes)


def _row_of(entry: ShardEntry) -> tuple[int, int, int, bytes]:
    number = shard_number(entry.name)
    numbers = (number, entry.layout, entry.records)
    if number is None or not 0 <= entry.layout < 2**32 or not 0 <= entry.records < 2**63:
        raise ValueError(f"name, layout and records {(entry.name, *numbers[1:])}")
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise ValueError(f"sha256 {entry.sha256!r} of {entry.name}")
    return number, entry.layout, entry.records, bytes.fromhex(entry.sha256)


def map_rows(path: Path, entry: FileEntry, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Maps a one-dimensional .npy file. Raises FormatError for another size, hash or header."""
    try:
        with path.open("rb") as file:
            header = file.read(len(npy_header(dtype, (0,))))
            size = path.stat().st_size
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FormatError(f"{path}: missing, expected a file of {entry.bytes} bytes") from None
    num_rows = max(size - len(header), 0) // dtype.itemsize
    expected = npy_header(dtype, (num_rows,))
    if size != entry.bytes:
        raise FormatError(f"{path}: expected {entry.bytes} bytes, found {size}")
    if found != entry.sha256:
        raise FormatError(
            f"{path}: sha256: expected {entry.sha256}, found {found}: the file changed after it "
            "was written"
        )
    if header != expected or size != len(header) + num_rows * dtype.itemsize or not num_rows:
        raise FormatError(
            f"{path}: expected array header {expected!r} and at least one row, found {header!r}"
        )
    return np.memmap(path, dtype, "r", offset=len(header), shape=(num_rows,))
