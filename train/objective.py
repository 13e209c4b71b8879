"""The training objective of latent diffusion: from a batch of stored moments to a loss per example.

Latent diffusion (Rombach et al. 2022, 2112.10752) trains a denoiser on scaled VAE latents. The
prediction targets, loss weights and timestep distributions are in model/diffusion.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latent_t2i.model import diffusion
from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.train.batches import Batch
from latent_t2i.train.draws import Draws, draw


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Computes the loss of a batch; holds the constants of the run."""

    alpha_bar: Tensor  # (num_timesteps,)
    empty_text: Tensor  # (T, D)
    text_scale: Tensor | None  # (D,), for int8 text
    latent_shift: Tensor  # (C, 1, 1)
    latent_scale: Tensor  # (C, 1, 1)
    config: ObjectiveConfig
    seed: int
    """Of the random numbers, 64 bits."""

    def draw(self, batch: Batch) -> Draws:
        """Draws the random numbers of a batch, on its device."""
        _, height, width = batch.latent.shape[1:]
        shape = (len(self.latent_scale), height, width)
        return draw(batch.positions, self.seed, shape, self.config)

    def __call__(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Returns losses (B,) float32."""
        # A new sample of the VAE's posterior at every visit (Kingma & Welling 2013, 1312.6114).
        latents = diffusion.sample_posterior(batch.latent, draws.posterior_noise)
        # Shifted and scaled to about unit variance (2112.10752, appendix G).
        latents = (latents - self.latent_shift) * self.latent_scale
        text = batch.text.float()
        if self.text_scale is not None:
            text = text * self.text_scale
        # Caption dropout for classifier-free guidance (Ho & Salimans 2022, 2207.12598).
        text = torch.where(draws.drop[:, None, None], self.empty_text, text)
        return diffusion.loss(
            model,
            self.alpha_bar,
            latents,
            text,
            draws.noise,
            draws.timesteps,
            prediction=self.config.prediction,
            snr_gamma=self.config.snr_gamma,
        )
