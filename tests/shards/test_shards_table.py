"""The shard table: a sequence of entries and numpy columns, whatever the number of shards."""

import hashlib
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from latent_t2i.shards.layout import FileEntry, make_layout
from latent_t2i.shards.shard_table import (
    TABLE_DTYPE,
    ShardEntry,
    ShardTable,
    shard_name,
    shard_number,
)

LAYOUTS = [
    make_layout(latent=(1, 8, 2, 2), text=(captions, 3, 4), json_bytes=512) for captions in (1, 9)
]
NUM_MANY = 200_000


def write_table(path: Path, num_shards: int) -> FileEntry:
    """Writes a table with numbers 0, 2, 4, ... and both layouts in turn."""
    rows = np.zeros(num_shards, TABLE_DTYPE)
    rows["number"] = 2 * np.arange(num_shards)
    rows["layout"] = np.arange(num_shards) % 2
    rows["records"] = 1 + np.arange(num_shards) % 7
    rows["sha256"] = b"\x00" + b"\xab" * 30 + b"\x00"  # zeros at both ends belong to the hash
    np.save(path, rows)
    content = path.read_bytes()
    return FileEntry(name=path.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def table(tmp_path: Path) -> ShardTable:
    entry = write_table(tmp_path / "shards.npy", 10)
    return ShardTable.open(tmp_path / entry.name, entry, LAYOUTS)


def test_entries_and_columns(table: ShardTable, tmp_path: Path) -> None:
    table.check(tmp_path)
    entries = list(table)
    assert len(table) == len(entries) == 10
    assert entries[3] == ShardEntry(
        name="shard-000006.tar",
        bytes=LAYOUTS[1].shard_bytes(4),
        sha256="00" + 30 * "ab" + "00",
        layout=1,
        records=4,
    )
    assert table[-1] == entries[9]
    assert table[2:8:3] == entries[2:8:3]
    with pytest.raises(IndexError):
        table[10]
    assert table.numbers.tolist() == list(range(0, 20, 2))
    assert table.records.tolist() == [entry.records for entry in entries]
    assert table.layouts.tolist() == [entry.layout for entry in entries]
    assert table.bytes.tolist() == [entry.bytes for entry in entries]


def test_same_table_from_entries_and_from_pickle(table: ShardTable, tmp_path: Path) -> None:
    content = pickle.dumps(table)
    (tmp_path / "shards.npy").unlink()
    for other in (ShardTable.of(list(table), LAYOUTS), pickle.loads(content)):
        assert other == table and list(other) == list(table)
        assert hash(other) == hash(table)
    assert ShardTable.of(table[:9], LAYOUTS) != table


def test_find_ignores_other_names(table: ShardTable) -> None:
    names = ["shard-000004.tar", "manifest.json", "shard-000005.tar", "shard-000000.tar", "shard-1"]
    assert table.find(names) == [2, 0]
    assert table.find(["shard-999999.tar"]) == table.find([]) == []


@pytest.mark.parametrize("number", [0, 123, 999_999, 1_000_000, 123_456_789])
def test_names_of_shards(number: int) -> None:
    assert shard_number(shard_name(number)) == number


@pytest.mark.parametrize("name", ["shard-1.tar", "shard-0000001.tar", "shard-000001.tar2", "x"])
def test_other_names(name: str) -> None:
    assert shard_number(name) is None


def test_many_shards_open_without_an_object_each(tmp_path: Path) -> None:
    entry = write_table(tmp_path / "shards.npy", NUM_MANY)
    start = time.process_time()
    table = ShardTable.open(tmp_path / entry.name, entry, LAYOUTS)
    table.check(tmp_path)
    assert table.bytes.sum() > 0
    assert time.process_time() - start < 1
    assert table[NUM_MANY - 1].name == "shard-399998.tar"
