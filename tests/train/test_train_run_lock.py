"""One training per run folder: a second one is refused, and never changes the first one's files."""

import errno
import os
import signal
import socket
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState

from latent_t2i.train import run_lock
from latent_t2i.train.loop import train
from latent_t2i.train.run_lock import LOCK_FILE, lock_run
from tests.train import process_groups
from tests.train.conftest import MakeConfig
from tests.train.test_train_kills import newest_name, settings, wait_until


def test_a_second_training_is_refused_naming_the_first(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    owner = f"process {os.getpid()} on host {socket.gethostname()} since 2"
    with (
        lock_run(tmp_path / "run", PartialState(cpu=True)),
        pytest.raises(ValueError, match=f"run: this run is already being trained by {owner}"),
    ):
        train(make_config())
    train(make_config(num_steps=1))


def test_the_lock_file_of_a_dead_process_does_not_block(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text("process 1 on host gone since long ago\n")
    train(make_config(num_steps=1))
    assert (tmp_path / "run" / LOCK_FILE).read_text() == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of any fork
def test_a_worker_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run", PartialState(cpu=True)):
        (tmp_path / "run" / "config.json").touch()
        started, write = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(write, b".")
            signal.pause()
        os.read(started, 1)
    try:
        with lock_run(tmp_path / "run", PartialState(cpu=True)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_refused_configuration_leaves_no_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shards: the folder"):
        train(make_config(shards="no/such"))
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", unsupported)
    train(make_config(num_steps=1))
    message = "run: its file system does not support locks (No locks available)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_processes", "num_starts"),
    [
        (1, 2),
        pytest.param(1, 20, marks=pytest.mark.slow),
        pytest.param(2, 5, marks=pytest.mark.slow),
    ],
)
def test_double_starts_train_once(
    make_config: MakeConfig,
    tmp_path: Path,
    forks: ForkServerContext,
    num_processes: int,
    num_starts: int,
) -> None:
    whole = make_config(**settings(30), out=str(tmp_path / "whole"))
    process_groups.run(forks, whole, num_processes=num_processes)
    rng = np.random.default_rng(0)
    for number in range(num_starts):
        run = tmp_path / f"run-{number}"
        config = make_config(**settings(30), out=str(run))
        first = process_groups.start(forks, config, num_processes=num_processes)
        time.sleep(rng.uniform(0, 0.5))
        second = process_groups.start(forks, config, num_processes=num_processes)
        for process in (*first, *second):
            process.join(process_groups.TIMEOUT_S)
        codes = [[process.exitcode for process in group] for group in (first, second)]
        # Both succeed only if the second one started after the end of the first.
        assert [0] * num_processes in codes
        assert all(set(code) in ({0}, {1}) for code in codes), codes
        process_groups.assert_same_end(run, tmp_path / "whole")


def test_a_stopped_process_keeps_its_run(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    run = tmp_path / "run"
    process_groups.run(forks, make_config(**settings(60), out=str(tmp_path / "whole")))
    config = make_config(**settings(60))
    [first] = process_groups.start(forks, config)
    wait_until(lambda: newest_name(run) != "", first.is_alive)
    os.kill(first.pid or 0, signal.SIGSTOP)
    try:
        before = read_files(run)
        process_groups.finish(process_groups.start(forks, config), exit_code=1)
        assert read_files(run) == before
    finally:
        os.kill(first.pid or 0, signal.SIGCONT)
    process_groups.finish([first])
    process_groups.assert_same_end(run, tmp_path / "whole")


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
