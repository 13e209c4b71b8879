"""Sets of format version 2, written by the release that had it (data/v2), are read as before."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from latent_t2i.shards.buckets import Buckets
from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.remote.cache import CachedShards, CacheLoader
from latent_t2i.shards.remote.store import open_store
from latent_t2i.shards.remote.stream import StreamLoader, open_streamed
from latent_t2i.shards.schema import FormatError, Manifest
from latent_t2i.shards.summary import summarise
from latent_t2i.shards.verify import verify
from latent_t2i.shards.writer import begin_set
from tests.shard_sets import (
    assert_batches_equal,
    collect,
    edit_json,
    make_examples,
    make_provenance,
    write_records_of_version_2,
)

DATA = Path(__file__).parent / "data" / "v2"
EXPECTED = json.loads((DATA / "expected.json").read_text())
"""Hashes of the sets, and of what that release gathered from `float16`."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the set, with two shards of two layouts and a quarantined image."""
    shutil.copytree(DATA / "float16", tmp_path / "set")
    return tmp_path / "set"


def test_version_2_is_sound_and_keeps_its_hash(folder: Path) -> None:
    assert not list(verify(folder))
    shards = open_shards(folder, verify="full")
    manifest = shards.manifest
    assert shards.sha256 == manifest.sha256 == EXPECTED["float16"]["sha256"]
    assert manifest.dump() == (folder / "manifest.json").read_text()
    assert (manifest.schema_version, manifest.num_quarantined, manifest.fields) == (2, 1, ())
    assert manifest.read_quarantined() == {"lost": "OSError: truncated"}
    assert [shard.name for shard in manifest.shards] == ["shard-000000.tar", "shard-000001.tar"]
    listed = json.loads((folder / "manifest.json").read_text())["shards"]
    assert [vars(shard) for shard in manifest.shards] == listed
    lines = list(summarise(folder, num_sample=9, num_captions=1))
    assert any("version 2, " in line for line in lines)
    assert any("OSError: truncated" in line for line in lines)


def test_version_2_gathers_the_same_values(folder: Path) -> None:
    shards = open_shards(folder)
    records = np.arange(len(shards))
    batch = shards.gather(records, records * 0.37 % 1, records * 0.61 % 1)
    for name in ("latent", "text"):
        content = getattr(batch, name).numpy().tobytes()
        assert hashlib.sha256(content).hexdigest() == EXPECTED["float16"][name], name


def test_version_2_is_cached(folder: Path, tmp_path: Path) -> None:
    shards = CachedShards(open_store(str(folder), tmp_path / "cache", 10**9))
    order = shards.order(batch_size=3, seed=0)
    mapped = MapLoader(shards=open_shards(folder), order=order)
    assert_batches_equal(
        collect(CacheLoader(shards=shards, order=order), 0, 4), collect(mapped, 0, 4)
    )
    assert shards.sha256 == EXPECTED["float16"]["sha256"]
    shards.close()


def test_version_2_streams(folder: Path) -> None:
    shards = open_streamed(str(folder))
    loader = StreamLoader(shards=shards, order=shards.order(batch_size=3, seed=0))
    out = loader.fill(0, loader.buffer())
    assert len(out.latent) == 3


def test_shards_of_version_3_have_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    new = write_records_of_version_2(tmp_path / "new")
    old = Manifest.load(folder)
    assert (new.shards, new.layouts) == (old.shards, old.layouts)
    assert new.latent_statistics == old.latent_statistics
    for shard in new.shards:
        assert (tmp_path / "new" / shard.name).read_bytes() == (folder / shard.name).read_bytes()


def test_stage_one_does_not_mistake_version_2_for_another_set(folder: Path) -> None:
    """A finished set of version 2 is kept, like any finished set."""
    provenance = make_provenance(max_tokens=5, preprocessing={"image_size_px": 32, "views": 2})
    assert begin_set(folder, provenance) == Manifest.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "part-0.tar"}, "expected names of the form shard-000000.tar, .*'part-0.tar'"),
        ({"sha256": "00"}, "hashes in hexadecimal, found sha256 '00' of shard-000000"),
        ({"bytes": 1}, r"bytes: expected 10240 for 2 records of this layout, found 1"),
        ({"layout": 2}, "layout: expected 0 to 1, found 2"),
        ({"layout": -1}, "indices of layouts"),
        ({"records": 0}, "records: expected at least 1, found 0"),
        ({"name": "shard-000001.tar"}, "number: expected ascending numbers, found 1"),
    ],
)
def test_inconsistent_version_2(folder: Path, change: dict[str, object], message: str) -> None:
    edit_json(folder / "manifest.json", lambda document: document["shards"][0].update(change))
    with pytest.raises(FormatError, match=message):
        open_shards(folder)


def test_version_2_without_shards(folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda document: document.update(shards=[]))
    with pytest.raises(FormatError, match="shards: expected at least one, found none"):
        open_shards(folder)


def test_record_of_an_image_that_version_2_has_as_quarantined(folder: Path) -> None:
    key = make_examples(1, num_captions=2)[0].key
    edit_json(folder / "manifest.json", lambda document: document.update(quarantined={key: "x"}))
    (fault,) = verify(folder)
    assert f"manifest.json: key {key!r}: expected no record of a quarantined image" in fault


def test_bucketed_set_of_version_1(tmp_path: Path) -> None:
    """Its list is of version 1, its sets are of version 2, and the text is int8."""
    folder = tmp_path / "set"
    shutil.copytree(DATA / "buckets", folder)
    assert not list(verify(folder))
    buckets = Buckets.load(folder)
    assert buckets.sha256 == EXPECTED["buckets"]["sha256"]
    assert buckets.dump() == (folder / "buckets.json").read_text()
    assert (buckets.num_quarantined, buckets.read_quarantined()) == (1, {"tiny": "too small"})
    assert list(summarise(folder, num_sample=9, num_captions=0))
