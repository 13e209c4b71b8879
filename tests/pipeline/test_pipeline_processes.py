"""Processes divide the shards by number, and one at a time holds the lock of a folder."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.pipeline.processes import ProcessInfo, find_processes, folder_lock

SPAWN = multiprocessing.get_context("fork")


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_every_number_belongs_to_one_process(num_processes: int) -> None:
    groups = [ProcessInfo(rank=rank, num_processes=num_processes) for rank in range(num_processes)]
    for number in range(30):
        assert sum(processes.owns(number) for processes in groups) == 1


def test_the_rank_is_read_from_the_environment() -> None:
    assert find_processes({}) == ProcessInfo()
    found = find_processes(
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    )
    assert found == ProcessInfo(rank=5, num_processes=8, local_rank=1, num_local=4)
    assert not found.is_first
    with pytest.raises(ValueError, match=r"RANK: expected 0 to 1 \(WORLD_SIZE - 1\), found 2"):
        find_processes({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="WORLD_SIZE: expected a whole number, found 'two'"):
        find_processes({"WORLD_SIZE": "two"})


def count_up(folder: Path, times: int) -> None:
    for _ in range(times):
        with folder_lock(folder):
            path = folder / "count"
            number = int(path.read_text()) if path.exists() else 0
            path.write_text(str(number + 1))


def test_the_lock_is_exclusive(tmp_path: Path) -> None:
    workers = [SPAWN.Process(target=count_up, args=(tmp_path, 300)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "count").read_text() == "1200"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_deleted_while_it_is_created_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    make, faults = os.mkdir, iter([error("deleted"), error("deleted again")])

    def mkdir(*args: Any, **kwargs: Any) -> None:
        if fault := next(faults, None):
            raise fault
        make(*args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with folder_lock(tmp_path / "set"):
        assert next(faults, None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "progress").touch()
    with pytest.raises(FileExistsError, match="progress"), folder_lock(tmp_path):
        pass
    (tmp_path / "progress").unlink()
    (tmp_path / "progress").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="progress"), folder_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_created_is_an_error() -> None:
    with pytest.raises(FileNotFoundError), folder_lock(Path("/proc/none")):
        pass


def hold(folder: Path) -> None:
    with folder_lock(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    holder = SPAWN.Process(target=hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with folder_lock(tmp_path):
        pass


def test_a_folder_that_the_lock_created_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with folder_lock(tmp_path / "old"):
        pass
    assert [*(tmp_path / "old").iterdir()] == []
