"""Positioned reads give the batches of mapped files, with errors where a mapping would be fatal."""

import gc
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch

from latent_t2i.shards import filesystems, pread
from latent_t2i.shards.access import Access, make_loader, open_set
from latent_t2i.shards.filesystems import choose_read, file_system, find_kind
from latent_t2i.shards.pread import MERGED_GAP_BYTES, FileReader, merged
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.schema import FormatError, Manifest
from latent_t2i.shards.source import Part
from tests.shard_sets import assert_batches_equal, collect, make_examples, write_buckets, write_set

ALL = ("latent", "text", "tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards; the last one has another layout."""
    folder = tmp_path_factory.mktemp("source") / "set"
    shards = [make_examples(3, views=2, seed=seed, num_captions=3 + seed // 4) for seed in range(5)]
    write_set(folder, shards)
    return folder


@pytest.mark.parametrize("num_slots", [None, 1, 3])
@pytest.mark.parametrize("read", ["map", "pread"])
def test_batches_are_the_same_for_any_number_of_slots(
    folder: Path, read: Any, num_slots: int | None
) -> None:
    rng = np.random.default_rng(0)
    whole = open_shards(folder, fields=ALL, read="map")
    shards = ShardSet(
        folder, Manifest.load(folder), fields=ALL, read=read, num_slots=num_slots, is_lazy=True
    )
    for size in (1, 40, 7, 0):
        records, (caption_u, view_u) = rng.integers(0, 15, size), rng.random((2, size))
        found = shards.gather(records, caption_u, view_u)
        if size:
            assert_batches_equal([found], [whole.gather(records, caption_u, view_u)])
        assert len(found) == size
        assert shards.keys(records) == whole.keys(records)
    assert [shards.meta(record) for record in range(15)] == [whole.meta(n) for n in range(15)]
    assert (shards._source.slots.of >= 0).sum() == (num_slots or 5)
    shards.finish_verification()


def test_a_shard_is_hashed_and_its_headers_are_checked_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(folder, Manifest.load(folder), num_slots=1, is_lazy=True)
    hashed: list[str] = []
    checked: list[str] = []
    monkeypatch.setattr(
        "latent_t2i.shards.checks.check_hash", lambda folder, entry: hashed.append(entry.name)
    )
    monkeypatch.setattr(
        "latent_t2i.shards.reader.check_record", lambda path, *_: checked.append(path.name)
    )
    for record in (0, 14, 1, 14, 0):  # each replaces the other's shard
        shards.keys(np.array([record]))
    shards.finish_verification()
    names = ["shard-000000.tar", "shard-000004.tar"]
    assert (hashed, checked) == (names, sorted(2 * names))


@pytest.mark.parametrize("read", ["map", "pread"])
def test_a_shard_is_measured_whenever_it_is_opened(tmp_path: Path, read: Any) -> None:
    """It may have been truncated since it lost its slot, and reading it would be fatal."""
    manifest = write_set(tmp_path / "set", [make_examples(3, seed=seed) for seed in range(2)])
    shards = ShardSet(tmp_path / "set", manifest, num_slots=1, read=read)
    shards.keys(np.array([0]))
    shards.keys(np.array([3]))
    os.truncate(tmp_path / "set" / "shard-000000.tar", 2000)
    with pytest.raises(FormatError, match=r"shard-000000.tar: truncated: expected \d+ bytes"):
        shards.keys(np.array([0]))
    assert shards.keys(np.array([3])) == ["01-3-000000"]


def test_a_file_truncated_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [make_examples(3)])
    shards = open_shards(tmp_path / "set", read="pread", verify="none")
    u = np.zeros(3)
    shards.gather(np.arange(3), u, u)
    os.truncate(tmp_path / "set" / "shard-000000.tar", 2000)
    message = r"shard-000000.tar: truncated while it was read: expected \d+ more bytes at byte \d+"
    with pytest.raises(FormatError, match=message):
        shards.gather(np.arange(3), u, u)


def test_failed_reads_name_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(folder, read="pread", verify="none")
    shards.keys(np.array([0]))

    def fail(*_: Any) -> int:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(pread.os, "preadv", fail)
    with pytest.raises(OSError, match=r"Stale file handle: .*shard-000000.tar"):
        shards.keys(np.array([0]))


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may return fewer bytes than asked for."""
    whole = os.preadv

    def read_little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole(descriptor, [buffers[0][:100]], offset)

    shards = open_shards(folder, read="pread", fields=ALL)
    u = np.full(15, 0.5)
    expected = shards.gather(np.arange(15), u, u)
    monkeypatch.setattr(pread.os, "preadv", read_little)
    assert_batches_equal([shards.gather(np.arange(15), u, u)], [expected])


def test_fields_that_are_close_are_read_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(folder, read="pread", fields=ALL, verify="none")
    shards.keys(np.array([0]))
    calls: list[int] = []
    whole = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr(pread.os, "preadv", count)
    shards.gather(np.array([0]), np.zeros(1), np.zeros(1))
    assert calls == [5], "three fields, and the spaces between them"


def test_merging() -> None:
    gap = memoryview(bytearray(10))
    a, b, c = (memoryview(bytearray(size)) for size in (4, 5, 6))
    (only,) = merged([(100, a), (104, b), (119, c)], gap)
    assert (only[0], [len(part) for part in only[1]]) == (100, [4, 5, 10, 6])
    parts = list(merged([(100, a), (115, b), (120, c)], gap))
    assert [(start, [len(part) for part in found]) for start, found in parts] == [
        (100, [4]),
        (115, [5, 6]),
    ]
    assert MERGED_GAP_BYTES > 512


def test_threads_take_turns(folder: Path) -> None:
    """With fewer slots than a batch needs, no thread may take the files of another."""
    shards = ShardSet(folder, Manifest.load(folder), num_slots=2)
    whole = open_shards(folder)
    faults: list[int] = []

    def gather(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            records, (caption_u, view_u) = rng.integers(0, 15, 8), rng.random((2, 8))
            found = shards.gather(records, caption_u, view_u)
            if not torch.equal(found.text, whole.gather(records, caption_u, view_u).text):
                faults.append(seed)

    threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def num_open_shards(folder: Path) -> int:
    """Returns how many shards of a folder this process has open."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            links.append(path.readlink())
    return sum(link.parent == folder and link.suffix == ".tar" for link in links)


def test_files_and_threads_end_with_their_set(folder: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in /proc")
    folder = shutil.copytree(folder, tmp_path / "own")  # threads of other tests may read the other
    before = {*threading.enumerate()}
    shards = open_shards(folder, read="pread", verify="none")
    shards.keys(np.arange(15))
    assert num_open_shards(folder) == 5
    threads = {*threading.enumerate()} - before
    assert threads
    del shards
    gc.collect()
    assert num_open_shards(folder) == 0
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_slots_are_bounded_by_the_limit_on_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pread.resource, "getrlimit", lambda _: (20, 20))
    monkeypatch.setattr(pread, "_LIVE", WeakSet())
    paths = [tmp_path / str(number) for number in range(9)]
    reader = FileReader(9)
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
        reader.slots.touch(np.array([number]))
        reader.open(number, path)
    assert np.flatnonzero(reader.slots.of >= 0).tolist() == [4, 5, 6, 7, 8]
    assert FileReader(9).slots.num == 2, "half of what is left"
    reader.close(4)
    reader.close(4)
    out = torch.empty((2, 3), dtype=torch.uint8)
    reader.gather(np.array([8, 5]), [Part(np.array([0, 997]), 3, 1, out)])
    assert out.tolist() == [[8] * 3, [5] * 3]


@pytest.mark.parametrize("access", ["map", "cache"])
def test_buckets_are_read(tmp_path: Path, access: Any) -> None:
    write_buckets(tmp_path / "set", {"64x64": [5, 4], "48x80": [6]})
    location = str(tmp_path / "set")

    def batches(read: Any) -> Any:
        settings = Access(kind=access, cache_dir=tmp_path / "cache", read=read)
        shards = open_set(location, settings)
        assert all(part.read == read for part in shards.sets)
        loader = make_loader(shards, shards.order(batch_size=4, seed=1), settings)
        return collect(loader, 0, 8)

    assert_batches_equal(batches("pread"), batches("map"))


MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:44 / /data rw - nfs4 host:/data rw,vers=4.2
31 30 8:2 / /data/local rw master:1 propagate_from:2 - xfs /dev/sdb rw
32 22 0:45 / /mnt/with\040space rw - fuse.sshfs host: rw
33 22 8:3 / /twice rw - ext4 /dev/sdc rw
34 33 0:46 / /twice rw - lustre host rw
""".strip().splitlines()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/shards", "ext4"),
        ("/data", "nfs4"),
        ("/data/shards/train", "nfs4"),
        ("/database", "ext4"),
        ("/data/local/train", "xfs"),
        ("/mnt/with space/a", "fuse.sshfs"),
        ("/twice/a", "lustre"),
    ],
)
def test_kind_of_file_system(path: str, kind: str) -> None:
    assert find_kind(Path(path), MOUNTS) == kind


def test_reads_are_chosen_on_network_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, read in [
        *((name, "pread") for name in ("nfs", "nfs4", "cifs", "smb3", "fuse.gcsfuse", "ceph")),
        *((name, "pread") for name in ("lustre", "9p", "glusterfs", "beegfs", "gpfs")),
        *((name, "map") for name in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "")),
    ]:
        monkeypatch.setattr(filesystems, "file_system", lambda _, kind=kind: kind)
        assert choose_read("auto", tmp_path) == read
        assert choose_read("map", tmp_path) == "map"
        assert choose_read("pread", tmp_path) == "pread"


def test_a_system_without_mountinfo_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "MOUNTS", tmp_path / "none")
    assert file_system(tmp_path) == ""
    assert choose_read("auto", tmp_path) == "map"
