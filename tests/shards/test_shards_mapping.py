"""Region maps files side by side, read-only, and unmaps them again."""

import gc
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latent_t2i.model.paths import ROOT
from latent_t2i.shards.mapping import Region


def make_files(folder: Path, sizes: list[int]) -> list[Path]:
    """Writes files of random bytes."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(rng.bytes(size))
    return paths


def bytes_of(region: Region, index: int) -> bytes:
    """Returns the bytes at a file's addresses."""
    start = region.starts[index]
    return region.bytes[start : start + region.sizes[index]].tobytes()


def test_files_are_mapped_at_their_addresses(tmp_path: Path) -> None:
    sizes = [1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 10_240]
    paths = make_files(tmp_path, sizes)
    region = Region(sizes)
    assert not region.is_mapped.any()
    for index in (2, 0, 3, 1):
        region.map(index, paths[index])
    assert region.is_mapped.all()
    for index, path in enumerate(paths):
        assert bytes_of(region, index) == path.read_bytes()
    assert (region.starts % mmap.PAGESIZE == 0).all()


def test_unmapped_addresses_can_be_reused(tmp_path: Path) -> None:
    first, second = make_files(tmp_path, [5000, 5000])
    region = Region([5000, 5000])
    region.map(0, first)
    region.map(1, second)
    region.unmap(0)
    assert region.is_mapped.tolist() == [False, True]
    assert bytes_of(region, 1) == second.read_bytes()
    region.map(0, second)
    assert bytes_of(region, 0) == second.read_bytes()


def test_no_file_stays_open(tmp_path: Path) -> None:
    opened = Path("/proc/self/fd")
    if not opened.is_dir():
        pytest.skip("open files are counted in /proc")
    (path,) = make_files(tmp_path, [100])
    before = len(list(opened.iterdir()))
    regions = [Region([100]) for _ in range(50)]
    for region in regions:
        region.map(0, path)
    assert len(list(opened.iterdir())) == before


def test_deleted_file_stays_readable(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, [9000])
    content = path.read_bytes()
    region = Region([9000])
    region.map(0, path)
    path.unlink()
    assert bytes_of(region, 0) == content


def test_mapping_lives_as_long_as_its_bytes(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, [9000])
    region = Region([9000])
    region.map(0, path)
    view = region.bytes[:9000]
    del region
    gc.collect()
    assert view.tobytes() == path.read_bytes()


def test_reserving_needs_no_memory() -> None:
    region = Region([2**30] * 1000)  # a terabyte
    assert len(region.bytes) == 1000 * 2**30


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Region([10]).map(0, tmp_path / "nowhere")


@pytest.mark.parametrize("use", ["region.bytes[0]", "region.bytes.__setitem__(4096, 1)"])
def test_bad_memory_access_ends_the_process(tmp_path: Path, use: str) -> None:
    """Neither reading unmapped addresses nor writing to a file is possible."""
    make_files(tmp_path, [10, 4096])
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from shards.mapping import Region\n"
        f"region = Region([10, 4096]); region.map(1, Path({str(tmp_path / '1')!r}))\n"
        f"{use}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode < 0, "ended by a signal"
