"""The averages of the weights agree with the formulas."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from latent_t2i.model.config import MAX_SIGMA_REL, EMAConfig
from latent_t2i.model.ema import EMA, gamma_of, power_decay
from tests.weights import direct_sum, random_walk

POWERS = EMAConfig(decay=None, sigma_rels=(0.05, 0.1))


def test_the_exponential_average_follows_the_formula() -> None:
    layer = nn.Linear(3, 2)
    ema = EMA(EMAConfig(decay=0.6), layer.named_parameters())
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for step in random_walk(layer, 20):
        ema.update(layer.parameters(), step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, p in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, average in ema.average.items():
        torch.testing.assert_close(average, expected[name])


def test_the_foreach_update_equals_a_loop_bit_by_bit() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 4)).to(
        memory_format=torch.channels_last
    )
    config = EMAConfig(decay=0.99, sigma_rels=(0.05, 0.1))
    ema = EMA(config, network.named_parameters())
    looped = [[p.detach().clone() for p in network.parameters()] for _ in range(3)]
    for step in random_walk(network, 10):
        ema.update(network.parameters(), step)
        for averages, decay in zip(looped, ema.decays_at(step), strict=True):
            for average, parameter in zip(averages, network.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1.0 - decay)
    flat = itertools.chain.from_iterable(looped)
    for (name, ours), expected in zip(ema.state_dict().items(), flat, strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_a_power_average_equals_the_direct_sum_over_all_steps(sigma_rel: float) -> None:
    layer, history = nn.Linear(4, 3), []
    ema = EMA(EMAConfig(decay=None, sigma_rels=(sigma_rel,)), layer.named_parameters())
    for step in random_walk(layer, 300):
        ema.update(layer.parameters(), step)
        history.append(layer.weight.detach().clone())
        expected = direct_sum(history, sigma_rel).float()
        torch.testing.assert_close(ema.average["weight"], expected, rtol=1e-5, atol=1e-4)


def test_initial_weights_do_not_contribute_to_a_power_average() -> None:
    layer = nn.Linear(4, 3)
    ema = EMA(POWERS, layer.named_parameters())
    nn.init.constant_(layer.weight, 7.0)
    ema.update(layer.parameters(), 0)
    assert all((average["weight"] == 7.0).all() for average in ema.powers.values())


def sigma_rel_of(gamma: float) -> float:
    """Returns the standard deviation of the profile t^gamma on [0, 1], as a share of the run."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.2, 0.288])
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    times = (np.arange(2_000_000) + 0.5) / 2_000_000
    shares = times**gamma / (times**gamma).sum()
    mean = (shares * times).sum()
    assert ((shares * (times - mean) ** 2).sum()) ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


def test_known_widths_and_exponents() -> None:
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)  # the paper's
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_of(0.0) == pytest.approx(MAX_SIGMA_REL)  # the plain mean
    assert gamma_of(MAX_SIGMA_REL - 1e-9) == pytest.approx(0.0, abs=1e-6)


def test_averages_of_float16_weights_are_float32_and_the_decay_may_be_constant() -> None:
    layer = nn.Linear(3, 2).half()
    ema = EMA(EMAConfig(decay=0.9, warmup=False), layer.named_parameters())
    ema.update(layer.parameters(), 0)
    assert {average.dtype for average in ema.average.values()} == {torch.float32}
    assert ema.decays_at(0) == ema.decays_at(1000) == [0.9]


def test_the_bundle_gets_the_exponential_or_else_the_first_power_average() -> None:
    layer = nn.Linear(1, 1)
    both = EMA(EMAConfig(sigma_rels=(0.1, 0.05)), layer.named_parameters())
    only = EMA(EMAConfig(decay=None, sigma_rels=(0.1, 0.05)), layer.named_parameters())
    for ema in (both, only):
        for step in random_walk(layer, 3):
            ema.update(layer.parameters(), step)
    assert both.decays_at(1) == [2 / 11, *only.decays_at(1)]
    assert only.decays_at(1) == [power_decay(gamma_of(0.1), 1), power_decay(gamma_of(0.05), 1)]
    assert both.average is not both.powers[0.1]
    assert only.average is only.powers[0.1]


def test_averages_are_restored_in_place() -> None:
    layer = nn.Linear(3, 2)
    config = EMAConfig(decay=0.9, sigma_rels=(0.05, 0.1))
    first = EMA(config, layer.named_parameters())
    for step in random_walk(layer, 5):
        first.update(layer.parameters(), step)
    second = EMA(config, layer.named_parameters())
    kept = second.average["weight"]
    second.load(first.state_dict())
    assert second.average["weight"] is kept
    assert list(first.state_dict())[:3] == ["weight", "bias", "0.05/weight"]
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert not torch.equal(first.powers[0.05]["weight"], first.powers[0.1]["weight"])


def test_averages_with_other_profiles_are_refused() -> None:
    parameters = list(nn.Linear(3, 2).named_parameters())
    saved = EMA(EMAConfig(sigma_rels=(0.05,)), parameters).state_dict()
    message = r"has averages of decay, sigma_rel 0.05, the settings are for decay, sigma_rel 0.1;"
    with pytest.raises(ValueError, match=message):
        EMA(EMAConfig(sigma_rels=(0.1,)), parameters).load(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"ema.decay: expected 0 or more and less than 1, found 1.0"),
        ({"decay": None}, r"ema.decay, ema.sigma_rels: expected at least one, found neither"),
        ({"sigma_rels": (0.3,)}, r"ema.sigma_rels: expected .* less than 0.2886\d+, found 0.3"),
        ({"decay": float("nan")}, r"ema.decay: expected .*, found nan"),
        ({"sigma_rels": (float("nan"), 0.1)}, r"ema.sigma_rels: expected .*, found nan"),
        ({"sigma_rels": (0.0,)}, r"ema.sigma_rels: expected more than 0 .* found 0.0"),
        (
            {"sigma_rels": (0.1, 0.1)},
            r"ema.sigma_rels: expected different widths, found \(0.1, 0.1\)",
        ),
        (
            {"sigma_rels": (0.1,), "snapshot_every_steps": 5},
            r"ema.snapshot_every_steps: .* two or more ema.sigma_rels .* found \(0.1,\)",
        ),
        (
            {"sigma_rels": (0.1, 0.05), "snapshot_every_steps": 0},
            r"ema.snapshot_every_steps: expected more than 0, found 0",
        ),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAConfig(**settings)
