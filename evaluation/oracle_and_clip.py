"""The metrics of generated images: the oracle's checks and the CLIP score.

An oracle metric is the share of images with an attribute of their prompt right, over the prompts
that mention the attribute. The CLIP score (Hessel et al. 2021, 2104.08718, as in torchmetrics) is
the mean of max(100 * cos(image, text), 0).
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from latent_t2i.evaluation.drawing import Samples
from latent_t2i.model.encoders import quiet
from latent_t2i.model.folders import fetch
from latent_t2i.scenes import oracle

Checks = dict[str, bool]

CLIP_FILES = ("config.json", "model.safetensors", "tokenizer*", "vocab.json", "merges.txt",
              "preprocessor_config.json")  # fmt: skip


def check_samples(samples: Samples) -> list[Checks]:
    """Returns the oracle's checks of each image, or none if the prompts have no scenes."""
    if any(prompt.scene is None for prompt in samples.prompts):
        return []
    detections = oracle.detect(samples.pixels)
    return [
        oracle.check(prompt.scene, detected, prompt.mentions)
        for prompt, detected in zip(samples.prompts, detections, strict=True)
        if prompt.scene is not None
    ]


def oracle_metrics(kind: str, checks: Sequence[Checks], suffix: str = "") -> dict[str, float]:
    """Returns `oracle/KIND/ATTRIBUTE` for every attribute in `checks`."""
    results: dict[str, list[bool]] = defaultdict(list)
    for image_checks in checks:
        for attribute, passed in image_checks.items():
            results[attribute].append(passed)
    return {
        f"oracle/{kind}/{name}{suffix}": float(np.mean(passed)) for name, passed in results.items()
    }


class ClipScorer:
    """A CLIP model with its tokenizer and image processor."""

    def __init__(self, name: str) -> None:
        self._name = name
        folder = fetch(name, None, CLIP_FILES, flag="--clip")
        with quiet():
            from transformers import AutoImageProcessor

            try:
                self._model = CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True
                ).eval()
                self._tokenizer = CLIPTokenizer.from_pretrained(folder)
                self._processor = AutoImageProcessor.from_pretrained(folder)
            except OSError as error:
                raise ValueError(
                    f"--clip: {folder} is not a complete CLIP model: {error}"
                ) from error

    @torch.inference_mode()
    def score(self, images: NDArray[np.uint8], texts: Sequence[str]) -> float:
        """Returns the CLIP score, 0 to 100, of images (B, H, W, 3) with their texts."""
        starts = range(0, len(texts), 64)
        scores = [self._scores(images[i : i + 64], texts[i : i + 64]) for i in starts]
        mean = float(torch.cat(scores).mean())
        if not math.isfinite(mean):
            raise ValueError(f"--clip: the CLIP score of {self._name} is {mean}, expected a number")
        return mean

    def _scores(self, images: NDArray[np.uint8], texts: Sequence[str]) -> torch.Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt").pixel_values
        ids = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        model = self._model
        seen = _embed(model.vision_model(pixel_values=pixels), model.visual_projection)
        read = _embed(model.text_model(**ids), model.text_projection)
        return (100 * (seen * read).sum(-1)).clamp(min=0)


def _embed(output: object, projection: nn.Module) -> torch.Tensor:
    pooled = output.pooler_output  # type: ignore[attr-defined]
    return F.normalize(projection(pooled), dim=-1)
