"""Steps played back are the steps taken one by one; copies beside them leave nothing out."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_t2i.train import device, loop
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import OptimConfig, TrainConfig
from latent_t2i.train.device import DevicePrefetcher
from latent_t2i.train.graph import NUM_STEPS_BEFORE, Outcome
from latent_t2i.train.setup import Run, start
from tests import tiny
from tests.train.conftest import MakeConfig


class PlayedByHand:
    """Records as a graph does: the work is not done when recorded, and its results stay put."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def run(self, work: Callable[[], Outcome]) -> Outcome:
        self.log.append("run")
        return work()

    def record(self, work: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        self.log.append("record")
        outcome = tuple(torch.full((), torch.nan) for _ in range(3))

        def play() -> None:
            self.log.append("play")
            for place, value in zip(outcome, work(), strict=True):
                place.copy_(value)

        return play, outcome  # type: ignore[return-value]


def weights_of(bundle: Path) -> dict[str, Tensor]:
    return load_file(bundle / "unet" / "diffusion_pytorch_model.safetensors")


def train_recorded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, PlayedByHand]:
    """Trains with steps that are recorded and played back by hand."""
    recorder = PlayedByHand()

    def with_recorder(config: TrainConfig) -> Run:
        return replace(start(config), recorder=recorder)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "start", with_recorder)
        return loop.train(config), recorder


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_steps_played_back_are_the_steps_taken_one_by_one(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch_size: int | None,
) -> None:
    shards = tiny.make_shards(tmp_path / "shards")
    tiny.plant_nan(shards, shard=0, records=[5])  # a step of each epoch is skipped
    settings: dict[str, Any] = {
        "shards": str(shards),
        "num_steps": 20,
        "micro_batch_size": micro_batch_size,
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=7, schedule="cosine"),
    }
    plain = loop.train(make_config(**settings, out=str(tmp_path / "plain")))
    config = make_config(**settings, out=str(tmp_path / "played"), cuda_graph=True)
    played, recorder = train_recorded(config, monkeypatch)
    assert recorder.log == ["run"] * NUM_STEPS_BEFORE + ["record"] + ["play"] * 16
    expected = weights_of(plain)
    for name, found in weights_of(played).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7)
    skipped = {(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "played")}
    assert len({text.count('"skipped": 0') for text in skipped}) == 1
    assert '"skipped": 3' in skipped.pop()


def test_without_a_gpu_steps_are_taken_as_they_come_and_that_is_said(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(make_config(num_steps=1, cuda_graph=True))
    assert "cuda_graph: needs a GPU, found none" in capsys.readouterr().err


def test_checkpointing_computes_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = loop.train(make_config(num_steps=3, out=str(tmp_path / "plain")))
    config = make_config(num_steps=3, gradient_checkpointing=True)
    assert start(config).state.unet.is_gradient_checkpointing
    expected = weights_of(plain)
    for name, found in weights_of(loop.train(config)).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_set(make_config: MakeConfig, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        start(make_config(tf32=tf32))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = True


class FakeStream:
    """A stream that notes what it is told; the names tell which one."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name}: event")
        return "copied"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name}: wait for {event}")


def test_copies_go_beside_the_steps_which_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the copies' stream: asking for the batch, and copying it; then the steps' stream waits."""
    log: list[str] = []
    side, steps = FakeStream("copies", log), FakeStream("steps", log)

    @contextmanager
    def stream(found: FakeStream) -> Any:
        log.append(f"into {found.name}")
        yield
        log.append(f"out of {found.name}")

    monkeypatch.setattr(device.torch.cuda, "stream", stream)
    monkeypatch.setattr(device.torch.cuda, "current_stream", lambda device: steps)
    monkeypatch.setattr(device, "_used_by", lambda tensor, by: log.append(f"used by {by.name}"))
    prefetcher = DevicePrefetcher(torch.device("cpu"))
    prefetcher._stream = side  # type: ignore[assignment]

    class Shipped:
        def to(self, device: torch.device) -> "Shipped":
            log.append("copy")
            return self

        def map(self, change: Callable[[Any], Any]) -> None:
            change(None)

    batch: Any = prefetcher.next(iter([Shipped()]))  # type: ignore[list-item]
    assert prefetcher.bring(batch) is batch
    assert log == [
        *("into copies", "out of copies"),
        *("into copies", "copy", "copies: event", "out of copies"),
        *("steps: wait for copied", "used by steps"),
    ]


def test_on_a_cpu_a_batch_is_where_it_has_to_be() -> None:
    one = torch.zeros(1)
    parts = ("latent", "text", "tokens", "drop", "timesteps", "posterior_noise", "noise")
    batch = Batch(**dict.fromkeys(parts, one))
    prefetcher = DevicePrefetcher(torch.device("cpu"))
    assert prefetcher.bring(prefetcher.next(iter([batch]))).latent is one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": OptimConfig(kind="adamw8bit"), "cuda_graph": True}, "adamw with cuda_graph"),
        ({"optim": OptimConfig(kind="adamw8bit"), "fsdp": True}, "adamw with fsdp"),
    ],
)
def test_what_cannot_go_together_is_refused(
    make_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_one_recorded_step_serves_one_process_and_one_shape() -> None:
    from latent_t2i.train.preflight import check_graph

    plain: Any = SimpleNamespace(latent_shapes=[(4, 8, 8)])
    buckets: Any = SimpleNamespace(latent_shapes=[(4, 8, 8), (4, 6, 10)])
    check_graph(True, 1, plain)
    check_graph(False, 2, buckets)
    with pytest.raises(ValueError, match="cuda_graph: expected one process, found 2"):
        check_graph(True, 2, plain)
    with pytest.raises(ValueError, match="one shape, found 2 buckets"):
        check_graph(True, 1, buckets)
