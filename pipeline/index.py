"""The source's records, listed once into a private file on disk, so that memory stays flat.

A record takes some hundred bytes there and none in memory; SQLite finds those of a shard again.
The file has no name: it is gone with the process, however that ends, and a rerun lists anew. What
decides the content of the shards is hashed on the way. The price is listing twice as slowly as
into a list in memory: some 30,000 records a second.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from latent_t2i.pipeline.images import Picture
from latent_t2i.pipeline.sources.locators import (
    FileLocator,
    locator_from_json,
    locator_name,
    locator_to_json,
)
from latent_t2i.pipeline.sources.record import Record, make_meta
from latent_t2i.shards.schema import encode_meta, hash_json

HUGE = Picture(
    pixels=np.zeros((0, 0, 3), np.uint8),
    source_size_px=(2**31, 2**31),
    crop_px=(2**31, 2**31, 2**31, 2**31),
)
"""Stands for any image when room for its JSON is reserved."""
CHUNK_RECORDS = 1024
"""Records are examined so many at a time."""
TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -65536;
    CREATE TABLE keys (key TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE records (
        number INTEGER PRIMARY KEY, bucket TEXT, num_captions INTEGER, meta_bytes INTEGER,
        key TEXT, place TEXT, captions TEXT, extra TEXT
    );
    CREATE INDEX groups ON records (bucket, num_captions, number);
"""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a record beside what the source tells."""

    num_cut: int
    """Captions with more tokens than are kept."""
    bucket: str
    """The set that it goes into; empty where there is one only."""
    problem: str | None
    """Why it cannot be used."""


Examine = Callable[[Sequence[Record]], Sequence[Examined]]


class Index:
    """The records of a source, by their number in its order."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(TABLES)
        self._digest = hashlib.sha256()
        self.num_source = 0
        self.num_captions = 0
        self.num_cut = 0
        self.quarantined: dict[str, str] = {}
        """Those that are in no group, by key, with the reason."""
        self.missing: dict[str, str] = {}
        """Those whose file is not there now: each stays in its group, as it may come yet."""

    def close(self) -> None:
        """Lets go of the file."""
        self._db.close()

    @property
    def sha256(self) -> str:
        """The hash of all that the source tells; the images' content is not read for it."""
        return self._digest.hexdigest()

    def add(self, records: Sequence[Record], examined: Sequence[Examined]) -> None:
        """Lists records after those that are there."""
        self._db.execute("BEGIN")
        for record, found in zip(records, examined, strict=True):
            self._add(record, found)
        self._db.execute("COMMIT")

    def groups(self) -> list[tuple[str, int]]:
        """Returns each bucket and number of captions that there are, sorted."""
        query = "SELECT DISTINCT bucket, num_captions FROM records ORDER BY bucket, num_captions"
        return list(self._db.execute(query))

    def sizes(self, bucket: str, num_captions: int) -> Iterator[tuple[int, int]]:
        """Yields the number and the most JSON bytes of each record of a group, in order."""
        query = (
            "SELECT number, meta_bytes FROM records "
            "WHERE bucket = ? AND num_captions = ? ORDER BY number"
        )
        yield from self._db.execute(query, (bucket, num_captions))

    def records(self, bucket: str, num_captions: int, first: int, last: int) -> list[Record]:
        """Returns a group's records of the numbers `first` to `last`, both included, in order."""
        query = (
            "SELECT key, place, captions, extra FROM records "
            "WHERE bucket = ? AND num_captions = ? AND number BETWEEN ? AND ? ORDER BY number"
        )
        return list(map(_record, self._db.execute(query, (bucket, num_captions, first, last))))

    def captions(self, most: int) -> list[str]:
        """Returns at most so many distinct captions, of records evenly spaced in the order."""
        (total,) = self._db.execute("SELECT count(*) FROM records").fetchone()
        step = max(total // most, 1)
        query = "SELECT captions FROM (SELECT captions, row_number() OVER (ORDER BY number) - 1 AS "
        query += "place FROM records) WHERE place % ? = 0"
        per_record = 1 if step > 1 else most
        found = dict.fromkeys(
            caption
            for (text,) in self._db.execute(query, (step,))
            for caption in json.loads(text)[:per_record]
        )
        return _spaced(list(found), most)

    def _add(self, record: Record, found: Examined) -> None:
        number = self.num_source
        self.num_source += 1
        told = [
            record.key,
            locator_name(record.locator),
            record.captions,
            record.extra,
            found.bucket,
        ]
        self._digest.update(bytes.fromhex(hash_json(told)))
        is_new = self._db.execute("INSERT OR IGNORE INTO keys VALUES (?)", (record.key,)).rowcount
        if not is_new:
            self.quarantined[f"{record.key}#{number}"] = f"another record has the key {record.key}"
            return
        problem = found.problem or (None if record.captions else "no caption")
        if problem:
            self.quarantined[record.key] = problem
            return
        if isinstance(record.locator, FileLocator) and not Path(record.locator.path).exists():
            self.missing[record.key] = "missing file"
        self.num_captions += len(record.captions)
        self.num_cut += found.num_cut
        row = (
            number,
            found.bucket,
            len(record.captions),
            most_meta_bytes(record),
            record.key,
            json.dumps(locator_to_json(record.locator)),
            json.dumps(record.captions),
            json.dumps(record.extra),
        )
        self._db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def build_index(
    records: Iterable[Record], examine: Examine, progress: Callable[[int], object]
) -> Index:
    """Lists a source. Raises ValueError if it is empty, and what the source raises."""
    index = Index()
    remaining = iter(records)
    while chunk := list(islice(remaining, CHUNK_RECORDS)):
        index.add(chunk, examine(chunk))
        progress(len(chunk))
    if not index.num_source:
        raise ValueError("the source has no images")
    return index


def most_meta_bytes(record: Record) -> int:
    """Returns the size of a record's JSON if all captions were cut and the image were huge."""
    everything = range(len(record.captions))
    return len(encode_meta(make_meta(record, truncated=everything, picture=HUGE)))


def _record(row: tuple[str, str, str, str]) -> Record:
    key, locator, captions, extra = row
    return Record(
        key=key,
        locator=locator_from_json(json.loads(locator)),
        captions=tuple(json.loads(captions)),
        extra=json.loads(extra),
    )


def _spaced(items: list[str], most: int) -> list[str]:
    num = min(most, len(items))
    return [items[index * len(items) // num] for index in range(num)]
