"""Shards of noise, a small run, and what tests compare of runs."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.ema import EMAConfig
from latent_t2i.shards.reader import ShardSet
from latent_t2i.train import setup
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import TrainConfig
from tests import tiny

MakeConfig = Callable[..., TrainConfig]
MODEL = DenoiserConfig(
    channels=(8,),
    attention=(True,),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=4,
)
TIMES = ("images_per_s", "train_s", "time_breakdown")


@pytest.fixture(autouse=True)
def _bf16_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the tests of bf16 in bf16 on CPUs that emulate it, too."""
    monkeypatch.setattr(setup, "multiplies_bf16", lambda: True)


@pytest.fixture(autouse=True)
def _default_signals() -> Iterator[None]:
    """Handles signals as usual: a job in the background, or below nohup, ignores some."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 records of noise in three shards."""
    return tiny.make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture
def make_config(tmp_path: Path, shards: Path) -> MakeConfig:
    """Makes the settings of a run of ten small steps; keywords change them."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "shards": str(shards),
            "out": str(tmp_path / "run"),
            "batch_size": 4,
            "num_steps": 10,
            "mixed_precision": "no",
            "log_every_steps": 4,
            "trackers": ("none",),
            "checkpoint_every_steps": 3,
            "ema": EMAConfig(decay=0.9),
            "model": MODEL,
        }
        values |= changes
        if isinstance(values["shards"], str):
            values["shards"] = (values["shards"],)
        return TrainConfig(**values)

    return make


@pytest.fixture
def on_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Runs an action while the n-th batch of this process is gathered."""

    def install(number: int, action: Callable[[], None]) -> None:
        gather, count = ShardSet.gather, iter(range(10**6))

        def wrapped(self: ShardSet, *args: Any) -> Any:
            if next(count) == number:
                action()
            return gather(self, *args)

        monkeypatch.setattr(ShardSet, "gather", wrapped)

    return install


def metrics(run: str | Path | None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without measured times."""
    text = (Path(str(run)) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [without_times(line) for line in lines]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMES}


def losses(run: str | Path | None) -> list[float]:
    """The losses of a run, by logging interval."""
    return [line["loss"] for line in metrics(run)]


def assert_close_metrics(found: Path, expected: Path, rel: float) -> None:
    """Compares two runs' losses and gradient norms line by line."""
    for line, reference in zip(metrics(found), metrics(expected), strict=True):
        assert line["step"] == reference["step"]
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=rel), (found, line["step"])


def weights(bundle: Path) -> dict[str, Tensor]:
    """The tensors of a bundle's network."""
    return load_file(bundle / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Compares tensors bit by bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_weights(first: Path, second: Path) -> None:
    """Compares two bundles' networks bit by bit."""
    assert_same_tensors(weights(first), weights(second))


def assert_same_batch(first: Batch, second: Batch) -> None:
    """Compares every tensor of two batches bit by bit."""
    assert first.gathered.keys() == second.gathered.keys()
    for one, other in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(one, other)


def join(parts: Iterable[Batch]) -> Batch:
    """The global batch of the processes' shares."""
    first, *others = parts
    joined = (
        torch.cat(same) for same in zip(*(p.tensors() for p in (first, *others)), strict=True)
    )
    return first.map(lambda _: next(joined))


def skipped_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error that name skipped steps."""
    return [line for line in capsys.readouterr().err.splitlines() if "skipped, not" in line]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
