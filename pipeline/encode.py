"""Runs the frozen networks: pictures and captions in, what the shards hold out.

Latents are stored as the posterior's moments, so that training can draw from it anew at each visit;
those of a VAE without a posterior as they are. Values are stored in float16, text also in int8.
On a CPU each call runs in the thread that makes it, and many such threads run side by side: that is
faster than many threads in one call, and the values do not depend on how many there are.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latent_t2i.model.encoders import (
    TextEncoders,
    encode_images,
    fingerprint,
    latent_channels,
    latent_kind,
    load_text_encoders,
    load_vae,
    round_to_bfloat16,
    vae_downscale,
)
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.shards.schema import LatentKind

CAPTIONS_PER_IMAGE = 4
"""The text encoder's batch is so many times the VAE's."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen networks on their device, and how to use them."""

    vae: nn.Module
    vae_sha256: str
    """Of the float32 weights, before any rounding to bfloat16."""
    text: TextEncoders
    device: torch.device
    views: int
    max_tokens: int
    batch_size: int

    @property
    def kind(self) -> LatentKind:
        """Whether latents are moments or plain."""
        return latent_kind(self.vae)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Of a caption's hidden states.  # (T, D)"""
        return self.max_tokens, self.text.width

    def latent_shape(self, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
        """Of an example's latent, for images (width, height).  # (views, 2C or C, h, w)"""
        width, height = (side // vae_downscale(self.vae) for side in size_px)
        parts = 2 if self.kind == "moments" else 1
        return self.views, parts * latent_channels(self.vae), height, width


def load_encoders(config: PipelineConfig, device: torch.device) -> Encoders:
    """Loads the encoders. Raises ValueError for one that is not to be had or does not fit."""
    vae = load_vae(config.vae, revision=config.vae_revision)
    vae_sha256 = fingerprint(vae)
    if config.vae_dtype == "bfloat16":
        round_to_bfloat16(vae)
    downscale = vae_downscale(vae)
    if config.image_size_px % downscale:
        raise ValueError(
            f"--image-size-px: {config.image_size_px} is not a multiple of {downscale}, "
            f"by which the VAE {config.vae!r} scales down"
        )
    text = load_text_encoders(*config.text_encoders, hidden_state=config.text_hidden_state)
    if config.max_tokens > text.max_length:
        raise ValueError(
            f"--max-tokens: {config.max_tokens} is more than the {text.max_length} "
            f"that the text encoder {config.text_encoder!r} can take"
        )
    vae.to(device)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    if config.compile:
        vae.encoder.compile()
    return Encoders(
        vae=vae,
        vae_sha256=vae_sha256,
        text=text.to(device),
        device=device,
        views=config.views,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
    )


@torch.inference_mode()
def encode_views(encoders: Encoders, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Encodes pictures (B, H, W, 3) to latents (B, views, C', h, w); the second view is flipped."""
    images = _to_device(pixels, encoders.device).permute(0, 3, 1, 2)
    images = images.float().div(127.5).sub(1)  # (B, 3, H, W) in [-1, 1]
    views = [images, images.flip(3)][: encoders.views]
    return _to_float16(torch.stack([encode_images(encoders.vae, view) for view in views], dim=1))


@torch.inference_mode()
def encode_captions(
    encoders: Encoders, captions: Sequence[str]
) -> tuple[NDArray[np.float16], NDArray[np.int32], NDArray[np.bool_]]:
    """Encodes captions to text (N, T, D), tokens (N, T) and whether each was cut (N,)."""
    hidden, ids, truncated = encoders.text.encode(captions, encoders.max_tokens)
    return _to_float16(hidden), ids.cpu().numpy().astype(np.int32), truncated.cpu().numpy()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Has each operation run in the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(name: str, local_rank: int) -> torch.device:
    """Returns the device of a name; `auto` is this process's GPU, if there is one.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: no device is called {name!r}; auto, cpu, cuda are") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device: {name!r} asked for, but there are {count} GPUs here")
    return device


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_device(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    images = torch.from_numpy(pixels)
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images


def _to_float16(values: Tensor) -> NDArray[np.float16]:
    array: NDArray[np.float16] = values.to(torch.float16).cpu().numpy()
    return array
