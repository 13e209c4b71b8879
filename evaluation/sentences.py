"""Embeddings of sentences, to compare captions by meaning: MiniLM and kin, or CLIP's text tower.

A sentence encoder of transformers (the layout of sentence-transformers) gives the mean of its last
hidden states over the tokens, scaled to length 1. It measures what a sentence says better than
CLIP's text tower, which needs no further weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from latent_t2i.evaluation.clip_model import NUM_AT_ONCE, Clip, load_clip
from latent_t2i.evaluation.metrics.metric import Context
from latent_t2i.evaluation.networks import find_network, load_tokenizer
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.encoders import fingerprint, load_network

FLAG = "--weights.sentences"
FILES = ("config.json", "model.safetensors*", "tokenizer*", "vocab*", "special_tokens_map.json")
POOLING_FILE = Path("1_Pooling") / "config.json"


class TextEmbedder(Protocol):
    """What gives sentences their embeddings."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns the embeddings (B, D), of length 1."""
        ...

    def identity(self) -> dict[str, str]:
        """Returns what the embeddings depend on."""
        ...


class ClipTexts:
    """CLIP's text tower as sentence encoder."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._clip.embed_texts(texts)

    def identity(self) -> dict[str, str]:
        return {"sentences": f"text tower of the CLIP {self._clip.fingerprint}"}


class SentenceEncoder:
    """A text encoder whose mean hidden state is the sentence's embedding."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Loads a folder or Hub repository; raises ValueError if it is no such encoder."""
        self._device = device
        folder = find_network(name, FILES, flag=FLAG)
        _require_mean_pooling(folder)
        self._tokenizer = load_tokenizer(AutoTokenizer, folder, flag=FLAG)
        # Encoders of sentences often come without BERT's pooler, which is not used here.
        model = load_network(AutoModel, folder, "a sentence encoder", flag=FLAG, optional="pooler.")
        self._fingerprint = fingerprint(model)
        self._model = model.to(device)
        limit = int(model.config.max_position_embeddings)
        self._max_tokens = min(int(self._tokenizer.model_max_length), limit)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns the embeddings (B, D), of length 1, of texts."""
        starts = range(0, len(texts), NUM_AT_ONCE)
        return np.concatenate([self._embed(texts[i : i + NUM_AT_ONCE]) for i in starts])

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        ).to(self._device)
        hidden = self._model(**tokens).last_hidden_state  # (B, T, D)
        mask = tokens.attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        found: NDArray[np.float32] = F.normalize(mean, dim=-1).cpu().numpy()
        return found

    def identity(self) -> dict[str, str]:
        return {"sentences": self._fingerprint}


def load_sentences(context: Context) -> TextEmbedder:
    """Returns the sentence encoder of the settings; without one, CLIP's text tower."""
    name = context.config.weights.sentences
    if name is None:
        return ClipTexts(load_clip(context))
    return context.load(("sentences", name), lambda: SentenceEncoder(name, context.device))


def _require_mean_pooling(folder: Path) -> None:
    """Raises ValueError if the encoder's own settings name another pooling than the mean."""
    path = folder / POOLING_FILE
    if path.is_file() and not read_json_object(path).get("pooling_mode_mean_tokens", False):
        raise ValueError(
            f"{FLAG}: {path}: expected pooling_mode_mean_tokens, found another pooling; use an "
            "encoder such as sentence-transformers/all-MiniLM-L6-v2"
        )
