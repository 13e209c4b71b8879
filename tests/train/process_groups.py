"""Runs as one or more new processes, started quickly from the fork server of tests/conftest.py.

    group = start(forks, config, num_processes=2)
    finish(group)

Each rank writes the hash of its weights and averages to RUN/rank-N.json.
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
from tests.train.conftest import assert_same_tensors, metrics, without_times

TIMEOUT_S = 300
FILES = ("unet", "ema", "optimizer")


def start(
    forks: ForkServerContext, config: TrainConfig, *, num_processes: int = 1
) -> list[BaseProcess]:
    """Starts the processes of a run, as the launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [
        forks.Process(target=work, args=(config, rank, num_processes, port))
        for rank in range(num_processes)
    ]
    for process in group:
        process.start()
    return group


def finish(group: Iterable[BaseProcess], exit_code: int = 0) -> None:
    """Waits for all processes and checks their exit code."""
    for process in group:
        process.join(TIMEOUT_S)
        assert process.exitcode == exit_code


def run(forks: ForkServerContext, config: TrainConfig, *, num_processes: int = 1) -> Path:
    """Runs all processes to their end and returns the run's folder."""
    finish(start(forks, config, num_processes=num_processes))
    return Path(str(config.out))


def work(config: TrainConfig, rank: int, num_processes: int, port: int) -> None:
    """Trains as one process of a group."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    if num_processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for kind in ("", "LOCAL_"):
            os.environ |= {f"{kind}RANK": str(rank), f"{kind}WORLD_SIZE": str(num_processes)}
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    finish = loop.finish

    def hash_and_finish(run: Any, reason: Any) -> Path:
        trained = [*run.state.unet.state_dict().values(), *run.state.ema.state_dict().values()]
        local = (t.to_local() if isinstance(t, DTensor) else t for t in trained)
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in local)).hexdigest()
        (Path(str(config.out)) / f"rank-{rank}.json").write_text(json.dumps(digest))
        return finish(run, reason)

    loop.finish = hash_and_finish
    loop.train(config)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step-*"))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {
        f"{file}:{name}": tensor
        for file in FILES
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()
    }


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Compares the tensors of two checkpoints bit by bit."""
    assert_same_tensors(tensors(first), tensors(second))


def assert_same_end(first: Path, second: Path) -> None:
    """Compares two runs: all tensors bit by bit, and metrics without measured times."""
    assert newest(first).name == newest(second).name
    assert_same_checkpoint(newest(first), newest(second))
    assert metrics(first) == metrics(second)
    assert comparable_state(newest(first)) == comparable_state(newest(second))


def comparable_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json without measured times and the folder's name."""
    record = without_times(json.loads((checkpoint / "state.json").read_text()))
    record["metrics"]["last"] = without_times(record["metrics"]["last"])
    record = {key: value for key, value in record.items() if key not in ("files", "sha256")}
    return record | {"settings": record["settings"] | {"out": None}}
