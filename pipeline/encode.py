"""Runs the frozen networks: pixels and token ids in, the arrays of the shards out.

Latents are stored as the posterior's moments, so that training samples them anew at each visit; for
a VAE without a posterior they are plain. Values are stored in float16, text optionally in int8.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latent_t2i.model.encoders import (
    Autoencoder,
    TextEncoder,
    encode_images,
    latent_channels,
    latent_kind,
    vae_downscale,
)
from latent_t2i.shards.schema import LatentKind

CAPTIONS_PER_IMAGE = 4
"""The text encoder's batch size, as a multiple of the VAE's."""
CPU_BATCH_SIZE = 32
MAX_GPU_BATCH_SIZE = 256
BYTES_PER_PIXEL = 2048
"""Most memory of a Stable Diffusion VAE's encoder: four float32 activations of 128 channels."""
MAX_COMPILED_SHAPES = 1000
TF32_CAPABILITY = (8, 0)
Apply = Callable[..., Any]
"""Calls a function with the encoders, here or on another machine, and with further arguments."""


class Compilation:
    """Lets one thread compile the encoder for each shape of images, while the others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: set[torch.Size] = set()

    @contextmanager
    def turn(self, shape: torch.Size) -> Iterator[None]:
        """Surrounds a call of the encoder with images of `shape`."""
        if shape in self._compiled:
            yield
            return
        # By default, the ninth shape would run without compilation. Some versions of PyTorch keep
        # these settings per thread.
        limits = dict.fromkeys(
            ("recompile_limit", "accumulated_recompile_limit"), MAX_COMPILED_SHAPES
        )
        with self._lock, torch._dynamo.config.patch(limits):
            yield
            self._compiled.add(shape)


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen networks on their device, with the settings of their use."""

    vae: nn.Module
    vae_sha256: str
    """Of the float32 weights, before any rounding to bfloat16."""
    text: TextEncoder
    device: torch.device
    views: int
    max_tokens: int
    batch_size: int
    device_name: str = "cpu"
    """The kind of device: the provenance records it."""
    tf32: bool = False
    """Whether a GPU may round the factors of float32 products to TF32."""
    compilation: Compilation | None = None
    """Set if the VAE's encoder is compiled."""

    @property
    def kind(self) -> LatentKind:
        """Whether latents are moments or plain."""
        return latent_kind(self.vae)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Shape of a caption's hidden states.  # (T, D)"""
        return self.max_tokens, self.text.width

    def latent_shape(self, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
        """Returns the latent's shape for images (width, height).  # (views, 2C or C, h, w)"""
        width, height = (side // vae_downscale(self.vae) for side in size_px)
        parts = 2 if self.kind == "moments" else 1
        return self.views, parts * latent_channels(self.vae), height, width


@torch.inference_mode()
def encode_views(encoders: Encoders, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Encodes images (B, H, W, 3) to latents (B, views, C', h, w); the second view is flipped."""
    num = len(pixels)
    if encoders.compilation is not None:
        # One shape per size of images. Otherwise the kernels, and with them the last bits, would
        # depend on which shapes the run has seen before.
        pixels = np.pad(pixels, ((0, encoders.batch_size - num), (0, 0), (0, 0), (0, 0)))
    images = _to_device(pixels, encoders.device).permute(0, 3, 1, 2)
    images = images.float().div(127.5).sub(1)  # (B, 3, H, W) in [-1, 1]
    compilation = encoders.compilation
    turn = compilation.turn(images.shape) if compilation is not None else nullcontext()
    views = [images, images.flip(3)][: encoders.views]
    with turn:
        latents = torch.stack([encode_images(encoders.vae, view) for view in views], dim=1)
    return _to_float16(latents[:num])


@torch.inference_mode()
def encode_captions(
    encoders: Encoders, token_ids: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float16], NDArray[np.int32], NDArray[np.bool_]]:
    """Encodes the token ids of captions, as `TextEncoder.tokenize` returns them.

    Returns text (N, T, D), tokens (N, T) and which captions were truncated (N,).
    """
    hidden, ids, is_cut = encoders.text.encode(token_ids, encoders.max_tokens)
    return _to_float16(hidden), ids.numpy().astype(np.int32), is_cut.numpy()


def encode_empty_prompt(encoders: Encoders) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Returns text (T, D) and tokens (T,) of the empty prompt."""
    with single_threaded():
        text, tokens, _ = encode_captions(encoders, encoders.text.tokenize([""]))
    return text[0], tokens[0]


def compile_encoder(vae: Autoencoder) -> Compilation:
    """Compiles the VAE's encoder, for each shape of images at its first use."""
    from torch._inductor import config

    # Otherwise inductor may choose a kernel by its speed in this run, and with it the last bits.
    options = {"deterministic": True} if hasattr(config, "deterministic") else {}  # PyTorch >= 2.10
    vae.encoder.compile(dynamic=False, options=options)
    return Compilation()


def supports_tf32(device: torch.device) -> bool:
    """Returns whether a device has TF32 units, as NVIDIA's GPUs since Ampere do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= TF32_CAPABILITY


def default_batch_size(device: torch.device, num_pixels: int) -> int:
    """Returns how many images of `num_pixels` are encoded at once.

    On a GPU it is a power of two, from the size of its memory. That is a property of its model, so
    that the same command gives the same bytes on another GPU of the model.
    """
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    return fitting_batch_size(torch.cuda.get_device_properties(device).total_memory, num_pixels)


def fitting_batch_size(memory_bytes: int, num_pixels: int) -> int:
    """Returns the largest power of two with which two batches fit into half of a GPU's memory."""
    most = memory_bytes // 4 // (BYTES_PER_PIXEL * num_pixels)
    return min(1 << max(most.bit_length() - 1, 0), MAX_GPU_BATCH_SIZE)


@contextmanager
def fixed_kernels(*, tf32: bool) -> Iterator[None]:
    """Makes a GPU's kernels a function of shapes and settings, temporarily.

    With cuDNN's benchmark on, they would depend on which was fastest in this run. TF32 applies to
    convolutions and matrix products of float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # "high" is TF32
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Runs each torch operation in the calling thread, temporarily.

    Many threads with one batch each are faster on a CPU than many threads in one batch, and the
    values do not depend on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(name: str, local_rank: int) -> torch.device:
    """Returns the device called `name`; `auto` is this process's GPU, or the CPU without GPUs.

    Raises ValueError for a device that does not exist.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"--device: expected auto, cpu, cuda or cuda:NUMBER, found {name!r}"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device: {name!r} does not exist: this machine has {count} GPUs")
    return device


def device_name(device: torch.device) -> str:
    """Returns the kind of a device: a GPU's model, or `cpu`. Its bits may differ from others'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _to_device(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    images = torch.from_numpy(pixels)
    # Only a copy from pinned memory is asynchronous.
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images


def _to_float16(values: Tensor) -> NDArray[np.float16]:
    array: NDArray[np.float16] = values.to(torch.float16).cpu().numpy()
    return array
