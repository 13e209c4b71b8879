"""Runs that are killed repeatedly end with the same bits as an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.train.config import TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.stop import Stop, StopReason
from tests.train import process_groups
from tests.train.conftest import MakeConfig
from tests.train.test_train_launch import SCRIPT, environment, flags

NUM_KILLS = 30
START_S = 120


def wait_until(condition: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    """Waits until the condition holds or the process ends."""
    limit = time.monotonic() + START_S
    while is_alive() and not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def newest_name(run: Path) -> str:
    """The name of a run's newest checkpoint; "" if there is none."""
    return max((path.name for path in (run / "checkpoints").glob("step-*")), default="")


def kill_often(
    run: Path,
    num_kills: int,
    start: Callable[[], Any],
    is_alive: Callable[[Any], bool],
    kill: Callable[[Any], None],
) -> list[str]:
    """Kills a run repeatedly, at random moments near its next checkpoint or during its start.

    Returns the newest checkpoint after each kill.
    """
    rng = np.random.default_rng(0)
    left = []
    for number in range(num_kills):
        process, before = start(), newest_name(run)
        if (number + 1) % 5:
            wait_until(lambda: newest_name(run) != before, lambda: is_alive(process))  # noqa: B023
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 3))
        assert is_alive(process), "ended before it was killed"
        kill(process)
        left.append(newest_name(run))
    return left


def settings(num_steps: int) -> dict[str, Any]:
    """A run that spends much of its time saving."""
    return {"num_steps": num_steps, "checkpoint_every_steps": 2, "log_every_steps": 3}


@pytest.mark.parametrize(
    ("num_processes", "num_kills", "num_steps"),
    [
        (1, 3, 50),
        pytest.param(1, NUM_KILLS, 400, marks=pytest.mark.slow),
        pytest.param(2, 10, 200, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(
    make_config: MakeConfig,
    tmp_path: Path,
    forks: ForkServerContext,
    num_processes: int,
    num_kills: int,
    num_steps: int,
) -> None:
    whole = make_config(**settings(num_steps), out=str(tmp_path / "whole"))
    process_groups.run(forks, whole, num_processes=num_processes)
    config = make_config(**settings(num_steps))

    def kill(group: list[Any]) -> None:
        for process in group:
            process.kill()
        for process in group:
            process.join()
        assert group[0].exitcode == -signal.SIGKILL  # others may fail first

    left = kill_often(
        tmp_path / "run",
        num_kills,
        lambda: process_groups.start(forks, config, num_processes=num_processes),
        lambda group: all(process.is_alive() for process in group),
        kill,
    )
    assert "" < left[-1] < f"step-{num_steps:08d}"
    process_groups.run(forks, config, num_processes=num_processes)
    process_groups.assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_the_command_killed_thirty_times(
    make_config: MakeConfig, tmp_path: Path, elsewhere: Path
) -> None:
    def start(config: TrainConfig) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *flags(config)],
            env=environment(ACCELERATE_USE_CPU="1"),
            cwd=elsewhere,
            stderr=subprocess.DEVNULL,
        )

    def kill(process: "subprocess.Popen[bytes]") -> None:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    assert start(make_config(**settings(400), out=str(tmp_path / "whole"))).wait() == 0
    config = make_config(**settings(400))
    left = kill_often(
        tmp_path / "run",
        NUM_KILLS,
        lambda: start(config),
        lambda process: process.poll() is None,
        kill,
    )
    assert len(set(left)) > NUM_KILLS / 2
    assert start(config).wait() == 0
    process_groups.assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_signal_at_any_step_saves_it_and_the_run_resumes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before the first step and at the end of an epoch, which has six steps."""
    train(make_config(out=str(tmp_path / "whole")))
    reason = Stop.reason
    for step in range(10):

        def signalled(self: Stop, at: int, train_s: float, when: int = step) -> StopReason | None:
            if at == when:
                os.kill(os.getpid(), signal.SIGTERM if when % 2 else signal.SIGINT)
            return reason(self, at, train_s)

        with monkeypatch.context() as patch:
            patch.setattr(Stop, "reason", signalled)
            with pytest.raises(SystemExit):
                train(make_config())
        assert newest_name(tmp_path / "run") == (f"step-{step:08d}" if step else "")
    train(make_config())
    process_groups.assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    whole = make_config(**settings(60), out=str(tmp_path / "whole"))
    process_groups.run(forks, whole, num_processes=2)
    config = make_config(**settings(60))
    group = process_groups.start(forks, config, num_processes=2)
    run = tmp_path / "run"
    wait_until(lambda: newest_name(run) >= "step-00000004", group[1].is_alive)
    os.kill(group[1].pid or 0, signal.SIGTERM)
    process_groups.finish(group, 128 + signal.SIGTERM)
    assert newest_name(run) < "step-00000060"
    process_groups.run(forks, config, num_processes=2)
    process_groups.assert_same_end(run, tmp_path / "whole")
