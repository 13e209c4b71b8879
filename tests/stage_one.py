"""Settings of stage one with tiny encoders, and its runs in processes of their own, for tests."""

import fcntl
import itertools
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any, cast

from latent_t2i.pipeline import report, stage, upload, writing
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.writer import ShardWriter
from tests import object_stores, tiny
from tests.coco_folders import CocoFolder

Moment = str | tuple[str, int | str]
"""When a file gets this name, or a call of a function: counted from 1, or with a path of this name.
"""


def make_config(source: SourceConfig | CocoFolder, out: Path, **changes: Any) -> PipelineConfig:
    if isinstance(source, CocoFolder):
        source = SourceConfig(
            images=str(source.images),
            captions=str(source.captions),
            instances=str(source.instances),
        )
    values: dict[str, Any] = {
        "name": "noise",
        "vae": tiny.encoders().vae,
        "text_encoder": tiny.encoders().clip,
        "source": source,
        "max_tokens": 16,
        "records_per_shard": 2,
        "batch_size": 4,
        "out": str(out),
        "device": "cpu",
    }
    return PipelineConfig(**(values | changes))


def build_one(config: PipelineConfig) -> Manifest:
    """Builds the one set of a configuration without buckets."""
    return stage.build(config)[""]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file's bytes, by its path in the folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def start(
    forks: ForkServerContext, config: PipelineConfig, *, rank: int = 0, num_processes: int = 1,
    kill_at: Moment | None = None, stop_at: Moment | None = None,
    log: Path | None = None, host: str | None = None,
) -> ForkServerProcess:  # fmt: skip
    """Starts the stage in a process; it ends with exit code 2 for an error of the user.

    At `kill_at` or `stop_at` it sends itself SIGKILL or SIGSTOP. `log` receives the output,
    and a line for each shard begun. With `host`, the process takes itself to be on that host, where
    the locks of others are not visible.
    """
    at = (kill_at, signal.SIGKILL) if kill_at else (stop_at, signal.SIGSTOP)
    process = forks.Process(target=_run, args=(config, rank, num_processes, *at, log, host))
    process.start()
    return process


def run(forks: ForkServerContext, config: PipelineConfig, **changes: Any) -> int:
    """Runs the stage in a process and returns its exit code."""
    process = start(forks, config, **changes)
    process.join()
    return cast(int, process.exitcode)


def random_kills(random: Random, num: int) -> Iterator[Moment]:
    """Yields moments at which a run writes something; they do not depend on its speed.

    A run that is killed at one of them finishes one shard at most.
    """
    for _ in range(num):
        yield random.choice(["write", "fsync", "link"]), random.randint(1, 3)


@contextmanager
def stopped(
    forks: ForkServerContext, config: PipelineConfig, at: Moment, log: Path, **changes: Any
) -> Iterator[ForkServerProcess]:
    """Yields a process that has stopped itself; kills it at the end, unless it has ended."""
    process = start(forks, config, stop_at=at, log=log, **changes)
    try:
        while "signal\n" not in (log.read_text() if log.exists() else ""):
            assert process.is_alive()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


def begun(log: Path) -> list[str]:
    """Returns the shards that a process with this log began."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.removeprefix("begun ") for line in lines if line.startswith("begun ")]


def _run(
    config: PipelineConfig,
    rank: int,
    num_processes: int,
    moment: Moment | None,
    signal_number: int,
    log: Path | None,
    host: str | None,
) -> None:
    if host is not None:
        socket.gethostname = lambda: host
        fcntl.flock = lambda file, mode: None  # type: ignore[assignment]
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(num_processes)})
    if moment is not None:
        _signal_at(moment, signal_number)
    with (log or Path(os.devnull)).open("a", buffering=1) as sys.stdout:
        original = writing.cut_batches

        def logging(shard: Any, *rest: Any) -> Any:
            print(f"begun shard-{shard.index:06d}")
            return original(shard, *rest)

        writing.cut_batches = logging
        upload.POLL_S = 0.02
        try:
            stage.build(config)
        except ValueError as error:
            print(f"error: {error}")
            sys.exit(2)


def _signal_at(moment: Moment, signal_number: int) -> None:
    """Makes this process send itself a signal, once."""
    owners = {
        "write": ShardWriter,
        "add": report.Meter,
        "fsync": os,
        "rmtree": shutil,
        "link": os,
        "replace": Path,
    }
    owners |= dict.fromkeys(("put_file", "pipe_file", "mv", "rm"), object_stores.Store)
    calls = itertools.count(1)
    signals = iter([signal_number])

    def patch(name: str, is_now: Callable[..., bool]) -> None:
        original = getattr(owners[name], name)

        def signalling(*args: Any, **kwargs: Any) -> Any:
            if is_now(*args) and (number := next(signals, None)) is not None:
                print("signal")
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(owners[name], name, signalling)

    if isinstance(moment, str):
        for name in ("link", "replace"):
            patch(name, lambda source, target: Path(target).name == moment)
    elif isinstance(moment[1], str):
        patch(moment[0], lambda *args: moment[1] in (Path(str(path)).name for path in args))
    else:
        patch(moment[0], lambda *args: next(calls) == moment[1])
