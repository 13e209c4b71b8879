"""Random walks of weights and their averages, for tests of EMA."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from latent_t2i.model.ema import gamma_of


def random_walk(layer: nn.Module, num_steps: int) -> Iterator[int]:
    """Adds noise to a layer's parameters in each step; yields the number of earlier steps."""
    generator = torch.Generator().manual_seed(3)
    for step in range(num_steps):
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        yield step


def direct_sum(history: list[Tensor], sigma_rel: float) -> Tensor:
    """Returns the power-function average of the weights of steps 1 to T."""
    powers = np.arange(len(history) + 1.0) ** (gamma_of(sigma_rel) + 1)
    shares = torch.from_numpy(np.diff(powers) / powers[-1])
    return torch.einsum("t,t...->...", shares, torch.stack(history).double())
