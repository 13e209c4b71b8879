"""Runs the producers on their device: pixels and token ids in, arrays of the shards out."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.pipeline.config import ViewsConfig
from latent_t2i.pipeline.images import VIEW_BOX
from latent_t2i.pipeline.producers.producer import Captions, Producer, Size, produce
from latent_t2i.pipeline.producers.text import TextProducer
from latent_t2i.pipeline.producers.vae import VaeProducer
from latent_t2i.shards.layout import FieldSpec, Per

CAPTIONS_PER_IMAGE = 4
"""The batch size of captions, as a multiple of that of views."""
CPU_BATCH_SIZE = 32
MAX_GPU_BATCH_SIZE = 256
MAX_ACTIVATION_SIZE = 2**31 - 1
"""Largest index of many GPU kernels; those of cuDNN for larger tensors are slow or missing."""
ENCODER_CHANNELS = 128
"""Of the encoder's largest activation, in a Stable Diffusion VAE."""
BYTES_PER_PIXEL = 2048
"""Most memory of a Stable Diffusion VAE's encoder: four float32 activations of 128 channels."""
TF32_CAPABILITY = (8, 0)
Apply = Callable[..., Any]
"""Calls a function with the encoders, here or on another machine, and with further arguments."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The producers on their device, with the settings of their use."""

    vae: VaeProducer
    text: TextProducer
    further: tuple[Producer, ...] = ()
    device: torch.device
    views: ViewsConfig
    batch_size: int
    device_name: str = "cpu"
    """The kind of device: the provenance records it."""
    tf32: bool = False
    """Whether a GPU may round the factors of float32 products to TF32."""

    def producers(self, per: Per) -> list[Producer]:
        """Returns the producers of views, or of captions."""
        producers: tuple[Producer, ...] = (self.vae, self.text, *self.further)
        return [producer for producer in producers if producer.per == per]

    def further_fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        """Returns the fields besides latent, text and tokens, for images of a (width, height)."""
        found = [spec for producer in self.further for spec in producer.fields(size_px)]
        return (*([VIEW_BOX] if self.views.crops > 1 else []), *found)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Shape of a caption's hidden states.  # (T, D)"""
        return self.text.max_tokens, self.text.encoder.width

    def latent_shape(self, size_px: Size) -> tuple[int, int, int, int]:
        """Returns the latent's shape for images (width, height).  # (views, 2C or C, h, w)"""
        (spec,) = self.vae.fields(size_px)
        channels, height, width = spec.shape
        return self.views.num, channels, height, width


@torch.inference_mode()
def encode_views(encoders: Encoders, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Encodes the crops (crops, B, H, W, 3) of images to fields (B, views, ...) by name.

    The order of views is crop 0, crop 0 flipped, crop 1, ...
    """
    height, width = pixels.shape[2:4]
    views = []
    for crop in _to_device(pixels, encoders.device):
        images = crop.permute(0, 3, 1, 2).float().div(127.5).sub(1)  # (B, 3, H, W) in [-1, 1]
        views.append(images)
        views += [images.flip(3)] if encoders.views.flip else []
    fields: dict[str, NDArray[Any]] = {}
    for producer in encoders.producers("view"):
        parts = [produce(producer, view, (width, height)) for view in views]
        for name in parts[0]:
            fields[name] = torch.stack([part[name] for part in parts], 1).cpu().numpy()
    return fields


@torch.inference_mode()
def encode_captions(encoders: Encoders, captions: Captions) -> dict[str, NDArray[Any]]:
    """Encodes captions to fields (B, ...) by name."""
    fields: dict[str, NDArray[Any]] = {}
    for producer in encoders.producers("caption"):
        found = produce(producer, captions)
        fields |= {name: items.cpu().numpy() for name, items in found.items()}
    return fields


def encode_empty_prompt(encoders: Encoders) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Returns text (T, D) and tokens (T,) of the empty prompt."""
    (token_ids,) = encoders.text.tokenize([""])
    with single_threaded():
        empty = encode_captions(encoders, {"": token_ids})
    return empty["text"][0], empty["tokens"][0]


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
    """Returns the largest power of two with which two batches fit into half of a GPU's memory.

    The largest activation has fewer than 2**31 numbers.
    """
    by_memory = memory_bytes // 4 // (BYTES_PER_PIXEL * num_pixels)
    most = min(by_memory, MAX_ACTIVATION_SIZE // (ENCODER_CHANNELS * num_pixels))
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
