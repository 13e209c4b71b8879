"""The index returns the source's records unchanged and in order, and accounts for each."""

import hashlib
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from latent_t2i.pipeline.index import (
    CHUNK_RECORDS,
    LARGEST_PICTURE,
    Index,
    RecordCheck,
    build_index,
)
from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.sources.record import Record, make_meta
from latent_t2i.shards.schema import encode_meta, hash_json

ODD = ('\x7f \n\t " \\', "é 漢字 🐕", "\u2028</w>")


def make_record(number: int, num_captions: int = 2, **changes: object) -> Record:
    record = Record(
        key=f"{number:06d}",
        locator=FileLocator(f"none/{number}.jpg"),
        captions=tuple(f"caption {number} {index}" for index in range(num_captions)),
        extra={"file_name": f"{number}.jpg"},
    )
    return replace(record, **changes)


def check(records: Sequence[Record]) -> list[RecordCheck]:
    return [
        RecordCheck(
            token_ids=[[len(caption)] for caption in record.captions],
            num_cut=1,
            bucket="",
            problem=record.problem,
        )
        for record in records
    ]


def max_meta_bytes(record: Record) -> int:
    everything = range(len(record.captions))
    return len(encode_meta(make_meta(record, truncated=everything, picture=LARGEST_PICTURE)))


def list_all(records: Sequence[Record]) -> Index:
    return build_index(iter(records), check, lambda number: None)


def test_records_are_returned_unchanged() -> None:
    records = [make_record(number, 1 + number % 3) for number in range(CHUNK_RECORDS + 7)]
    index = list_all(records)
    assert index.groups() == [("", 1), ("", 2), ("", 3)]
    assert index.num_source == len(records)
    assert index.num_captions == sum(len(record.captions) for record in records)
    assert index.num_cut == len(records)
    for count in (1, 2, 3):
        group = [record for record in records if len(record.captions) == count]
        sizes = list(index.sizes("", count))
        numbers = [number for number, _ in sizes]
        assert [records[number] for number in numbers] == group
        assert [size for _, size in sizes] == [max_meta_bytes(record) for record in group]
        found = index.records("", count, numbers[3], numbers[8])
        assert [item.record for item in found] == group[3:9]
        lengths = [[[len(caption)] for caption in record.captions] for record in group[3:9]]
        assert [item.token_ids for item in found] == lengths
    index.close()


def test_each_record_is_listed_or_quarantined_with_its_reason(tmp_path: Path) -> None:
    there = tmp_path / "there.jpg"
    there.touch()
    index = list_all(
        [
            make_record(0, locator=FileLocator(str(there))),
            make_record(1, 0),
            make_record(2, problem="caption is not UTF-8"),
            make_record(0, 3),
            make_record(4),
        ]
    )
    assert index.quarantined == {
        "000001": "no caption",
        "000002": "caption is not UTF-8",
        "000000#3": "another record has the key 000000",
    }
    assert index.missing == {"000004": "missing file"}  # but listed: it may be restored
    assert index.groups() == [("", 2)]
    assert index.num_source == 5


def test_reasons_name_files() -> None:
    records = [make_record(0), make_record(1, 0), make_record(0, extra={}), make_record(3)]
    records[3] = make_record(3, extra={"file_name": "1.jpg"})  # not unique
    index = list_all(records)
    reasons = {"000000": "a", "000001": "b", "000000#2": "c", "000003": "d", "none": "e"}
    names = {"0.jpg": "a", "1.jpg": "b", "000000#2": "c", "000003": "d", "none": "e"}
    assert index.by_file_name(reasons) == names


def hash_of(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        assert isinstance(record.locator, FileLocator)
        name = Path(record.locator.path).name
        document = [record.key, name, record.captions, record.extra, ""]
        digest.update(bytes.fromhex(hash_json(document)))
    return digest.hexdigest()


def test_the_hash_depends_on_everything_but_the_folder() -> None:
    records = [make_record(0, captions=ODD), make_record(1, extra={"b": 1, "a": [ODD]})]
    records.append(make_record(2))
    first = records[0]
    variants = [
        records,
        records[1:],
        [*records[1:], first],
        [replace(first, captions=("other",)), *records[1:]],
        [replace(first, extra={"image_id": 7}), *records[1:]],
        [replace(first, locator=FileLocator("other.png")), *records[1:]],
        [replace(first, problem="no image in this row"), *records[1:]],
    ]
    assert len({list_all(variant).sha256 for variant in variants}) == len(variants)
    assert list_all(records).sha256 == hash_of(records)
    moved = [
        replace(record, locator=FileLocator(f"/moved/{Path(record.locator.path).name}"))
        for record in records
        if isinstance(record.locator, FileLocator)
    ]
    assert list_all(moved).sha256 == list_all(records).sha256


def test_a_sample_of_captions_is_spread_over_the_source() -> None:
    index = list_all([make_record(number) for number in range(3000)])
    sample = list(index.sample_captions(100))
    assert len(sample) == len(set(sample)) == 100
    numbers = [int(caption.split()[1]) for caption in sample]
    assert numbers == sorted(numbers)
    assert numbers[0] < 60 and numbers[-1] > 2900
    assert len(index.sample_captions(10**6)) == 6000
    same = list_all([make_record(number, captions=("one",)) for number in range(5)])
    assert same.sample_captions(3) == {"one": [3]}


@pytest.mark.parametrize("extra", [{}, {"a": ODD[1]}])
def test_space_is_reserved_for_any_outcome(extra: dict[str, str]) -> None:
    record = make_record(0, captions=ODD, extra=extra)
    index = list_all([record])
    assert list(index.sizes("", 3)) == [(0, max_meta_bytes(record))]
    (found,) = index.records("", 3, 0, 0)
    assert found.record == record


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """This many records would take 100 MB as a list."""

    def many() -> Iterator[Record]:
        for number in range(60_000):
            yield make_record(number, captions=tuple(f"{number} {'x' * 100}" for _ in range(5)))

    list_all([make_record(0)]).close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = build_index(many(), check, lambda number: None)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    index.missing.clear()
    assert grown < 90_000  # kB, of which SQLite's cache may take 64,000
    assert index.num_source == 60_000
    index.close()
