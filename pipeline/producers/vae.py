"""Latents of an autoencoder, as they leave its encoder: posterior moments, or plain latents.

Moments, so that training samples them anew at each visit. They are stored unscaled in float16.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_t2i.model.encoders import (
    Autoencoder,
    encode_images,
    fingerprint,
    latent_channels,
    latent_kind,
    load_vae,
    round_to_bfloat16,
    vae_downscale,
)
from latent_t2i.pipeline.producers.producer import Size
from latent_t2i.shards.layout import FieldSpec, Identity, Per
from latent_t2i.shards.schema import LatentKind

MAX_COMPILED_SHAPES = 1000


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
class VaeProducer:
    """Makes the field `latent` of views."""

    per: ClassVar[Per] = "view"
    network: Autoencoder
    identity: Identity
    """With the hash of the float32 weights, before any rounding to bfloat16."""
    batch_size: int
    compilation: Compilation | None = None
    """Set if the network's encoder is compiled."""

    @property
    def kind(self) -> LatentKind:
        """Whether latents are moments or plain."""
        return latent_kind(self.network)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return vae_downscale(self.network)

    def fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        """Returns the latent's field: (2C, h, w) for moments, else (C, h, w)."""
        width, height = (side // self.downscale for side in size_px)
        channels = latent_channels(self.network) * (2 if self.kind == "moments" else 1)
        shape = channels, height, width
        return (
            FieldSpec(
                name="latent", dtype="float16", shape=shape, per="view", made_by=self.identity
            ),
        )

    def encode(self, batch: Tensor) -> tuple[Tensor]:
        """Encodes images (B, 3, H, W) to latents (B, C', h, w)."""
        if self.compilation is None:
            return (encode_images(self.network, batch),)
        # One shape per size of images. Otherwise the kernels, and with them the last bits, would
        # depend on which shapes the run has seen before.
        images = F.pad(batch, (0, 0) * 3 + (0, self.batch_size - len(batch)))
        with self.compilation.turn(images.shape):
            return (encode_images(self.network, images)[: len(batch)],)


def load_vae_producer(
    name: str, revision: str | None, *, bfloat16: bool, compiled: bool, batch_size: int
) -> VaeProducer:
    """Loads an autoencoder. Raises ValueError if it is unavailable or not supported."""
    vae = load_vae(name, revision=revision)
    identity = Identity(name=name, revision=revision, sha256=fingerprint(vae))
    if bfloat16:
        round_to_bfloat16(vae)
    return VaeProducer(
        network=vae,
        identity=identity,
        batch_size=batch_size,
        compilation=compile_encoder(vae) if compiled else None,
    )


def compile_encoder(vae: Autoencoder) -> Compilation:
    """Compiles the VAE's encoder, for each shape of images at its first use."""
    from torch._inductor import config

    # Otherwise inductor may choose a kernel by its speed in this run, and with it the last bits.
    options = {"deterministic": True} if hasattr(config, "deterministic") else {}  # PyTorch >= 2.10
    vae.encoder.compile(dynamic=False, options=options)
    return Compilation()
