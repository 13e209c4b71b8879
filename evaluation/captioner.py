"""A captioner that describes images: BLIP, BLIP-2, GIT and kin of transformers.

The decoding is greedy, so that a description depends on the image alone: neither on the batch nor
on random numbers. Descriptions are remembered by the image's content, because the rows of an
evaluation share images; a description is short, so memory stays small.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoTokenizer

from latent_t2i.evaluation.metrics.metric import Context, MissingWeights
from latent_t2i.evaluation.networks import (
    find_network,
    load_image_processor,
    load_tokenizer,
)
from latent_t2i.model.encoders import fingerprint, load_network, quiet

FLAG = "--weights.captioner"
EXAMPLE = "Salesforce/blip-image-captioning-large"
FILES = ("config.json", "generation_config.json", "model.safetensors*",
         "model-*-of-*.safetensors", "tokenizer*", "vocab*", "merges.txt",
         "special_tokens_map.json", "preprocessor_config.json")  # fmt: skip
KINDS = ("blip", "blip-2", "git")
"""Models that describe an image without being prompted."""
MAX_NEW_TOKENS = 30


class Captioner:
    """A network that describes images, with its tokenizer and image processor."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Loads a folder or Hub repository; raises ValueError if it is not a complete captioner."""
        self.name = name
        self._device = device
        folder = find_network(name, FILES, KINDS, flag=FLAG)
        self._tokenizer = load_tokenizer(AutoTokenizer, folder, flag=FLAG)
        self._processor = load_image_processor(folder, flag=FLAG)
        model = load_network(AutoModelForImageTextToText, folder, "a captioner", flag=FLAG)
        self.fingerprint = fingerprint(model)
        self._model = model.to(device)
        self._known: dict[bytes, str] = {}

    def describe(self, images: NDArray[np.uint8]) -> list[str]:
        """Returns a caption of each image (B, H, W, 3)."""
        digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
        new = {digest: n for n, digest in enumerate(digests) if digest not in self._known}
        if new:
            captions = self._generate(images[list(new.values())])
            self._known |= dict(zip(new, captions, strict=True))
        return [self._known[digest] for digest in digests]

    @torch.inference_mode()
    def _generate(self, images: NDArray[np.uint8]) -> list[str]:
        pixels = self._processor(images=list(images), return_tensors="pt").pixel_values
        with quiet():
            ids = self._model.generate(
                pixel_values=pixels.to(self._device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        found: Sequence[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in found]

    def identity(self) -> dict[str, str]:
        """Returns what the descriptions depend on besides the images."""
        return {
            "captioner": self.fingerprint,
            "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens",
            "image_processor": "pil",
        }


def load_captioner(context: Context) -> Captioner:
    """Returns the captioner of the settings, which all rows share."""
    name = context.config.weights.captioner
    if name is None:
        raise MissingWeights(
            f"{FLAG}: caption similarity needs a captioner; expected its folder or Hub name, such "
            f"as {EXAMPLE}: hf download {EXAMPLE} --local-dir FOLDER gets it"
        )
    return context.load(("captioner", name), lambda: Captioner(name, context.device))
