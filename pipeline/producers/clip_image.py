"""CLIP's embedding of each view, for conditioning on images, filtering and retrieval."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from latent_t2i.model.encoders import fingerprint
from latent_t2i.pipeline.producers.producer import Size, load_named, normalise
from latent_t2i.shards.layout import FieldSpec, Identity, Per


@dataclass(frozen=True, kw_only=True)
class ClipImageProducer:
    """Makes the field `clip_image`: projected embeddings (D,), not normalised.

    The view is resized by its shorter side to CLIP's input and cropped to a square in the centre,
    as CLIP's own preprocessing does with an image.
    """

    per: ClassVar[Per] = "view"
    network: CLIPVisionModelWithProjection
    identity: Identity

    def fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        """Returns the embedding's field."""
        return (
            FieldSpec(
                name="clip_image",
                dtype="float16",
                shape=(self.network.config.projection_dim,),
                per="view",
                made_by=self.identity,
            ),
        )

    def encode(self, batch: Tensor) -> tuple[Tensor]:
        """Embeds images (B, 3, H, W) as (B, D)."""
        config: Any = self.network.config
        side = int(config.image_size)
        height, width = batch.shape[2:]
        scale = side / min(height, width)
        size = [round(height * scale), round(width * scale)]
        images = F.interpolate(batch, size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = ((length - side) // 2 for length in size)
        images = images[:, :, top : top + side, left : left + side]
        pixels = normalise(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        embeddings: Tensor = self.network(pixel_values=pixels).image_embeds
        return (embeddings,)


def load(name: str, revision: str | None) -> ClipImageProducer:
    """Loads the image tower of a CLIP. Raises ValueError if it is unavailable."""
    network = load_named(
        CLIPVisionModelWithProjection, name, revision, ("clip", "clip_vision_model")
    )
    identity = Identity(name=name, revision=revision, sha256=fingerprint(network))
    return ClipImageProducer(network=network, identity=identity)
