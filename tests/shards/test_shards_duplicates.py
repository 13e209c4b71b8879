"""Repeated images are found by their hashes, and reported as a note."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latent_t2i.shards import duplicates, verify
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.duplicates import compare_images, find_duplicates
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example
from latent_t2i.shards.summary import summarise
from tests.shard_sets import make_examples, run_main, write_set


def hash_of(image: int) -> str:
    return hashlib.sha256(str(image).encode()).hexdigest()


def showing(images: Sequence[int], seed: int) -> list[Example]:
    """Returns one example per image, given by number, with the hashes of their files."""
    examples = make_examples(len(images), seed=seed, num_captions=1 + seed)
    return [
        replace(example, meta={"image_sha256": hash_of(image)} | dict(example.meta))
        for example, image in zip(examples, images, strict=True)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of different layouts; the images 1 and 2 occur twice and three times."""
    write_set(tmp_path / "set", [showing([1, 2, 3, 1], 0), showing([2, 4, 2, 5, 6], 1)])
    return tmp_path / "set"


def test_hashes_are_those_in_the_json(folder: Path) -> None:
    shards = open_shards(folder)
    records = np.array([8, 0, 4])
    found = shards.image_hashes(records)
    assert found is not None
    assert [text.decode() for text in found.tolist()] == [hash_of(6), hash_of(1), hash_of(2)]
    assert [shards.meta(r)["image_sha256"] for r in records] == [hash_of(n) for n in (6, 1, 2)]


def test_records_that_repeat_an_earlier_image_are_counted(folder: Path) -> None:
    found = find_duplicates(folder)
    assert found is not None
    assert (found.num, found.num_compared, found.num_records) == (3, 9, 9)
    keys = open_shards(folder).keys(np.arange(9))
    pairs = [(keys[3], keys[0]), (keys[4], keys[1]), (keys[6], keys[1])]
    assert found.examples == tuple(pairs)
    first, *_ = pairs
    assert str(found).startswith(f"3 records repeat the image of another: {first[0]} = {first[1]},")


def test_sets_are_compared_with_each_other(tmp_path: Path) -> None:
    write_set(tmp_path / "one", [showing([1, 2], 0)])
    write_set(tmp_path / "two", [showing([3, 1], 1)])
    sets = [open_shards(tmp_path / name) for name in ("one", "two")]
    found = compare_images(sets)
    assert found is not None and found.count() == "1 record repeats the image of another"
    assert found.examples == ((sets[1].keys(np.array([1]))[0], sets[0].keys(np.array([0]))[0]),)


def test_buckets_are_compared(tmp_path: Path) -> None:
    for seed, name in enumerate(("64x64", "64x128")):
        size = (8, 8) if seed == 0 else (16, 8)
        examples = [
            replace(example, latent=make_examples(1, size=size)[0].latent)
            for example in showing([1, 2, 1], seed)
        ]
        write_set(tmp_path / name, [examples])
    finish_buckets(tmp_path, ["64x64", "64x128"], quarantined={})
    found = find_duplicates(tmp_path)
    assert found is not None and (found.num, found.num_compared) == (4, 6)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_large_set_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(duplicates, "MAX_COMPARED", 5)  # records 0, 2, 4, 6, 8
    monkeypatch.setattr(duplicates, "CHUNK_RECORDS", chunk)
    found = find_duplicates(folder)
    assert found is not None and (found.num, found.num_compared) == (1, 5)
    assert found.count() == "1 record repeats the image of another (compared: 5 of 9)"


def test_records_without_hashes_are_not_compared(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [showing([1, 1], 0), make_examples(2, seed=1)])
    assert find_duplicates(tmp_path / "set") is None


def test_verify_and_summary_report_them_as_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(verify, monkeypatch, folder, "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note: 3 records repeat the image of another: ")
    assert lines[1].endswith("9 records in 2 shards, no faults")
    text = " ".join(" ".join(summarise(folder, num_sample=9, num_captions=0)).split())
    assert "duplicates 3 records repeat the image of another: " in text
