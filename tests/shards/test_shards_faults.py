"""Killed writers, full disks, and every changed byte of a set."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.shards.files import HashingFile
from latent_t2i.shards.schema import BLOCK_BYTES, Layout, Manifest
from latent_t2i.shards.verify import verify
from latent_t2i.shards.writer import (
    ShardWriter,
    begin_set,
    finish_set,
    keep_text_scale,
    read_report,
    read_text_scale,
)
from tests.shard_sets import (
    MAX_TOKENS,
    TEXT_WIDTH,
    layout_of,
    make_examples,
    make_provenance,
    make_scale,
    write_set,
)

NUM_KILLS = 20
NUM_SHARDS, RECORDS_PER_SHARD = 4, 6
PAUSE_S = 0.002
CHANGES = (
    (HashingFile, "write"),
    (os, "fsync"),
    (os, "link"),
    (os, "unlink"),
    (Path, "replace"),
    (shutil, "rmtree"),
)
"""Owners and names of functions that change files."""


def write_slowly(folder: Path, pause_s: float = 0.0, finish: bool = True) -> None:
    """Writes or resumes a set like stage one, `finish` including the manifest."""
    provenance = make_provenance(text_dtype="int8")
    if begin_set(folder, provenance):
        return
    if read_text_scale(folder) is None:
        keep_text_scale(folder, make_scale())
    for index in range(NUM_SHARDS):
        if read_report(folder, index):
            continue
        examples = make_examples(RECORDS_PER_SHARD, text_dtype="int8", seed=index)
        with ShardWriter(folder, index, layout_of(examples), "moments") as shard:
            for example in examples:
                shard.write(example)
                time.sleep(pause_s)
    if not finish:
        return
    finish_set(
        folder,
        provenance,
        num_shards=NUM_SHARDS,
        quarantined={"bad": "not an image"},
        empty_text=np.zeros((MAX_TOKENS, TEXT_WIDTH), np.float16),
        empty_tokens=np.zeros(MAX_TOKENS, np.int32),
        text_scale=read_text_scale(folder),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files, by path in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_none_partial(folder: Path, whole: dict[str, bytes]) -> None:
    """Checks that files with final names equal those of the finished set."""
    for name, content in contents(folder).items():
        if name.endswith(".part"):
            continue
        if name.startswith("progress/"):
            json.loads(content)
        else:
            assert content == whole[name], name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set that was written without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    write_slowly(folder)
    found = contents(folder)
    assert len(found) == NUM_SHARDS + 7
    return found


def write_until(folder: Path, kill_at: int) -> int:
    """Writes or resumes a set; kills this process at a call, counted from 1, that changes a file.

    Returns the number of these calls.
    """
    num_calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CHANGES:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        write_slowly(folder)
    return num_calls


def test_killed_writer_resumes_to_identical_bytes(
    tmp_path: Path, forks: ForkServerContext, whole: dict[str, bytes]
) -> None:
    num_calls = write_until(tmp_path / "counted", 0)
    rng = np.random.default_rng(0)
    num_files = set()
    for kill in range(NUM_KILLS):
        folder = tmp_path / str(kill)
        kill_at = 1 + int((kill + rng.random()) / NUM_KILLS * num_calls)
        process = forks.Process(target=write_until, args=(folder, kill_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_none_partial(folder, whole)
        num_files.add(len(contents(folder)))
        write_slowly(folder)
        assert contents(folder) == whole
    assert len(num_files) >= 4, "all kills came at the same stage"


def test_two_processes_on_one_set_end_with_identical_bytes(
    tmp_path: Path, forks: ForkServerContext, whole: dict[str, bytes]
) -> None:
    rng = np.random.default_rng(0)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        processes = [
            forks.Process(target=write_slowly, args=(folder, 2 * PAUSE_S, False)) for _ in range(2)
        ]
        for process in processes:
            process.start()
            time.sleep(0.05 * rng.random())
        with suppress(ProcessLookupError):  # it has ended
            os.kill(processes[0].pid, signal.SIGSTOP)
            time.sleep(0.1 * rng.random())
            os.kill(processes[0].pid, signal.SIGCONT)
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert_none_partial(folder, whole)
        write_slowly(folder)
        assert contents(folder) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a given size, or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        options = f"size={size}" + (",remount" if folder.is_mount() else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def assert_disk_full(folder: Path, number: int, whole: dict[str, bytes]) -> None:
    with pytest.raises(OSError) as caught:
        write_slowly(folder)
    assert caught.value.errno == number
    assert str(folder) in str(caught.value)
    assert_none_partial(folder, whole)
    assert "manifest.json" not in contents(folder)


# Space for a part of the first or third shard, or for all shards but not the small files.
@pytest.mark.parametrize(("num_shards", "num_pages"), [(0, 4), (2, 9), (4, 7)])
def test_writer_resumes_after_full_disk(
    small_disk: Callable[[str], Path], whole: dict[str, bytes], num_shards: int, num_pages: int
) -> None:
    pages = num_pages + num_shards * -(-len(whole["shard-000000.tar"]) // 4096)
    folder = small_disk(f"{4 * pages}k") / "set"
    assert_disk_full(folder, errno.ENOSPC, whole)
    assert len(list(folder.glob("*.tar"))) == num_shards
    small_disk("4m")
    write_slowly(folder)
    assert contents(folder) == whole


@pytest.mark.parametrize("limit_bytes", [100, 700, 30000])
def test_writer_resumes_after_file_size_limit(
    tmp_path: Path, whole: dict[str, bytes], limit_bytes: int
) -> None:
    """Like a full disk, but works where nothing can be mounted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
    try:
        assert_disk_full(tmp_path / "set", errno.EFBIG, whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_slowly(tmp_path / "set")
    assert contents(tmp_path / "set") == whole


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A set of one shard with two records and the smallest possible fields."""
    folder = tmp_path / "tiny"
    examples = [
        replace(
            example,
            latent=example.latent[:, :4, :2, :2],
            text=example.text[:, :, :3],
            meta={"captions": ["a caption"], "truncated": []},
        )
        for example in make_examples(2, num_captions=1, text_dtype="int8")
    ]
    write_set(folder, [examples], quarantined={"bad": "not an image"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "empty_text.npy",
        "empty_tokens.npy",
        "manifest.json",
        "quarantine.jsonl",
        "shard-000000.tar",
        "shard_sums.npy",
        "shards.npy",
        "text_scale.npy",
    ]
    assert not list(verify(folder))
    return folder


def faults_by_flip(path: Path, flips: Iterator[tuple[int, int]]) -> Iterator[tuple[int, list[str]]]:
    """Yields each place with the faults that `verify` finds after its bits were flipped."""
    path.chmod(0o644)
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place, bits in flips:
            os.pwrite(file.fileno(), bytes([content[place] ^ bits]), place)
            yield place, list(verify(path.parent))
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert not list(verify(path.parent))


def part_at(layout: Layout, place: int) -> tuple[str, str]:
    """Returns the field of a byte of a record, and whether it is header, data or padding."""
    *_, (name, part) = (
        (name, part)
        for name, part in layout.fields.items()
        if part.offset_bytes - part.header_bytes - BLOCK_BYTES <= place
    )
    if place < part.offset_bytes:
        return name, "header"
    return name, "data" if place < part.offset_bytes + part.num_bytes else "padding"


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "shards.npy",
        "shard_sums.npy",
        "quarantine.jsonl",
        "empty_text.npy",
        "empty_tokens.npy",
        "text_scale.npy",
    ],
)
def test_verify_finds_each_changed_byte_beside_the_shards(tiny: Path, name: str) -> None:
    path = tiny / name
    flips = ((place, 1 << place % 8) for place in range(path.stat().st_size))
    for place, faults in faults_by_flip(path, flips):
        assert faults, f"byte {place}"
        assert all(str(path) in fault for fault in faults)


def test_verify_finds_changed_bytes_of_a_shard(tiny: Path) -> None:
    """Flips every fifth byte of a record's headers, and every 53rd byte of the rest."""
    (layout,) = Manifest.load(tiny).layouts
    size = 2 * layout.record_bytes
    path = tiny / "shard-000000.tar"
    parts = [part_at(layout, place % layout.record_bytes) for place in range(size)]
    places = [place for place in range(layout.record_bytes) if parts[place][1] == "header"]
    assert len(places) == 4 * BLOCK_BYTES + 3 * 128
    places = [*places[::5], *range(0, path.stat().st_size, 53)]
    for place, faults in faults_by_flip(path, ((place, 1 << place % 8) for place in places)):
        assert "sha256: expected" in faults[0], f"byte {place}"
        name, kind = parts[place] if place < size else ("", "end")
        if kind == "end":
            assert any("only zeros after the last record" in fault for fault in faults)
        elif kind != "data":
            assert any(f"field {name}: expected" in fault for fault in faults), f"byte {place}"


@pytest.mark.slow
def test_verify_finds_each_changed_bit_of_a_set(tiny: Path) -> None:
    for path in sorted(tiny.iterdir()):
        flips = ((place, 1 << bit) for place in range(path.stat().st_size) for bit in range(8))
        num_flips = 0
        for place, faults in faults_by_flip(path, flips):
            assert faults, f"{path.name}: byte {place}"
            num_flips += 1
        print(f"{path.name}: {num_flips} flips, all found")
