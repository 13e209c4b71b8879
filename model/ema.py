"""The moving averages of the weights; the bundle carries the first of them.

One fused `foreach` call per average and step over float32 copies on the training device. Decays are
functions of the number of updates alone, a skipped step counting as one, so nothing but the
averages has to be saved to resume exactly, and processes with equal weights have equal averages.

The best length of an average is known only after training. Two power-function averages with
snapshots of them (`ema.sigma_rels`, `ema.snapshot_every_steps`) give any other one afterwards:

    python -m model.ema --run runs/NAME --sigma-rel 0.1 [--step N] [--out DIR]
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

MAX_SIGMA_REL = 12**-0.5
"""That of the plain mean of all steps (gamma 0), where the power functions worth having end."""
Averages = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """How long the averages of the weights remember; each costs 4 bytes per parameter.

    The bundle gets that of `decay`, or without one that of the first of `sigma_rels`.
    """

    decay: float | None = 0.9999
    """Share that each update keeps: 0.9999 remembers about 10,000 updates; None: no such average.
    """
    warmup: bool = True
    """For `decay`, begin with a short memory: update n keeps at most (1 + n) / (10 + n)."""
    sigma_rels: tuple[float, ...] = ()
    """Further averages, whose length grows with the run: their widths as shares of it."""
    snapshot_every_steps: int | None = None
    """Keep the averages of `sigma_rels` at this interval, for `python -m model.ema`."""
    snapshot_dtype: Literal["float16", "float32"] = "float16"
    """How snapshots are stored: 2 or 4 bytes per parameter and average."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay: expected 0 <= decay < 1, found {self.decay}")
        if self.decay is None and not self.sigma_rels:
            raise ValueError("ema.decay, ema.sigma_rels: give at least one, found neither")
        for sigma_rel in self.sigma_rels:
            check_sigma_rel("ema.sigma_rels", sigma_rel)
        if len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError(f"ema.sigma_rels: one comes twice, found {self.sigma_rels}")
        every = self.snapshot_every_steps
        if every is not None and every <= 0:
            raise ValueError(f"ema.snapshot_every_steps: expected more than 0, found {every}")
        if every is not None and len(self.sigma_rels) < 2:
            raise ValueError(
                "ema.snapshot_every_steps: other lengths can be made from two or more of "
                f"ema.sigma_rels (0.05 0.1 are good ones), found {self.sigma_rels}"
            )


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
        """The average that the bundle gets, by parameter name."""
        return next(iter(self._averages.values()))

    @property
    def powers(self) -> dict[float, dict[str, Tensor]]:
        """The power-function averages, by sigma_rel and parameter name."""
        return {
            sigma_rel: self._averages[_label(sigma_rel)] for sigma_rel in self.config.sigma_rels
        }

    def decays_at(self, num_updates: int) -> list[float]:
        """Returns each average's decay in the update that follows `num_updates` earlier ones."""
        powers = [power_decay(gamma, num_updates) for gamma in self._gammas]
        if self.config.decay is None:
            return powers
        ramp = (1 + num_updates) / (10 + num_updates) if self.config.warmup else 1.0
        return [min(self.config.decay, ramp), *powers]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], num_updates: int) -> None:
        """Moves the averages towards `parameters`, given in the order of construction."""
        weights = [p if p.dtype == torch.float32 else p.float() for p in parameters]
        for average, decay in zip(
            self._averages.values(), self.decays_at(num_updates), strict=True
        ):
            torch._foreach_lerp_(list(average.values()), weights, 1.0 - decay)

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Gives the network the average that the bundle gets, and eval mode, for the while.

        Weights and averages change places, one tensor after another, so that neither a copy of the
        network nor another address of a weight comes of it. Within, no average may be updated.
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
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32, name  # or the exchange would round
            kept = parameter.detach().clone()
            parameter.copy_(average[name])
            average[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all averages: that of `decay` by parameter name, others `SIGMA_REL/NAME`."""
        return {
            label + name: tensor
            for label, average in self._averages.items()
            for name, tensor in average.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores averages saved from `state_dict`, of the same network.

        Raises ValueError where they are not of the same profiles, KeyError with the name of a
        tensor that one of the two lacks.
        """
        ours = self.state_dict()
        found, wanted = (_profiles(names) for names in (state, ours))
        if found != wanted:
            raise ValueError(
                f"ema: the checkpoint has averages of {', '.join(found)}, the settings ask for "
                f"{', '.join(wanted)}; an average begins with the run: use the old ema.decay and "
                "ema.sigma_rels to go on, or another --name or --out to begin anew"
            )
        if odd := state.keys() ^ ours.keys():
            raise KeyError(min(odd))
        for name, tensor in ours.items():
            tensor.copy_(state[name])


def _labels(config: EMAConfig) -> list[str]:
    """Returns what the averages' names in a file begin with: nothing for that of `decay`."""
    powers = [_label(sigma_rel) for sigma_rel in config.sigma_rels]
    return powers if config.decay is None else ["", *powers]


def _label(sigma_rel: float) -> str:
    return f"{sigma_rel}/"


def _profiles(names: Iterable[str]) -> list[str]:
    """Returns for people which averages these names of tensors belong to, sorted."""
    labels = {name.rpartition("/")[0] for name in names}
    return sorted(f"sigma_rel {label}" if label else "decay" for label in labels)


def check_sigma_rel(flag: str, sigma_rel: float) -> None:
    """Raises ValueError for a width that no power function of gamma > 0 has."""
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(
            f"{flag}: expected more than 0 and less than {MAX_SIGMA_REL:.4f}, which is the mean of "
            f"all steps, found {sigma_rel}"
        )


def gamma_of(sigma_rel: float) -> float:
    """Returns the exponent of the power function of a relative width.

    The positive root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2, multiplied out:
    Karras et al. 2024 (2312.02696), equation 126 and algorithm 2.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """Returns the standard deviation of the profile t^gamma on [0, 1], a share of the run."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def power_decay(gamma: float, num_updates: int) -> float:
    """Returns the decay of update t = num_updates + 1: (1 - 1 / t)^(gamma + 1).

    Karras et al. 2024 (2312.02696), section 3.1 and equation 127. After T updates step t then
    counts for (t^(gamma + 1) - (t - 1)^(gamma + 1)) / T^(gamma + 1), and the first weights for
    nothing.
    """
    return float((1.0 - 1.0 / (num_updates + 1)) ** (gamma + 1))


if __name__ == "__main__":
    from latent_t2i.model.posthoc import main

    main()
