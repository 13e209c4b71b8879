"""A set has one owner per rank: a second run of a command is refused, and does no harm."""

import errno
import fcntl
import os
import random
import re
import signal
import socket
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.pipeline.processes import own_rank
from latent_t2i.pipeline.stage import build
from tests.coco_folders import CocoFolder, make_coco
from tests.stage_one import contents, make_config, run, start, stopped

NUM_STARTS = 20
LONGEST_RUN_S = 1.0


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2, 2, 3, 2, 2, 3])


@pytest.mark.parametrize("num_starts", [3, pytest.param(NUM_STARTS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("max_tokens", [16, pytest.param(12, marks=pytest.mark.slow)])
def test_double_starts(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext, num_starts: int, max_tokens: int
) -> None:
    """A process that reports success has written the bytes of a single run of its command."""
    one = make_config(folder, tmp_path / "one", records_per_shard=1)
    two = replace(one, max_tokens=max_tokens, out=str(tmp_path / "two"))
    whole = []
    for config in (one, two):
        build(config)
        whole.append(contents(Path(str(config.out))))
    offsets = random.Random(max_tokens)
    for number in range(num_starts):
        out = tmp_path / str(number)
        configs = [replace(config, out=str(out)) for config in (one, two)]
        first = start(forks, configs[0])
        first.join(offsets.uniform(0, LONGEST_RUN_S))
        if number % 2 and first.is_alive():
            os.kill(first.pid, signal.SIGSTOP)
        second = start(forks, configs[1])
        second.join(offsets.uniform(0, LONGEST_RUN_S))
        if first.is_alive():
            os.kill(first.pid, signal.SIGCONT)
        for process in (first, second):
            process.join()
        exit_codes = [first.exitcode, second.exitcode]
        assert {*exit_codes} <= {0, 2}
        for expected, exit_code in zip(whole, exit_codes, strict=True):
            if exit_code == 0:
                assert contents(out) == expected
        winner = exit_codes.index(0) if 0 in exit_codes else 0
        assert run(forks, configs[winner]) == 0
        assert contents(out) == whole[winner]


def test_a_second_run_is_refused_at_once_by_process_and_host(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext
) -> None:
    config = make_config(folder, tmp_path / "out")
    with stopped(forks, config, ("write", 1), tmp_path / "log") as first:
        message = f"process {first.pid} on {socket.gethostname()} is writing this set: wait until"
        for second in (config, replace(config, max_tokens=12)):
            with pytest.raises(ValueError, match=re.escape(message)):
                build(second)
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    build(replace(config, out=str(tmp_path / "whole")))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("buckets", [False, True])
def test_another_command_as_another_rank_is_refused_before_the_first_shard(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext, buckets: bool
) -> None:
    config = make_config(folder, tmp_path / "out", buckets=buckets)
    other = replace(config, max_tokens=12)
    with stopped(forks, config, ("write", 1), tmp_path / "log", num_processes=2):
        refused = tmp_path / "refused.log"
        assert run(forks, other, rank=1, num_processes=2, log=refused) == 2
        assert "max_tokens: " in refused.read_text()
    assert build(other)  # without another owner, and without a shard, settings may change


def test_a_rank_of_a_killed_process_is_free(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext
) -> None:
    config = make_config(folder, tmp_path / "out")
    assert run(forks, config, kill_at=("write", 3)) == -signal.SIGKILL
    assert (tmp_path / "out/progress/rank-0.lock").exists()
    build(config)
    assert not (tmp_path / "out/progress").exists()


def test_each_rank_has_its_own_lock_and_leaves_no_file(tmp_path: Path) -> None:
    with own_rank(tmp_path / "set", 0) as first:
        assert first.is_alone()
        with own_rank(tmp_path / "set", 1) as second:
            assert not first.is_alone() and not second.is_alone()
            with pytest.raises(ValueError, match="is writing this set"):
                own_rank(tmp_path / "set", 1).__enter__()
        assert first.is_alone()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(file: Any, mode: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    message = rf"{tmp_path}: the file system does not support file locks .*: choose an --out"
    with pytest.raises(ValueError, match=message):
        own_rank(tmp_path, 0).__enter__()
