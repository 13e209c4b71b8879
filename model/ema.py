"""The moving average of the weights, which is what the bundle carries.

One fused `foreach` call per step over float32 copies on the training device. The decay is a
function of the number of updates alone, so nothing but the averaged weights has to be saved to
resume exactly.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """How long the weights' average remembers."""

    decay: float = 0.9999
    """Share of the average that each update keeps: 0.9999 remembers about 10,000 updates."""
    warmup: bool = True
    """Begin with a short memory: update n keeps at most (1 + n) / (10 + n)."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay: expected 0 <= decay < 1, found {self.decay}")


class EMA:
    """Averaged float32 copies of a network's parameters, by name."""

    def __init__(self, config: EMAConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.config = config
        self.average = {name: p.detach().clone().float() for name, p in parameters}

    def decay_at(self, num_updates: int) -> float:
        """Returns the decay of the update that follows `num_updates` earlier ones."""
        ramp = (1 + num_updates) / (10 + num_updates) if self.config.warmup else 1.0
        return min(self.config.decay, ramp)

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], num_updates: int) -> None:
        """Moves the average towards `parameters`, given in the order of construction."""
        decay = self.decay_at(num_updates)
        torch._foreach_lerp_(list(self.average.values()), list(parameters), 1.0 - decay)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores averages saved from `average`; the names must be the same."""
        assert state.keys() == self.average.keys()
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
