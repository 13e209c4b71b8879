"""CUDA graphs and copies on a stream of their own, with fakes that need no GPU."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latent_t2i.train import device, loop
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import OptimConfig, TrainConfig
from latent_t2i.train.device import DevicePrefetcher
from latent_t2i.train.graph import NUM_WARMUP_STEPS, StepResult
from latent_t2i.train.preflight import check_graph
from latent_t2i.train.setup import start
from tests import tiny
from tests.train.conftest import MakeConfig, metrics, weights


class FakeBackend:
    """Captures as CUDA does: work does not run at capture, and a replay overwrites its results."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        self.log.append("run")
        return work()

    def capture(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        self.log.append("capture")
        result = (torch.tensor(torch.nan), torch.tensor(torch.nan), torch.tensor(torch.nan))

        def replay() -> None:
            self.log.append("replay")
            for static, value in zip(result, work(), strict=True):
                static.copy_(value)

        return replay, result


def train_with_fake_graph(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, FakeBackend]:
    """Trains with steps that are captured and replayed by a fake."""
    backend = FakeBackend()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "start", lambda config: replace(start(config), graph_backend=backend))
        return loop.train(config), backend


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_replayed_steps_equal_eager_ones(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch_size: int | None,
) -> None:
    shards = tiny.make_shards(tmp_path / "shards")
    tiny.plant_nan(shards, shard=0, records=[5])  # one skipped step in each epoch
    settings: dict[str, Any] = {
        "shards": str(shards),
        "num_steps": 20,
        "micro_batch_size": micro_batch_size,
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=7, schedule="cosine"),
    }
    eager = loop.train(make_config(**settings, out=str(tmp_path / "eager")))
    config = make_config(**settings, out=str(tmp_path / "replayed"), cuda_graph=True)
    replayed, backend = train_with_fake_graph(config, monkeypatch)
    assert backend.log == ["run"] * NUM_WARMUP_STEPS + ["capture"] + ["replay"] * 16
    torch.testing.assert_close(weights(replayed), weights(eager), rtol=1e-5, atol=1e-7)
    skipped = [line["skipped"] for line in metrics(tmp_path / "replayed")]
    assert skipped == [line["skipped"] for line in metrics(tmp_path / "eager")]
    assert skipped[-1] == 3


def test_without_a_gpu_cuda_graph_has_no_effect_and_the_run_says_so(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(make_config(num_steps=1, cuda_graph=True))
    assert "cuda_graph: needs a GPU, found none" in capsys.readouterr().err


def test_gradient_checkpointing_changes_no_weight(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = loop.train(make_config(num_steps=3, out=str(tmp_path / "plain")))
    config = make_config(num_steps=3, gradient_checkpointing=True)
    assert start(config).state.unet.is_gradient_checkpointing
    found = weights(loop.train(config))
    torch.testing.assert_close(found, weights(plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_follows_the_setting(make_config: MakeConfig, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = False
    try:
        start(make_config(tf32=tf32))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.backends.cudnn.benchmark  # searches for kernels once per shape
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False


class FakeStream:
    """A stream that logs its calls under its name."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name}: event")
        return "copy"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name}: wait for {event}")


def test_copies_run_on_their_own_stream_and_steps_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    side, steps = FakeStream("copies", log), FakeStream("steps", log)

    @contextmanager
    def stream(found: FakeStream) -> Any:
        log.append(f"enter {found.name}")
        yield
        log.append(f"exit {found.name}")

    monkeypatch.setattr(device.torch.cuda, "stream", stream)
    monkeypatch.setattr(device.torch.cuda, "current_stream", lambda device: steps)
    monkeypatch.setattr(device, "_record_use", lambda _, by: log.append(f"used by {by.name}"))
    prefetcher = DevicePrefetcher(torch.device("cpu"))
    prefetcher.stream = side  # type: ignore[assignment]

    class FakeBatch:
        def to(self, device: torch.device) -> "FakeBatch":
            log.append("copy")
            return self

        def map(self, change: Callable[[Any], Any]) -> None:
            change(None)

    batch: Any = FakeBatch()
    assert prefetcher.to_device(batch) is batch
    assert log == [
        *("enter copies", "copy", "copies: event", "exit copies"),
        *("steps: wait for copy", "used by steps"),
    ]


def test_on_a_cpu_a_batch_is_not_copied() -> None:
    one = torch.zeros(1)
    parts = ("latent", "text", "positions")
    batch = Batch(**dict.fromkeys(parts, one))
    assert DevicePrefetcher(torch.device("cpu")).to_device(batch).latent is one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": OptimConfig(kind="adamw8bit"), "cuda_graph": True}, "adamw with cuda_graph"),
        ({"optim": OptimConfig(kind="adamw8bit"), "fsdp": True}, "adamw with fsdp"),
    ],
)
def test_incompatible_settings_are_refused(
    make_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_a_graph_needs_one_process_and_one_shape() -> None:
    plain: Any = SimpleNamespace(latent_shapes=[(4, 8, 8)])
    buckets: Any = SimpleNamespace(latent_shapes=[(4, 8, 8), (4, 6, 10)])
    check_graph(True, 1, plain)
    check_graph(False, 2, buckets)
    with pytest.raises(ValueError, match="cuda_graph: expected one process, found 2"):
        check_graph(True, 2, plain)
    with pytest.raises(ValueError, match="one shape, found 2 buckets"):
        check_graph(True, 1, buckets)
