"""Moving averages of the weights: an exponential one, and power-function ones.

Each average is a float32 copy of the weights on the training device, updated by one fused `foreach`
call per step. The decays depend on the number of updates only (a skipped step counts), so a resumed
run needs nothing but the averages. `model/posthoc.py` makes averages of other widths afterwards.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from latent_t2i.model.config import EMAConfig as EMAConfig

Averages = dict[str, dict[str, Tensor]]


class EMA:
    """Averaged float32 copies of a network's parameters, by profile and name."""

    def __init__(self, config: EMAConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.config = config
        named = list(parameters)
        self._gammas = [gamma_of(sigma_rel) for sigma_rel in config.sigma_rels]
        self._averages: Averages = {
            label: {name: p.detach().clone().float() for name, p in named}
            for label in _labels(config)
        }

    @property
    def average(self) -> dict[str, Tensor]:
        """The average that goes into the bundle, by parameter name."""
        return next(iter(self._averages.values()))

    @property
    def powers(self) -> dict[float, dict[str, Tensor]]:
        """The power-function averages, by sigma_rel and parameter name."""
        return {
            sigma_rel: self._averages[_label(sigma_rel)] for sigma_rel in self.config.sigma_rels
        }

    def decays_at(self, num_updates: int) -> list[float]:
        """Returns the decay of each average in the update after `num_updates` earlier ones."""
        powers = [power_decay(gamma, num_updates) for gamma in self._gammas]
        if self.config.decay is None:
            return powers
        ramp = (1 + num_updates) / (10 + num_updates) if self.config.warmup else 1.0
        return [min(self.config.decay, ramp), *powers]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], num_updates: int) -> None:
        """Updates the averages with `parameters`, which are in the order of construction."""
        weights = [p if p.dtype == torch.float32 else p.float() for p in parameters]
        for average, decay in zip(
            self._averages.values(), self.decays_at(num_updates), strict=True
        ):
            torch._foreach_lerp_(list(average.values()), weights, 1.0 - decay)

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Swaps the bundle's average into the network and sets eval mode, temporarily.

        The swap is in place, tensor by tensor: no second network is allocated, and the weights keep
        their addresses. No average may be updated inside.
        """
        was_training = module.training
        self._exchange(module)
        module.eval()
        try:
            yield
        finally:
            self._exchange(module)
            module.train(was_training)

    @torch.no_grad()
    def _exchange(self, module: nn.Module) -> None:
        average = self.average
        # In place: a CUDA graph, DDP and the optimizer refer to the parameters' memory.
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32, name  # the exchange would round others
            kept = parameter.detach().clone()
            parameter.copy_(average[name])
            average[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all averages: keys are `NAME` for `decay`, `SIGMA_REL/NAME` for the others."""
        return {
            label + name: tensor
            for label, average in self._averages.items()
            for name, tensor in average.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores averages of the same network, saved from `state_dict`.

        Raises ValueError if the profiles differ, KeyError with a tensor's name if names differ.
        """
        ours = self.state_dict()
        found, wanted = (_profiles(names) for names in (state, ours))
        if found != wanted:
            raise ValueError(
                f"ema: the checkpoint has averages of {', '.join(found)}, the settings are for "
                f"{', '.join(wanted)}; an average cannot start in the middle of a run: use the "
                "previous ema.decay and ema.sigma_rels to resume, or another --name or --out for a "
                "new run"
            )
        if odd := state.keys() ^ ours.keys():
            raise KeyError(min(odd))
        for name, tensor in ours.items():
            tensor.copy_(state[name])


def _labels(config: EMAConfig) -> list[str]:
    """Returns the key prefix of each average in `state_dict`; it is empty for `decay`."""
    powers = [_label(sigma_rel) for sigma_rel in config.sigma_rels]
    return powers if config.decay is None else ["", *powers]


def _label(sigma_rel: float) -> str:
    return f"{sigma_rel}/"


def _profiles(names: Iterable[str]) -> list[str]:
    """Returns readable names of the averages that these keys belong to, sorted."""
    labels = {name.rpartition("/")[0] for name in names}
    return sorted(f"sigma_rel {label}" if label else "decay" for label in labels)


def gamma_of(sigma_rel: float) -> float:
    """Returns the exponent of the power function with a relative width.

    It is the positive root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2: Karras et al.
    2024 (2312.02696), equation 126 and algorithm 2.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(gamma: float, num_updates: int) -> float:
    """Returns the decay of update t = num_updates + 1: (1 - 1 / t)^(gamma + 1).

    Karras et al. 2024 (2312.02696), section 3.1 and equation 127. After T updates the weight of
    step t is (t^(gamma + 1) - (t - 1)^(gamma + 1)) / T^(gamma + 1); the initial parameters have
    weight 0.
    """
    return float((1.0 - 1.0 / (num_updates + 1)) ** (gamma + 1))
