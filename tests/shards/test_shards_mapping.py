"""Region maps files into slots, read-only, and replaces the least recently used ones."""

import gc
import mmap
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch

from latent_t2i.model.paths import ROOT
from latent_t2i.shards import mapping
from latent_t2i.shards.mapping import Region, default_slots
from latent_t2i.shards.source import Part, Slots


def make_files(folder: Path, sizes: list[int]) -> list[Path]:
    """Writes files of random bytes."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(rng.bytes(size))
    return paths


def test_files_are_mapped_in_slots(tmp_path: Path) -> None:
    sizes = [1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 10_240]
    paths = make_files(tmp_path, sizes)
    region = Region(4, max(sizes))
    assert (region.slots.of < 0).all()
    for index in (2, 0, 3, 1):
        region.open(index, paths[index])
        assert region.start(index) % mmap.PAGESIZE == 0
    for index, path in enumerate(paths):
        assert region.read(index, 0, sizes[index]) == path.read_bytes()


def test_least_recently_used_file_is_replaced(tmp_path: Path) -> None:
    paths = make_files(tmp_path, [5000] * 4)
    region = Region(4, 5000, num_slots=2)
    region.open(0, paths[0])
    region.open(1, paths[1])
    region.slots.touch(np.array([0]))
    region.open(2, paths[2])
    assert [slot >= 0 for slot in region.slots.of] == [True, False, True, False]
    region.open(3, paths[3], replace=False)
    assert region.slots.of[3] < 0, "no room"
    region.close(0)
    region.open(3, paths[3], replace=False)
    for index in (2, 3):
        assert region.read(index, 0, 5000) == paths[index].read_bytes()


def test_open_and_close_twice_change_nothing(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, [5000])
    region = Region(2, 5000)
    region.open(1, path)
    slots = region.slots.of.copy()
    region.open(1, path)
    region.close(0)
    assert (region.slots.of == slots).all()


def test_pieces_need_no_more_files_than_slots() -> None:
    rng = np.random.default_rng(0)
    for num_slots in (1, 2, 5, 30):
        slots = Slots(30, num_slots)
        for size in (0, 1, 40):
            files = rng.integers(0, 30, size)
            pieces = list(slots.pieces(files))
            assert np.concatenate([files[:0], *(files[piece] for piece in pieces)]).tolist() == (
                files.tolist()
            )
            assert all(0 < len(set(files[piece])) <= num_slots for piece in pieces)
    assert list(Slots(3, 2).pieces(np.array([0, 1, 1, 0, 0]))) == [slice(0, 5)]


def test_items_of_any_alignment_are_gathered(tmp_path: Path) -> None:
    paths = make_files(tmp_path, [9000, 7000])
    region = Region(2, 9000)
    for file, path in enumerate(paths):
        region.open(file, path)
    contents = [path.read_bytes() for path in paths]
    files, offsets = np.array([1, 0, 1]), np.array([512, 1024, 2048])
    for item_bytes in (1, 6, 12, 100, 1000):
        out = torch.empty((3, item_bytes), dtype=torch.uint8)
        region.gather(files, [Part(offsets, item_bytes, 512, out)])
        for row, (file, offset) in enumerate(zip(files, offsets, strict=True)):
            assert out[row].numpy().tobytes() == contents[file][offset : offset + item_bytes]


def test_number_of_slots_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "max_map_count"
    limit.write_text("65530\n")
    monkeypatch.setattr(mapping, "MAP_COUNT", limit)
    monkeypatch.setattr(mapping, "_LIVE", WeakSet())
    assert default_slots(2**20) == 16_384
    assert default_slots(2**20) == 16_384
    assert default_slots(2**30) == 512
    assert default_slots(2**50) == 1
    monkeypatch.setattr(mapping, "MAP_COUNT", tmp_path / "none")
    assert default_slots(2**20) == 16_384


def test_several_sets_stay_within_the_limits_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "max_map_count"
    limit.write_text("65530\n")
    monkeypatch.setattr(mapping, "MAP_COUNT", limit)
    monkeypatch.setattr(mapping, "_LIVE", WeakSet())
    regions = [Region(10**6, 2**20) for _ in range(8)]
    found = [region.slots.num for region in regions]
    assert found[:4] == [16_384, 16_381, 8_191, 4_095] and min(found) > 100
    assert sum(found) < 0.75 * 65_530
    large = [Region(10**6, 2**32) for _ in range(3)]
    assert sum(len(region.bytes) for region in (*regions, *large)) < mapping.MAX_MAPPED_BYTES
    del regions, large
    gc.collect()
    assert default_slots(2**20) == 16_384


def test_no_file_stays_open(tmp_path: Path) -> None:
    opened = Path("/proc/self/fd")
    if not opened.is_dir():
        pytest.skip("open files are counted in /proc")
    (path,) = make_files(tmp_path, [100])
    regions = [Region(1, 100) for _ in range(50)]
    for region in regions:
        region.open(0, path)
    links = []
    for descriptor in opened.iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            links.append(descriptor.readlink())
    assert links and path not in links


def test_deleted_file_stays_readable(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, [9000])
    content = path.read_bytes()
    region = Region(1, 9000)
    region.open(0, path)
    path.unlink()
    assert region.read(0, 0, 9000) == content


def test_mapping_lives_as_long_as_its_bytes(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, [9000])
    region = Region(1, 9000)
    region.open(0, path)
    view = region.bytes[:9000]
    del region
    gc.collect()
    assert view.tobytes() == path.read_bytes()


def test_reserving_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_LIVE", WeakSet())
    region = Region(10**6, 2**30)  # a million files of a GiB
    assert len(region.bytes) == mapping.MAX_MAPPED_BYTES // 2


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Region(1, 10).open(0, tmp_path / "nowhere")


def test_failed_mapping_frees_its_slot(tmp_path: Path) -> None:
    (path,) = make_files(tmp_path, [100])
    region = Region(2, 100, num_slots=1)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        region.open(0, tmp_path)  # a folder cannot be mapped
    assert (region.slots.of < 0).all()
    region.open(1, path, replace=False)
    assert region.read(1, 0, 100) == path.read_bytes()


@pytest.mark.parametrize("use", ["region.bytes[0]", "region.bytes.__setitem__(4096, 1)"])
def test_bad_memory_access_ends_the_process(tmp_path: Path, use: str) -> None:
    """Neither reading unmapped addresses nor writing to a file is possible."""
    make_files(tmp_path, [10, 4096])
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from latent_t2i.shards.mapping import Region\n"
        f"path = Path({str(tmp_path / '1')!r})\n"
        "region = Region(2, 4096); region.open(0, path); region.open(1, path); region.close(0)\n"
        f"{use}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode < 0, "ended by a signal"
