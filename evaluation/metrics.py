"""Figures of drawn pictures: what the oracle reads, and CLIP score.

Oracle figures are shares of pictures that fulfil an attribute of their prompt, counted over the
prompts that tell it. CLIP score (Hessel et al. 2021, 2104.08718; torchmetrics' definition) is the
mean over pictures of max(100 * cos(image, text), 0).
"""

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


def judge(drawn: Samples) -> list[Checks]:
    """Returns the oracle's verdict on each picture; none where the prompts have no scene."""
    pairs = [(p, r) for p, r in zip(drawn.prompts, oracle.detect(drawn.pixels), strict=True)]
    return [oracle.check(p.scene, r, p.mentions) for p, r in pairs if p.scene is not None]


def oracle_figures(kind: str, verdicts: Sequence[Checks], suffix: str = "") -> dict[str, float]:
    """Returns `oracle/KIND/ATTRIBUTE` for every attribute that any verdict holds."""
    found: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        for attribute, right in verdict.items():
            found[attribute].append(right)
    return {f"oracle/{kind}/{name}{suffix}": float(np.mean(rights))
            for name, rights in found.items()}  # fmt: skip


class ClipScorer:
    """A CLIP model with its tokenizer and image processor."""

    def __init__(self, name: str) -> None:
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
                raise ValueError(f"--clip: {folder} is no whole CLIP model: {error}") from error

    @torch.inference_mode()
    def score(self, pictures: NDArray[np.uint8], texts: Sequence[str]) -> float:
        """Returns the CLIP score of pictures (B, H, W, 3) with their texts, 0 to 100."""
        scores = [
            self._scores(pictures[i : i + 64], texts[i : i + 64]) for i in range(0, len(texts), 64)
        ]
        return float(torch.cat(scores).mean())

    def _scores(self, pictures: NDArray[np.uint8], texts: Sequence[str]) -> torch.Tensor:
        pixels = self._processor(images=list(pictures), return_tensors="pt").pixel_values
        ids = self._tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt",
        )  # fmt: skip
        seen = _embed(self._model.vision_model(pixel_values=pixels), self._model.visual_projection)
        read = _embed(self._model.text_model(**ids), self._model.text_projection)
        return (100 * (seen * read).sum(-1)).clamp(min=0)


def _embed(output: object, projection: nn.Module) -> torch.Tensor:
    pooled = output.pooler_output  # type: ignore[attr-defined]
    return F.normalize(projection(pooled), dim=-1)
