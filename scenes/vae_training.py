"""Trains the embedded VAE: a stock `AutoencoderKL`, 8x downscaling, 8 channels, 1 M parameters.

Training has four phases: a VAE with 4x downscaling; the same VAE grown to 8x; the decoder alone on
noisy latents; encoder and decoder on noisy latents. Objective: Kingma and Welling 2014.

    python -m scenes.train_encoders --only vae
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import WORLDS, World, stream

BATCH_SIZE = 8
LEARNING_RATE = 1e-3
KL_WEIGHT = 3e-5
"""Per latent value, against the mean squared pixel error."""
FOREGROUND_WEIGHT = 4.0
"""The weight of the pixel error on objects, relative to the background."""
DECODER_NOISE = 0.25
JOINT_NOISE = 0.12
"""Largest standard deviation of the latent noise in the last two phases; the latents' own is 1."""
INITIAL_LOGVAR = -6.0
CHANNELS = (16, 32, 64, 64)


def build(num_levels: int = 4) -> AutoencoderKL:
    """Builds the network with random weights and nearly deterministic posteriors."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=CHANNELS[:num_levels],
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    # With a log-variance near zero, noise would dominate the untrained latents.
    half = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[half:].mul_(0.1)
        vae.quant_conv.bias[half:].fill_(INITIAL_LOGVAR)
    return vae


@torch.no_grad()
def grow(small: AutoencoderKL) -> AutoencoderKL:
    """Returns a network with one more resolution in the middle and the weights of `small`."""
    large = build(len(small.config.block_out_channels) + 1)
    theirs = small.state_dict()
    ours = large.state_dict()
    for name, weight in ours.items():
        # The decoder numbers its blocks from the middle, so the new one shifts the others.
        pattern = r"(?<=^decoder\.up_blocks\.)\d+"
        source = re.sub(pattern, lambda match: str(int(match[0]) - 1), name)
        if source in theirs and theirs[source].shape == weight.shape:
            weight.copy_(theirs[source])
    return large


def batches(worlds: tuple[World, ...], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields images in [-1, 1] (B, 3, H, W) and foreground masks of 0 or 1 (B, 1, H, W)."""
    streams = [stream(world, "train", seed) for world in worlds]
    while True:
        scenes = [next(streams[i % len(streams)])[0] for i in range(BATCH_SIZE)]
        images = to_tensor(render(scenes))
        background = images[:, :, :1, :1]
        yield images, ((images - background).abs().amax(1, keepdim=True) > 0.1).float()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Converts uint8 (B, H, W, 3) to float in [-1, 1].  # (B, 3, H, W)"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train(steps: tuple[int, int, int, int], seed: int) -> AutoencoderKL:
    """Runs the four phases of `steps`; returns a float32 VAE with standardised latents."""
    torch.manual_seed(seed)
    data = batches((WORLDS["full"], WORLDS["full"], WORLDS["easy"]), seed)
    # Growing helps: from random weights the 8x network was at 22 dB when the grown one passed 28.
    small = build(len(CHANNELS) - 1)
    _fit(small, data, steps[0])
    vae = grow(small)
    _fit(vae, data, steps[1])
    standardise(vae, seed)
    # A denoiser's latents differ from an encoder's, so the decoder also learns from noisy ones.
    _fit(vae, data, steps[2], freeze_encoder=True, noise=DECODER_NOISE)
    _fit(vae, data, steps[3], noise=JOINT_NOISE)
    standardise(vae, seed)
    return vae.eval()


def _fit(
    vae: AutoencoderKL,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    num_steps: int,
    *,
    freeze_encoder: bool = False,
    noise: float = 0.0,
) -> None:
    vae.encoder.requires_grad_(not freeze_encoder)
    vae.quant_conv.requires_grad_(not freeze_encoder)
    weights = [p for p in vae.parameters() if p.requires_grad]
    peak = LEARNING_RATE / (2 if freeze_encoder else 1)
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=num_steps + 1, pct_start=0.05
    )
    started, errors = time.perf_counter(), []
    for step in range(1, num_steps + 1):
        images, foreground = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            loss, error = _loss(vae, images, foreground, freeze_encoder, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        errors.append(error)
        if step % 250 == 0 or step == num_steps:
            psnr = -10 * torch.log10(torch.stack(errors).mean() / 4)
            minutes = (time.perf_counter() - started) / 60
            print(f"vae step {step}/{num_steps}  psnr {psnr:.2f} dB  {minutes:.1f} min", flush=True)
            errors = []


def _loss(
    vae: AutoencoderKL, images: torch.Tensor, foreground: torch.Tensor, frozen: bool, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.set_grad_enabled(not frozen):
        posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    if noise:
        spread = noise * torch.rand(len(images), 1, 1, 1)
        latents = latents + spread * torch.randn_like(latents)
    decoded = vae.decode(latents).sample.float()
    squared = (decoded - images).square()
    weighted = (squared * (1 + (FOREGROUND_WEIGHT - 1) * foreground)).mean()
    edges = F.l1_loss(decoded, images)
    divergence = 0.0 if frozen else KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
    return weighted + 0.05 * edges + divergence, squared.mean().detach()


@torch.no_grad()
def standardise(vae: AutoencoderKL, seed: int, num_images: int = 1024) -> None:
    """Folds each latent channel's mean m and scale s into `quant_conv` and `post_quant_conv`.

    With z' = (z - m) / s, the encoder's rows are divided by s, 2 log s is subtracted from the
    log-variance, and the decoder's columns are multiplied by s. decode(encode(x)) does not change,
    and a scaling factor of 1 fits all channels.
    """
    scenes = [scene for scene, _ in islice(stream(WORLDS["full"], "train", seed + 1), num_images)]
    chunks = [to_tensor(render(scenes[i : i + 64])) for i in range(0, num_images, 64)]
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks]).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    half = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]
    encode.bias[:half] = (encode.bias[:half] - mean) / std
    encode.weight[:half] /= std[:, None, None, None]
    encode.bias[half:] -= 2 * std.log()


def save(vae: AutoencoderKL, folder: Path) -> None:
    """Saves float16 weights as a stock diffusers folder."""
    vae.half().save_pretrained(folder)
    vae.float()
