"""A set has one owner per rank: a second run of a command is refused, and does no harm."""

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.processes import find_local_locks, folder_lock, own_rank
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.verify import verify
from tests.coco_folders import CocoFolder, make_coco
from tests.stage_one import Moment, contents, make_config, run, start, stopped

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


def test_a_process_that_ends_leaves_the_locks_of_one_that_begins_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes after the first has found the folder unused, before it deletes it."""
    folder, original = tmp_path / "set", Path.iterdir
    with ExitStack() as second:
        comes = []

        def iterdir(path: Path) -> Iterator[Path]:
            found = [*original(path)]
            if not comes and {one.name for one in found} == {"lock", "run.lock"}:
                comes.append(second.enter_context(own_rank(folder, 1)))
                second.enter_context(folder_lock(folder))
            return iter(found)

        with own_rank(folder, 0), folder_lock(folder):
            monkeypatch.setattr(Path, "iterdir", iterdir)
        assert len(comes) == 1
        with own_rank(folder, 2) as third:
            assert not third.is_alone() and not comes[0].is_alone()
            with (folder / "progress/lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not list(folder.iterdir())


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nfs s:/d rw,vers=3,nolock,local_lock=all", "nfs with local_lock=all"),
        ("nfs s:/d rw,vers=3,nolock", "nfs with nolock"),
        ("nfs4 s:/d rw,vers=4.2,local_lock=none", None),
        ("lustre mgs:/d rw,localflock", "lustre with localflock"),
        ("lustre mgs:/d rw,flock", None),
    ],
)
def test_a_mount_with_local_locks_is_named(
    tmp_path: Path, line: str, expected: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mounts = tmp_path / "mountinfo"
    kind, source, options = line.split()
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"90 22 0:50 / /big\\040data rw,relatime shared:2 - {kind} {source} {options}\n"
        "91 90 0:51 / /big\\040data/scratch rw - tmpfs tmpfs rw\n"
    )
    assert find_local_locks(Path("/big data/set"), mounts) == expected
    assert find_local_locks(Path("/big data/scratch/set"), mounts) is None
    assert find_local_locks(Path("/big"), mounts) is None
    assert find_local_locks(Path("/big data"), tmp_path / "none") is None
    with monkeypatch.context() as patch:
        patch.setattr("latent_t2i.pipeline.processes.find_local_locks", lambda folder: expected)
        with own_rank(tmp_path / "set", 0):
            pass
    warning = capsys.readouterr().err
    assert (f"{expected} locks files on this machine only" in warning) == (expected is not None)


@pytest.mark.parametrize(
    "moment",
    [
        ("write", 1),  # of the first shard
        pytest.param("shard-000001.tar", marks=pytest.mark.slow),
        "shard-000001.json",  # its report: the shard has its name
        pytest.param("shard-000002.json", marks=pytest.mark.slow),  # the last
        "manifest.json",
        pytest.param(("rmtree", 1), marks=pytest.mark.slow),  # of the reports
    ],
)
def test_one_rank_on_two_hosts_without_locks_between_them(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext, moment: Moment
) -> None:
    """A scheduler started the rank twice; the first waits while the second runs to the end."""
    config = make_config(folder, tmp_path / "out", text_dtype="int8")
    build(replace(config, out=str(tmp_path / "whole")))
    with stopped(forks, config, moment, tmp_path / "log", host="one") as first:
        assert run(forks, config, host="two") == 0
        assert {*contents(tmp_path / "whole")} <= {*contents(tmp_path / "out")}
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flag", "moment"),
    [
        ("append", ("write", 1)),
        ("append", "shards-2.npy"),  # the last process has begun to merge
        pytest.param("append", "shard-000003.json", marks=pytest.mark.slow),
        pytest.param("append", "manifest.json", marks=pytest.mark.slow),  # the extension's
        pytest.param("retry", ("write", 1), marks=pytest.mark.slow),
        pytest.param("retry", "shard-000000.json", marks=pytest.mark.slow),
        pytest.param("retry", "manifest.json", marks=pytest.mark.slow),
        ("retry", ("rmtree", 1)),  # the extension is complete
    ],
)
def test_one_rank_extends_a_set_on_two_hosts_without_locks_between_them(
    folder: CocoFolder, tmp_path: Path, forks: ForkServerContext, flag: str, moment: Moment
) -> None:
    """Like the test above. Nothing of the first process gets into the set."""
    of_folder = SourceConfig(kind="folder", images=str(tmp_path / "images"))
    shutil.copytree(folder.images, tmp_path / "images")
    image = tmp_path / "images/000000000001.png"
    for path in (tmp_path / "images").iterdir():
        path.with_suffix(".txt").write_text("a picture")
    content = image.read_bytes()
    image.write_text("no picture")
    config = make_config(of_folder, tmp_path / "out", max_quarantined=0.5)
    build(config)
    image.write_bytes(content)
    for number in (7, 8):
        shutil.copy(image, image.with_name(f"{number:012d}.png"))
        image.with_name(f"{number:012d}.txt").write_text("a picture")
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    config = replace(config, **{flag: True})
    build(replace(config, out=str(tmp_path / "whole")))
    with stopped(forks, config, moment, tmp_path / "log", host="one") as first:
        assert run(forks, config, host="two") == 0
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0, (tmp_path / "log").read_text()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert list(verify(tmp_path / "out")) == []
