"""Checkpoints restore every bit, and only for the run that they belong to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from latent_t2i.model.denoiser import build
from latent_t2i.model.ema import EMA, EMAConfig
from latent_t2i.train import checkpoint
from latent_t2i.train.checkpoint import TrainState
from latent_t2i.train.config import OptimConfig
from latent_t2i.train.optim import make_optimizer
from tests.train.conftest import MODEL, assert_same_tensors

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "model": {"channels": (8,), "attention_kernel": "auto"},
    "optim": {"learning_rate": 1e-4},
}


def make_state(seed: int = 0, *, channels_last: bool = False) -> TrainState:
    """A state after two updates with random gradients."""
    torch.manual_seed(seed)
    unet = build(MODEL, latent_channels=4, sample_size=8, text_width=32)
    unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ema = EMA(EMAConfig(), unet.named_parameters())
    optimizer = Accelerator(cpu=True, mixed_precision="no").prepare(
        make_optimizer(OptimConfig(), unet.parameters())
    )
    state = TrainState(unet=unet, ema=ema, optimizer=optimizer)
    for _ in range(2):
        update(state)
    return state


def update(state: TrainState) -> None:
    """One step with random gradients."""
    for parameter in state.unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.ema.update(state.unet.parameters(), state.step)
    state.step += 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_state_continues_bit_by_bit(tmp_path: Path, channels_last: bool) -> None:
    state = make_state(channels_last=channels_last)
    state.train_s, state.metrics = 1.25, {"rows": [[0.1, 0.2, 0.0]]}
    checkpoint.save(tmp_path, state, SETTINGS, keep=2)
    other = make_state(seed=1, channels_last=channels_last)
    checkpoint.load(checkpoint.find_all(tmp_path)[-1], other)
    assert (other.step, other.train_s, other.metrics) == (2, state.train_s, state.metrics)
    for each in (state, other):
        torch.manual_seed(5)
        update(each)
    assert_same_tensors(other.unet.state_dict(), state.unet.state_dict())
    assert_same_tensors(other.ema.average, state.ema.average)


def test_only_the_newest_are_kept_and_partial_ones_are_deleted(tmp_path: Path) -> None:
    state = make_state()
    (tmp_path / ".step-00000009.partial").mkdir()
    for _ in range(3):
        state.step += 1
        checkpoint.save(tmp_path, state, SETTINGS, keep=2)
    kept = ["step-00000004", "step-00000005"]
    assert [p.name for p in checkpoint.find_all(tmp_path)] == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_a_changed_model_is_refused_naming_both_values(tmp_path: Path) -> None:
    now = SETTINGS | {"model": {"channels": (16,), "attention_kernel": "auto"}}
    with pytest.raises(ValueError, match=r"model.channels: .* has \[8\], found \[16\]"):
        checkpoint.compare_settings(SETTINGS, now, tmp_path)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    before, now = ({"optim": {"kind": kind}} for kind in ("adamw", "adamw8bit"))
    with pytest.raises(ValueError, match=r"optim.kind: .* has 'adamw', found 'adamw8bit'"):
        checkpoint.compare_settings(before, now, tmp_path)


def test_a_changed_learning_rate_is_allowed_and_reported(tmp_path: Path) -> None:
    now = SETTINGS | {
        "optim": {"learning_rate": 2e-4},
        "model": {"channels": [8], "attention_kernel": "plain"},
    }
    assert checkpoint.compare_settings(SETTINGS, now, tmp_path) == [
        "model.attention_kernel changed from 'auto' to 'plain'",
        "optim.learning_rate changed from 0.0001 to 0.0002",
    ]
