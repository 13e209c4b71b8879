"""Approximate pictures of latents, for previews while denoising: one matrix instead of a decoder.

A VAE's latents are nearly linear in the picture's local colours, so colours are fitted by least
squares. The matrix is fitted once per VAE in well under a second, and applying it costs nothing.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latent_t2i.model.encoders import Autoencoder, encode_images, latent_channels, vae_downscale

NUM_IMAGES = 32
LATENT_SIDE = 8
"""Height and width of the fitted images, in latents."""
RIDGE = 1e-3
"""Keeps the fit finite for channels that do not depend on the picture."""


@torch.no_grad()
def fit_latent_to_rgb(vae: Autoencoder, *, seed: int = 0) -> Tensor:
    """Returns the matrix (C + 1, 3) from scaled latents and a constant to colours in [-1, 1].

    It is fitted on pictures of random rectangles that the VAE encodes and decodes. Latents are
    multiplied by the scaling factor, as in a stock pipeline.
    """
    downscale, channels = vae_downscale(vae), latent_channels(vae)
    pictures = random_pictures(NUM_IMAGES, LATENT_SIDE * downscale, seed)
    device = next(vae.parameters()).device
    latents = encode_images(vae, pictures.to(device))[:, :channels]  # (N, C, h, w)
    decoded = vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)
    colours = nn.functional.avg_pool2d(decoded, downscale)  # (N, 3, h, w)
    scaled = latents * vae.config.scaling_factor
    inputs = _with_constant(scaled).flatten(0, 2).double().cpu()  # (N * h * w, C + 1)
    targets = colours.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()  # (N * h * w, 3)
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, inputs.T @ targets).float()


def preview(latents: Tensor, matrix: Tensor, size: tuple[int, int]) -> Image.Image:
    """Returns an approximate picture of scaled latents (C, h, w), enlarged to (width, height)."""
    pixels = (_with_constant(latents[None].float().cpu()) @ matrix)[0]  # (h, w, 3)
    array = pixels.nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(array)).resize(size, Image.Resampling.BICUBIC)


def random_pictures(num: int, side: int, seed: int) -> Tensor:
    """Returns pictures (N, 3, side, side) in [-1, 1]: four rectangles on a plain background."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    pictures = (uniform(num, 3, 1, 1) * 2 - 1).expand(num, 3, side, side).clone()
    for picture in pictures:
        for _ in range(4):
            top, left, height, width = (int(value * side) for value in uniform(4))
            colour = uniform(3, 1, 1) * 2 - 1
            picture[:, top : top + height + 1, left : left + width + 1] = colour
    return pictures


def _with_constant(latents: Tensor) -> Tensor:
    """Returns latents (N, C, h, w) as (N, h, w, C + 1) with a last channel of ones."""
    moved = latents.permute(0, 2, 3, 1)
    return torch.cat([moved, torch.ones_like(moved[..., :1])], dim=-1)
