"""The average of the weights against the formula."""

import pytest
import torch
from torch import nn

from model.ema import EMA, EMAConfig


def test_the_average_follows_the_formula() -> None:
    layer = nn.Linear(3, 2)
    ema = EMA(EMAConfig(decay=0.6), layer.named_parameters())
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for step in range(20):
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        ema.update(layer.parameters(), step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, p in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, average in ema.average.items():
        torch.testing.assert_close(average, expected[name])


def test_half_precision_weights_have_a_float32_average() -> None:
    ema = EMA(EMAConfig(), nn.Linear(3, 2).half().named_parameters())
    assert {average.dtype for average in ema.average.values()} == {torch.float32}


def test_without_warmup_the_decay_is_constant() -> None:
    ema = EMA(EMAConfig(decay=0.9, warmup=False), nn.Linear(1, 1).named_parameters())
    assert ema.decay_at(0) == ema.decay_at(1000) == 0.9


def test_loading_restores_in_place() -> None:
    layer = nn.Linear(3, 2)
    first = EMA(EMAConfig(), layer.named_parameters())
    nn.init.zeros_(layer.weight)
    second = EMA(EMAConfig(), layer.named_parameters())
    kept = second.average["weight"]
    second.load(first.average)
    torch.testing.assert_close(kept, first.average["weight"], rtol=0, atol=0)


def test_an_impossible_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema.decay: expected 0 <= decay < 1, found 1.0"):
        EMAConfig(decay=1.0)
