"""Hidden states of a CLIP text encoder, and the token ids, of captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latent_t2i.model.encoders import HiddenState, TextEncoder
from latent_t2i.pipeline.producers.producer import Captions, Size
from latent_t2i.shards.layout import FieldSpec, Identity, Per


@dataclass(frozen=True, kw_only=True)
class TextProducer:
    """Makes the fields `text` and `tokens` of captions."""

    per: ClassVar[Per] = "caption"
    encoder: TextEncoder
    max_tokens: int

    @property
    def network(self) -> nn.Module:
        """The text encoder's network."""
        return self.encoder.network

    @property
    def identity(self) -> Identity:
        """The network and which of its hidden states is used."""
        encoder = self.encoder
        return Identity(name=encoder.name, revision=encoder.revision, sha256=encoder.fingerprint)

    @property
    def tokenizer(self) -> Identity:
        """The tokenizer, by the hash of its vocabulary."""
        encoder = self.encoder
        sha256 = encoder.tokenizer_fingerprint
        return Identity(name=encoder.name, revision=encoder.revision, sha256=sha256)

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns each caption's token ids, not truncated and not padded."""
        return self.encoder.tokenize(captions)

    def fields(self, size_px: Size = (0, 0)) -> tuple[FieldSpec, ...]:
        """Returns the fields of hidden states (T, D) and token ids (T,)."""
        num = self.max_tokens
        return (
            FieldSpec(
                name="text",
                dtype="float16",
                shape=(num, self.encoder.width),
                per="caption",
                made_by=self.identity,
            ),
            FieldSpec(
                name="tokens", dtype="int32", shape=(num,), per="caption", made_by=self.tokenizer
            ),
        )

    def encode(self, batch: Captions) -> tuple[Tensor, Tensor]:
        """Encodes captions to hidden states (B, T, D) and token ids (B, T)."""
        hidden, ids, _ = self.encoder.encode(list(batch.values()), self.max_tokens)
        return hidden, ids.to(torch.int32)


def load_text_producer(
    name: str, revision: str | None, *, hidden_state: HiddenState, max_tokens: int
) -> TextProducer:
    """Loads a text encoder. Raises ValueError if it is unavailable or takes fewer tokens."""
    encoder = TextEncoder.load(name, revision, hidden_state)
    if max_tokens > encoder.max_length:
        raise ValueError(
            f"--max-tokens: expected at most {encoder.max_length}, the maximum of the text encoder "
            f"{name!r}, found {max_tokens}"
        )
    return TextProducer(encoder=encoder, max_tokens=max_tokens)
