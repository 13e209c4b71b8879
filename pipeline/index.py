"""The source's records, listed once into a temporary SQLite file, so that memory stays flat.

The file is unnamed: it disappears with the process, and a rerun lists the source again. Listing
also computes the hash of everything that determines the content of the shards. The cost: listing
is half as fast as into a list in memory, at about 30,000 records per second.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from latent_t2i.pipeline.images import Picture
from latent_t2i.pipeline.sources.locators import (
    FileLocator,
    ImageLocator,
    changed_ns,
    locator_from_json,
    locator_name,
    locator_to_json,
)
from latent_t2i.pipeline.sources.record import Record, make_meta
from latent_t2i.shards.schema import encode_meta

LARGEST_PICTURE = Picture(
    pixels=np.zeros((0, 0, 0, 3), np.uint8),
    source_size_px=(2**31, 2**31),
    crops_px=((2**31, 2**31, 2**31, 2**31),),
    sha256="0" * 64,
)
"""An image whose sizes have the most characters in a record's JSON."""
CHUNK_RECORDS = 1024
"""Records are checked and inserted in chunks of this size."""
NO_SHARD = -1
"""The shard of records that this run does not write."""
# No journal and no sync: nothing reads the file after a crash.
TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -65536;
    CREATE TABLE keys (key TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
    CREATE TABLE records (
        number INTEGER PRIMARY KEY, bucket TEXT, num_captions INTEGER, meta_bytes INTEGER,
        key TEXT, locator TEXT, captions TEXT, extra TEXT, token_ids TEXT, shard INTEGER
    );
    CREATE INDEX groups ON records (bucket, num_captions, shard, number);
"""


@dataclass(frozen=True, kw_only=True)
class RecordCheck:
    """The result of checking a record."""

    token_ids: Sequence[Sequence[int]]
    """Of each caption, not truncated."""
    num_cut: int
    """Captions with more tokens than are kept."""
    bucket: str
    """The bucket of the image; empty without buckets."""
    problem: str | None
    """Why the record cannot be used."""


class TokenizedRecord(NamedTuple):
    """A record with the token ids of each caption."""

    record: Record
    token_ids: Sequence[Sequence[int]]


CheckRecords = Callable[[Sequence[Record]], Sequence[RecordCheck]]


class Index:
    """The records of a source, by their number in its order."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # "": a temporary file
        self._db.executescript(TABLES)
        self._digest = hashlib.sha256()
        self.num_source = 0
        self.num_captions = 0
        self.num_cut = 0
        self.quarantined: dict[str, str] = {}
        """Records that are in no group, by key, with the reason."""
        self.newest_ns = 0
        """Time of the latest change of a local file with images."""
        self.missing: dict[str, str] = {}
        """Records whose file is missing. Each stays in its group: the file may be restored."""
        self._names: dict[str, str] = {}
        """File names of quarantined records."""
        self._archives: dict[str, int | None] = {}

    def close(self) -> None:
        """Deletes the file."""
        self._db.close()

    @property
    def sha256(self) -> str:
        """Hash of keys, file names, captions, extra fields and buckets; not of the images."""
        return self._digest.hexdigest()

    def add(self, records: Sequence[Record], checks: Sequence[RecordCheck]) -> None:
        """Appends records."""
        self._db.execute("BEGIN")
        for record, check in zip(records, checks, strict=True):
            self._add(record, check)
        self._db.execute("COMMIT")

    def groups(self) -> list[tuple[str, int]]:
        """Returns each combination of bucket and number of captions, sorted.

        Records that are assigned to a shard are ignored.
        """
        query = (
            "SELECT DISTINCT bucket, num_captions FROM records WHERE shard IS NULL "
            "ORDER BY bucket, num_captions"
        )
        return list(self._db.execute(query))

    def sizes(
        self, bucket: str, num_captions: int, shard: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yields the number and the maximum JSON bytes of each record of a group, in order.

        `shard` is that to which the records are assigned; None: to no shard yet.
        """
        query = (
            "SELECT number, meta_bytes FROM records "
            "WHERE bucket = ? AND num_captions = ? AND shard IS ? ORDER BY number"
        )
        yield from self._db.execute(query, (bucket, num_captions, shard))

    def records(
        self, bucket: str, num_captions: int, first: int, last: int, shard: int | None = None
    ) -> list[TokenizedRecord]:
        """Returns a group's records with numbers from `first` to `last` inclusive, in order.

        `shard` is as for `sizes`.
        """
        query = (
            "SELECT key, locator, captions, extra, token_ids FROM records "
            "WHERE bucket = ? AND num_captions = ? AND shard IS ? AND number BETWEEN ? AND ? "
            "ORDER BY number"
        )
        found = self._db.execute(query, (bucket, num_captions, shard, first, last))
        return list(map(_record, found))

    def find(self, keys: Iterable[str]) -> Iterator[Record | None]:
        """Yields the usable record with each key; None where the source has none."""
        query = (
            "SELECT key, locator, captions, extra, token_ids FROM keys JOIN records "
            "USING (number, key) WHERE key = ?"
        )
        for key in keys:
            row = self._db.execute(query, (key,)).fetchone()
            yield row and _record(row).record

    def assign(self, keys: Iterable[str], shard: int | None) -> None:
        """Assigns records to a shard of a finished set, to NO_SHARD, or to none yet."""
        query = (
            "UPDATE records SET shard = ? WHERE number = (SELECT number FROM keys WHERE key = ?)"
        )
        self._db.execute("BEGIN")
        self._db.executemany(query, ((shard, key) for key in keys))
        self._db.execute("COMMIT")

    def unassigned(self, num: int) -> tuple[int, list[str]]:
        """Returns the number of records that are assigned to no shard, and the first keys."""
        (total,) = self._db.execute("SELECT count(*) FROM records WHERE shard IS NULL").fetchone()
        query = "SELECT key FROM records WHERE shard IS NULL ORDER BY number LIMIT ?"
        return total, [key for (key,) in self._db.execute(query, (num,))]

    def close_unassigned(self) -> None:
        """Assigns all records without a shard to NO_SHARD."""
        self._db.execute("UPDATE records SET shard = ? WHERE shard IS NULL", (NO_SHARD,))

    def sample_captions(self, num: int) -> dict[str, list[int]]:
        """Returns the token ids of up to `num` distinct captions, evenly spaced in the order."""
        (total,) = self._db.execute("SELECT count(*) FROM records").fetchone()
        step = max(total // num, 1)
        query = (
            "SELECT captions, token_ids FROM (SELECT captions, token_ids, "
            "row_number() OVER (ORDER BY number) - 1 AS position FROM records) "
            "WHERE position % ? = 0"
        )
        per_record = 1 if step > 1 else num
        found: dict[str, list[int]] = {}
        for captions, token_ids in self._db.execute(query, (step,)):
            pairs = zip(json.loads(captions), json.loads(token_ids), strict=True)
            found |= dict(islice(pairs, per_record))
        items = list(found.items())
        num = min(num, len(items))
        return dict(items[index * len(items) // num] for index in range(num))

    def by_file_name(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Returns reasons by key as reasons by file name, or by key where names are not unique."""
        query = "SELECT extra, locator FROM records JOIN keys USING (number) WHERE keys.key = ?"
        named: dict[str, str] = {}
        for key, reason in reasons.items():
            row = self._db.execute(query, (key,)).fetchone()
            name = _file_name(*map(json.loads, row)) if row else self._names.get(key, key)
            named[key if name in named else name] = reason
        return named

    def _add(self, record: Record, check: RecordCheck) -> None:
        number = self.num_source
        self.num_source += 1
        captions, extra = _dump(record.captions), _dump(record.extra)
        self._hash(record, captions, check)
        query = "INSERT OR IGNORE INTO keys VALUES (?, ?)"
        is_new = self._db.execute(query, (record.key, number)).rowcount  # 0 for a duplicate key
        key, problem = record.key, check.problem or (None if record.captions else "no caption")
        if not is_new:
            key, problem = f"{key}#{number}", f"another record has the key {key}"
        if problem:
            self.quarantined[key] = problem
            self._names[key] = _file_name(record.extra, locator_to_json(record.locator))
            return
        changed_ns = self._changed_ns(record.locator)
        self.newest_ns = max(self.newest_ns, changed_ns or 0)
        if isinstance(record.locator, FileLocator) and changed_ns is None:
            self.missing[record.key] = "missing file"
        self.num_captions += len(record.captions)
        self.num_cut += check.num_cut
        row = (
            number,
            check.bucket,
            len(record.captions),
            _max_meta_bytes(len(record.captions), captions, extra),
            record.key,
            _dump(locator_to_json(record.locator)),
            captions,
            extra,
            _dump(check.token_ids),
            None,
        )
        self._db.execute(f"INSERT INTO records VALUES ({', '.join('?' * len(row))})", row)

    def _changed_ns(self, locator: ImageLocator) -> int | None:
        """Returns `changed_ns`, from one look-up per archive."""
        if isinstance(locator, FileLocator):
            return changed_ns(locator)
        if locator.url not in self._archives:
            self._archives[locator.url] = changed_ns(locator)
        return self._archives[locator.url]

    def _hash(self, record: Record, captions: str, check: RecordCheck) -> None:
        """Updates the hash with what determines the record's content in the shard."""
        before = _dump([record.key, locator_name(record.locator)])[:-1]
        extra = json.dumps(record.extra, sort_keys=True, separators=(",", ":"))
        # Whether a record is usable moves those after it to other shards.
        usable = ',"unusable"]' if check.problem else "]"
        content = f"{before},{captions},{extra},{_dump(check.bucket)}{usable}"
        # Sorted keys and ASCII, as in `hash_json`: the hash is the same as in older releases.
        ascii_only = re.sub(r"[^ -~]", lambda found: json.dumps(found[0])[1:-1], content)
        self._digest.update(hashlib.sha256(ascii_only.encode()).digest())


def build_index(
    records: Iterable[Record], check: CheckRecords, progress: Callable[[int], object]
) -> Index:
    """Lists a source. Raises whatever the source raises."""
    index = Index()
    remaining = iter(records)
    while chunk := list(islice(remaining, CHUNK_RECORDS)):
        index.add(chunk, check(chunk))
        progress(len(chunk))
    return index


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _file_name(extra: Mapping[str, Any], locator: list[Any]) -> str:
    return str(extra.get("file_name") or locator_name(locator_from_json(locator)))


def _max_meta_bytes(num_captions: int, captions: str, extra: str) -> int:
    """Returns the size of a record's JSON with all captions truncated and the largest image.

    `captions` and `extra` are JSON already, so only the other fields are encoded here.
    """
    inner = f"{captions[1:-1]}{extra[1:-1]}" + ("," if extra != "{}" else "")
    return _bytes_without_captions(num_captions) + len(inner.encode())


@cache
def _bytes_without_captions(num_captions: int) -> int:
    record = Record(key="", locator=FileLocator(""), captions=(), extra={})
    truncated = range(num_captions)
    return len(encode_meta(make_meta(record, truncated=truncated, picture=LARGEST_PICTURE)))


def _record(row: tuple[str, str, str, str, str]) -> TokenizedRecord:
    key, locator, captions, extra, token_ids = row
    record = Record(
        key=key,
        locator=locator_from_json(json.loads(locator)),
        captions=tuple(json.loads(captions)),
        extra=json.loads(extra),
    )
    return TokenizedRecord(record, json.loads(token_ids))
