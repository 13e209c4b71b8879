"""Runs in processes of their own, started fast: from the server of tests/conftest.py.

    team = start(forks, config, num_processes=2)
    finish(team)

Each rank leaves the hash of all it has trained in RUN/rank-N.json.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from latent_t2i.train import loop
from latent_t2i.train.config import TrainConfig

TIMEOUT_S = 120
FILES = ("unet", "ema", "optimizer")
CLOCK = ("images_per_s", "train_s", "time_breakdown")


def start(
    forks: ForkServerContext, config: TrainConfig, *, num_processes: int = 1
) -> list[BaseProcess]:
    """Starts the processes of a run, as the launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [
        forks.Process(target=work, args=(config, rank, num_processes, port))
        for rank in range(num_processes)
    ]
    for process in team:
        process.start()
    return team


def finish(team: Iterable[BaseProcess], exit_code: int = 0) -> None:
    """Waits for all processes; they must end with this code."""
    for process in team:
        process.join(TIMEOUT_S)
        assert process.exitcode == exit_code


def work(config: TrainConfig, rank: int, num_processes: int, port: int) -> None:
    """Trains as one process of several."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    if num_processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for kind in ("", "LOCAL_"):
            os.environ |= {f"{kind}RANK": str(rank), f"{kind}WORLD_SIZE": str(num_processes)}
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    finish = loop.finish

    def finish_and_tell(run: Any, reason: Any) -> Path:
        trained = [*run.state.unet.state_dict().values(), *run.state.ema.state_dict().values()]
        mine = (t.to_local() if isinstance(t, DTensor) else t for t in trained)
        told = hashlib.sha256(b"".join(t.numpy().tobytes() for t in mine)).hexdigest()
        (Path(str(config.out)) / f"rank-{rank}.json").write_text(json.dumps(told))
        return finish(run, reason)

    loop.finish = finish_and_tell
    loop.train(config)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step-*"))


def assert_same_end(first: Path, second: Path) -> None:
    """Compares two runs: all tensors bit by bit, metrics.jsonl but for what a clock told."""
    assert newest(first).name == newest(second).name
    for file in FILES:
        ours, theirs = (load_file(newest(run) / f"{file}.safetensors") for run in (first, second))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(first) == metrics(second)
    assert steady(newest(first)) == steady(newest(second))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in lines]


def steady(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json without what depends on the clock, and the folder's name."""
    record = without_clock(json.loads((checkpoint / "state.json").read_text()))
    record["metrics"]["last"] = without_clock(record["metrics"]["last"])
    return record | {"settings": record["settings"] | {"out": None}}


def without_clock(line: dict[str, Any]) -> dict[str, Any]:
    """A line without its times."""
    return {name: value for name, value in line.items() if name not in CLOCK}
