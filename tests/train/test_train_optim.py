"""Clipping and skipping, on the device and the host, with and without a scaler; learning rate."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from latent_t2i.train import optim
from latent_t2i.train.config import OptimConfig


def make(scaler: Any = None) -> tuple[nn.Module, AcceleratedOptimizer]:
    """A small network and its prepared optimizer."""
    Accelerator(cpu=True, mixed_precision="no")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    adamw = optim.make_optimizer(OptimConfig(learning_rate=0.1), network.parameters())
    return network, AcceleratedOptimizer(adamw, scaler=scaler)


def step(
    network: nn.Module,
    optimizer: AcceleratedOptimizer,
    *,
    factor: float,
    max_norm: float,
    on_device: bool,
) -> tuple[Tensor, Tensor]:
    """One backward pass of a loss times `factor`, and the update."""
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    loss = network(x).square().sum() * factor
    (loss if optimizer.scaler is None else optimizer.scaler.scale(loss)).backward()
    parameters = list(network.parameters())
    return optim.update(optimizer, parameters, rate=0.1, max_norm=max_norm, on_device=on_device)


def scalers() -> list[Any]:
    """No scaler, and that of fp16, which also runs on a CPU."""
    return [None, torch.amp.GradScaler("cpu", init_scale=256.0)]


@pytest.mark.parametrize("scaler", scalers(), ids=["no", "fp16"])
@pytest.mark.parametrize("max_norm", [0.01, 1e9])
@pytest.mark.parametrize("on_device", [True, False])
def test_updates_are_those_of_plain_adamw_with_clipping(
    scaler: Any, max_norm: float, on_device: bool
) -> None:
    network, optimizer = make(copy.deepcopy(scaler))
    reference = copy.deepcopy(network)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.1)
    for _ in range(3):
        norm, skipped = step(network, optimizer, factor=1.0, max_norm=max_norm, on_device=on_device)
        x = torch.linspace(-1, 1, 12).reshape(3, 4)
        adamw.zero_grad()
        reference(x).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        adamw.step()
        torch.testing.assert_close(norm, expected)
        assert skipped == 0
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scaler", scalers(), ids=["no", "fp16"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_non_finite_step_changes_nothing(scaler: Any, factor: float, on_device: bool) -> None:
    network, optimizer = make(copy.deepcopy(scaler))
    step(network, optimizer, factor=1.0, max_norm=1.0, on_device=on_device)
    weights = copy.deepcopy(network.state_dict())
    moments = copy.deepcopy(optimizer.optimizer.state_dict()["state"])
    _, skipped = step(network, optimizer, factor=factor, max_norm=1.0, on_device=on_device)
    assert skipped == 1
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for index, entry in optimizer.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, moments[index][kind]) for kind, tensor in entry.items())
    _, skipped = step(network, optimizer, factor=1.0, max_norm=1.0, on_device=on_device)
    assert skipped == 0
    assert not torch.equal(network.state_dict()["0.weight"], weights["0.weight"])
    if optimizer.scaler is not None:
        assert optimizer.scaler.get_scale() == 128.0


@pytest.mark.parametrize("max_norm", [0.01, 1e9])
def test_host_and_device_decisions_give_the_same_bits(max_norm: float) -> None:
    weights = []
    for on_device in (True, False):
        network, optimizer = make()
        for factor in (1.0, float("nan"), 2.0, 0.5):
            step(network, optimizer, factor=factor, max_norm=max_norm, on_device=on_device)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule: Any, expected: list[float]) -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule)
    assert [optim.learning_rate(config, s, 6) for s in range(6)] == pytest.approx(expected)
    assert optim.learning_rate(config, 9, 6) == pytest.approx(1.0 if schedule == "constant" else 0)
