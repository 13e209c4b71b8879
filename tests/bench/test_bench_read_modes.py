"""The slow file system holds the files of its folder, and is read with positioned reads."""

import time
from pathlib import Path

import numpy as np
import pytest

from bench import read_modes
from bench.loaders.slow_files import can_mount, mounted
from latent_t2i.shards.filesystems import file_system
from latent_t2i.shards.reader import open_shards
from tests.shard_sets import assert_batches_equal, make_examples, write_set

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_mount(), reason="FUSE needs root and /dev/fuse"),
]


def test_shards_on_a_slow_file_system(tmp_path: Path) -> None:
    folder, point = tmp_path / "set", tmp_path / "mounted"
    point.mkdir()
    write_set(folder, [make_examples(5, seed=seed, views=2) for seed in range(3)])
    rng = np.random.default_rng(0)
    records, (caption_u, view_u) = rng.integers(0, 15, 40), rng.random((2, 40))
    expected = open_shards(folder).gather(records, caption_u, view_u)
    with mounted(folder, point, latency_ms=20):
        assert file_system(point) == "fuse.bench"
        assert (point / "shard-000001.tar").read_bytes() == (
            folder / "shard-000001.tar"
        ).read_bytes()
        assert not (point / "missing").exists()
        shards = open_shards(point)
        assert shards.read == "pread"
        assert_batches_equal([shards.gather(records, caption_u, view_u)], [expected])
        mapped = open_shards(point, read="map")
        assert_batches_equal([mapped.gather(records, caption_u, view_u)], [expected])
        began = time.perf_counter()
        open_shards(point, verify="full")
        assert time.perf_counter() - began > 0.02


def test_modes_are_compared(tmp_path: Path) -> None:
    content = read_modes.CONTENTS[1].resized(128)
    figures = read_modes.compare(content, (0.5,), tmp_path)
    assert {name: list(row) for name, row in figures.items()} == {
        "local": ["map", "pread"],
        "0.5_ms": ["map", "pread", "cache"],
    }
    assert all(row["second_epoch_per_s"] > 0 for row in figures["0.5_ms"].values())
