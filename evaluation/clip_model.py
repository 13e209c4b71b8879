"""CLIP as a judge: embeddings of images and of captions, for the alignment metrics.

Every CLIPModel of transformers works: OpenAI's, OpenCLIP's converted ones, the embedded one. Images
go through the processor's PIL backend, so that a figure does not depend on whether torchvision is
installed. Captions beyond the model's limit (77 tokens) are cut in such a way that the end token
stays, because CLIP reads its embedding there. The main trade-off is the scorer itself: a CLIP that
conditioned the model's training favours its images, hence `conditioning_warning`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.metrics.metric import Batch, Context
from latent_t2i.evaluation.networks import (
    find_network,
    load_image_processor,
    load_tokenizer,
)
from latent_t2i.model.encoders import fingerprint, load_network
from latent_t2i.model.paths import find_path, output_root

FLAG = "--weights.clip"
CLIP_FILES = ("config.json", "model.safetensors*", "model-*-of-*.safetensors", "tokenizer*",
              "vocab.json", "merges.txt", "preprocessor_config.json")  # fmt: skip
NUM_AT_ONCE = 64
SAME_WEIGHTS = 0.01
"""Largest relative difference of two tensors that count as the same; float16 stays far below."""


class Clip:
    """A CLIP model with its tokenizer and image processor."""

    warning: str = ""
    """What makes its scores misleading in this evaluation."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Loads a folder or Hub repository; raises ValueError if it is not a complete CLIP."""
        self.name = name
        self._device = device
        folder = find_network(name, CLIP_FILES, ("clip",), flag=FLAG)
        self._tokenizer = load_tokenizer(CLIPTokenizer, folder, flag=FLAG)
        self._processor = load_image_processor(folder, flag=FLAG)
        model = load_network(CLIPModel, folder, "a CLIP model", flag=FLAG)
        self.fingerprint = fingerprint(model)
        self.model = model.to(device)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a caption, with the start and end tokens."""
        return int(self.model.config.text_config.max_position_embeddings)

    def identity(self) -> dict[str, str]:
        """Returns what the embeddings depend on."""
        return {"clip": self.fingerprint, "image_processor": "pil"}

    @torch.inference_mode()
    def embed_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the embeddings (B, D), of length 1, of images (B, H, W, 3)."""
        parts = [self._embed_images(part) for part in _parts(images)]
        return np.concatenate(parts)

    def _embed_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = self._processor(images=list(images), return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
        return _normalised(self.model.visual_projection(seen))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns the embeddings (B, D), of length 1, of texts."""
        parts = [self._embed_texts(part) for part in _parts(texts)]
        return np.concatenate(parts)

    def _embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # Without a limit of its own, a tokenizer would cut nothing.
        ids = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self._device)
        read = self.model.text_model(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask
        ).pooler_output
        return _normalised(self.model.text_projection(read))


def load_clip(context: Context) -> Clip:
    """Returns the CLIP of the settings, which the metrics of all rows share."""
    name = context.config.weights.clip

    def load() -> Clip:
        clip = Clip(name, context.device)
        clip.warning = conditioning_warning(context.config, clip)
        if clip.warning and os.environ.get("RANK", "0") == "0":
            print(f"warning: {clip.warning}")
        return clip

    return context.load(("clip", name), load)


def embed_batch(clip: Clip, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the embeddings (B, D) of a batch's images and of their prompts.

    An image without captions has the empty prompt's; its score must be left out.
    """
    texts = tuple(item.captions[0] if item.captions else "" for item in batch.items)
    images = batch.cached(
        ("clip images", clip.fingerprint), lambda: clip.embed_images(batch.images)
    )
    return images, batch.cached(
        ("clip texts", clip.fingerprint, texts), lambda: clip.embed_texts(texts)
    )


def conditioning_warning(config: EvaluationConfig, clip: Clip) -> str:
    """Returns a warning if the bundle's text encoder is the scorer's own, else an empty text."""
    folder = _bundle_folder(config)
    if folder is None or not is_text_encoder_of(folder, clip):
        return ""
    return (
        f"{FLAG}: {clip.name} is also the text encoder of the bundle {folder}, which favours its "
        "images; compare bundles of other text encoders with another CLIP"
    )


def is_text_encoder_of(bundle: Path, clip: Clip) -> bool:
    """Returns whether a bundle's text encoder has the weights of the scorer's text tower."""
    files = sorted((bundle / "text_encoder").glob("*.safetensors"))
    # transformers 5 dropped this prefix of CLIPTextModel's names.
    stored = {
        name.removeprefix("text_model."): tensor
        for file in files
        for name, tensor in load_file(file).items()
    }
    own = clip.model.text_model.state_dict()
    weights = [name for name in own if name in stored and own[name].is_floating_point()]
    return bool(weights) and all(_is_close(own[name], stored[name]) for name in weights)


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    # A bundle may store the weights as float16.
    if one.shape != other.shape:
        return False
    one, other = one.cpu().float(), other.float()
    return bool((one - other).norm() <= SAME_WEIGHTS * one.norm())


def _bundle_folder(config: EvaluationConfig) -> Path | None:
    """Returns the bundle's folder; None for finished images, or if there is none yet."""
    if config.images is not None:
        return None
    own = output_root() / "runs" / config.name / "bundle"
    folder = own if config.bundle is None else find_path(config.bundle)
    return folder if folder is not None and folder.is_dir() else None


def _parts(values: Any) -> list[Any]:
    return [values[i : i + NUM_AT_ONCE] for i in range(0, len(values), NUM_AT_ONCE)]


def _normalised(vectors: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = F.normalize(vectors, dim=-1).cpu().numpy()
    return found
