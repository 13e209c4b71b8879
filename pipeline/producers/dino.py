"""Patch features of a DINOv2, for losses that align the denoiser's features (REPA, 2410.06940)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from latent_t2i.model.encoders import fingerprint
from latent_t2i.pipeline.producers.producer import Size, load_named, normalise
from latent_t2i.shards.layout import FieldSpec, Identity, Per

PATCH_PX = 16
"""Pixels of the view per patch, as in REPA: a view of 256 px becomes 16 x 16 patches."""
MODEL_TYPES = ("dinov2", "dinov2_with_registers")


@dataclass(frozen=True, kw_only=True)
class DinoProducer:
    """Makes the field `dino`: features (N, D) of the patches, row by row."""

    per: ClassVar[Per] = "view"
    network: Any
    identity: Identity

    def fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        """Returns the field of the patches; their number depends on the size."""
        width, height = map(num_patches, size_px)
        return (
            FieldSpec(
                name="dino",
                dtype="float16",
                shape=(height * width, self.network.config.hidden_size),
                per="view",
                made_by=self.identity,
            ),
        )

    def encode(self, batch: Tensor) -> tuple[Tensor]:
        """Returns the features (B, N, D) of images (B, 3, H, W)."""
        size = [num_patches(side) * self.network.config.patch_size for side in batch.shape[2:]]
        images = F.interpolate(batch, size, mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = normalise(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        tokens: Tensor = self.network(pixel_values=pixels).last_hidden_state
        return (tokens[:, 1 + getattr(self.network.config, "num_register_tokens", 0) :],)


def num_patches(side_px: int) -> int:
    """Returns how many patches a side of a view has."""
    return max(round(side_px / PATCH_PX), 1)


def load(name: str, revision: str | None) -> DinoProducer:
    """Loads a DINOv2. Raises ValueError if it is unavailable."""
    network = load_named(AutoModel, name, revision, MODEL_TYPES)
    identity = Identity(name=name, revision=revision, sha256=fingerprint(network))
    return DinoProducer(network=network, identity=identity)
