"""Runs as one or more new processes, started quickly from the fork server of tests/conftest.py.

    group = start(forks, config, num_processes=2)
    finish(group)

Each rank writes the hash of its weights and averages to RUN/rank-N.json.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from latent_t2i.train import checkpoint, loop, preflight, prepare, setup, validation
from latent_t2i.train.config import TrainConfig
from tests.train.conftest import assert_same_tensors, metrics, without_times

TIMEOUT_S = 300
FILES = ("unet", "ema", "optimizer")


def start(
    forks: ForkServerContext,
    config: TrainConfig,
    *,
    num_processes: int = 1,
    before: Callable[[Path, int], None] | None = None,
) -> list[BaseProcess]:
    """Starts the processes of a run, as the launcher does.

    Each process calls `before`, a function of this module, with the run's folder and its rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [
        forks.Process(target=work, args=(config, rank, num_processes, port, before))
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


def run(
    forks: ForkServerContext,
    config: TrainConfig,
    *,
    num_processes: int = 1,
    before: Callable[[Path, int], None] | None = None,
) -> Path:
    """Runs all processes to their end and returns the run's folder."""
    finish(start(forks, config, num_processes=num_processes, before=before))
    return Path(str(config.out))


def work(
    config: TrainConfig,
    rank: int,
    num_processes: int,
    port: int,
    before: Callable[[Path, int], None] | None = None,
) -> None:
    """Trains as one process of a group."""
    torch.set_num_threads(1)
    setup.multiplies_bf16 = lambda: True
    if not torch.cuda.is_available():  # only tests/gpu sees GPUs
        os.environ["ACCELERATE_USE_CPU"] = "1"
    if num_processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for kind in ("", "LOCAL_"):
            os.environ |= {f"{kind}RANK": str(rank), f"{kind}WORLD_SIZE": str(num_processes)}
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    if before is not None:
        before(Path(str(config.out)), rank)
    finish = loop.finish

    def hash_and_finish(run: Any, reason: Any) -> Path:
        trained = [*run.state.unet.state_dict().values(), *run.state.ema.state_dict().values()]
        local = (t.to_local() if isinstance(t, DTensor) else t for t in trained)
        digest = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in local)).hexdigest()
        (Path(str(config.out)) / f"rank-{rank}.json").write_text(json.dumps(digest))
        return finish(run, reason)

    loop.finish = hash_and_finish
    loop.train(config)


def watch(folder: Path, rank: int) -> None:
    """Compiles with a backend that runs eagerly, and writes what a run did to RUN/watched-N.json.

    The number of compiled graphs, the data types of conv_in's output in evaluation mode, the
    timeout of the process group in seconds, and the number of calls that read or hash whole files.
    """
    import torch._dynamo.config  # slow to import, so only here

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found: dict[str, Any] = {"graphs": 0, "evaluated_in": []}

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found["graphs"] += 1
        return graph.forward

    def note(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        if not module.training:
            found["evaluated_in"].append(str(output.dtype))

    def start_and_watch(config: TrainConfig) -> Any:
        run = begin(config)
        run.state.unet.conv_in.register_forward_hook(note)
        return run

    def write_and_finish(run: Any, reason: Any) -> Path:
        group: Any = torch.distributed.group.WORLD
        timeout = group._get_backend(torch.device("cpu")).options._timeout
        found["timeout_s"] = timeout.total_seconds()
        (folder / f"watched-{rank}.json").write_text(json.dumps(found))
        return finish(run, reason)

    begin, finish = loop.start, loop.finish
    loop.start, loop.finish = start_and_watch, write_and_finish
    prepare.BACKEND = backend  # type: ignore[assignment]
    count_calls(checkpoint, "_read", found)
    count_calls(preflight, "fingerprint", found)
    count_calls(validation, "check_overlap", found)


def count_calls(module: ModuleType, name: str, found: dict[str, Any]) -> None:
    """Counts the calls of a module's function under its name."""
    original = getattr(module, name)
    found[name] = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        found[name] += 1
        return original(*args, **kwargs)

    setattr(module, name, counted)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step-*"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {
        f"{file}:{name}": tensor
        for file in FILES
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
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
