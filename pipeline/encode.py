"""Runs the frozen networks: pictures and captions in, examples out.

Latents are stored as the posterior's moments, so that training can draw from it anew at each visit.
Each distinct caption of a shard is encoded once, in the order of first appearance, and let go
after its last use. No batch crosses from one shard into the next: a shard's bytes depend on its own
records only. Values are stored in float16, text also in int8; what does not fit is left out with
its reason.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from model.encoders import (
    encode_images,
    encode_text,
    latent_channels,
    load_text_encoder,
    load_vae,
    tokenize,
    vae_downscale,
)
from pipeline.config import PipelineConfig
from pipeline.images import Picture, UnreadableImageError, load_all
from pipeline.record import Record, make_meta
from shards.schema import Example

CAPTIONS_PER_IMAGE = 4
"""The text encoder's batch is so many times the VAE's."""
BATCHES_AHEAD = 2
"""Pictures are decoded so many batches ahead of the VAE."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen networks on their device, and how to use them."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    device: torch.device
    image_size_px: int
    views: int
    max_tokens: int
    batch_size: int

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of an example's moments.  # (views, 2C, h, w)"""
        side = self.image_size_px // vae_downscale(self.vae)
        return self.views, 2 * latent_channels(self.vae), side, side

    @property
    def text_shape(self) -> tuple[int, int]:
        """Of a caption's hidden states.  # (T, D)"""
        return self.max_tokens, int(self.text_encoder.config.hidden_size)


def load_encoders(config: PipelineConfig) -> Encoders:
    """Loads both encoders. Raises ValueError for one that is not to be had or does not fit."""
    device = _find_device(config.device)
    vae = load_vae(config.vae, revision=config.vae_revision)
    downscale = vae_downscale(vae)
    if config.image_size_px % downscale:
        raise ValueError(
            f"--image-size-px: {config.image_size_px} is not a multiple of {downscale}, "
            f"by which the VAE {config.vae!r} scales down"
        )
    tokenizer, text_encoder = load_text_encoder(
        config.text_encoder, revision=config.text_encoder_revision
    )
    if config.max_tokens > tokenizer.model_max_length:
        raise ValueError(
            f"--max-tokens: {config.max_tokens} is more than the {tokenizer.model_max_length} "
            f"that the text encoder {config.text_encoder!r} can take"
        )
    networks: list[nn.Module] = [vae, text_encoder]
    for network in networks:
        network.to(device)
    return Encoders(
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        device=device,
        image_size_px=config.image_size_px,
        views=config.views,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
    )


def examples(
    records: Sequence[Record],
    encoders: Encoders,
    pool: Executor,
    *,
    quarantine: Callable[[str, str], None],
    quantise: Callable[[NDArray[np.float16]], NDArray[np.int8]] | None = None,
) -> Iterator[Example]:
    """Yields the examples of one shard, in order, their text as `quantise` makes it, if given.

    Every record is either yielded or handed to `quarantine` with its key and the reason.
    """
    texts = Captions(records, encoders)
    num_ahead = BATCHES_AHEAD * encoders.batch_size
    loaded = load_all(records, encoders.image_size_px, pool, num_ahead=num_ahead)

    def leave_out(record: Record, reason: str) -> None:
        texts.drop(record.captions)
        quarantine(record.key, reason)

    readable = _only_pictures(loaded, leave_out)
    while batch := list(islice(readable, encoders.batch_size)):
        latents = encode_views(encoders, np.stack([picture.pixels for _, picture in batch]))
        for (record, picture), latent in zip(batch, latents, strict=True):
            if not np.isfinite(latent).all():
                leave_out(record, "latent is not finite in float16")
                continue
            text, tokens, truncated = texts.take(record.captions)
            if not np.isfinite(text).all():
                quarantine(record.key, "text is not finite in float16")
                continue
            meta = make_meta(record, truncated=truncated, source_size_px=picture.source_size_px)
            stored = quantise(text) if quantise else text
            yield Example(key=record.key, latent=latent, text=stored, tokens=tokens, meta=meta)


def encode_views(encoders: Encoders, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Encodes pictures (B, S, S, 3) to moments (B, views, 2C, h, w); the second view is flipped."""
    images = torch.from_numpy(pixels).to(encoders.device).permute(0, 3, 1, 2)
    images = images.float().div(127.5).sub(1)  # (B, 3, S, S) in [-1, 1]
    views = [images, images.flip(3)][: encoders.views]
    moments = torch.stack([encode_images(encoders.vae, view) for view in views], dim=1)
    return _to_float16(moments)


def encode_captions(
    encoders: Encoders, captions: Sequence[str]
) -> tuple[NDArray[np.float16], NDArray[np.int32], NDArray[np.bool_]]:
    """Encodes captions to text (N, T, D), tokens (N, T) and whether each was cut (N,)."""
    ids, truncated = tokenize(encoders.tokenizer, captions, encoders.max_tokens)
    hidden = encode_text(encoders.text_encoder, ids.to(encoders.device))
    return _to_float16(hidden), ids.numpy().astype(np.int32), truncated.numpy()


class Captions:
    """The encoded captions of a shard: each distinct one is encoded once, shortly before use."""

    def __init__(self, records: Sequence[Record], encoders: Encoders) -> None:
        self._encoders = encoders
        self._uses = Counter(caption for record in records for caption in record.captions)
        self._waiting = deque(self._uses)  # distinct, in order of first appearance
        self._encoded: dict[str, tuple[NDArray[np.float16], NDArray[np.int32], bool]] = {}

    def take(
        self, captions: Sequence[str]
    ) -> tuple[NDArray[np.float16], NDArray[np.int32], list[int]]:
        """Returns a record's text (n, T, D), tokens (n, T) and which captions were cut."""
        while any(caption not in self._encoded for caption in captions):
            self._encode_next()
        found = [self._encoded[caption] for caption in captions]
        self.drop(captions)
        text, tokens, truncated = zip(*found, strict=True)
        return np.stack(text), np.stack(tokens), list(np.flatnonzero(truncated).tolist())

    def drop(self, captions: Iterable[str]) -> None:
        """Counts a record's captions as used, and lets go of those that no other record needs."""
        for caption in captions:
            self._uses[caption] -= 1
            if not self._uses[caption]:
                self._encoded.pop(caption, None)

    def _encode_next(self) -> None:
        size = CAPTIONS_PER_IMAGE * self._encoders.batch_size
        batch = [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]
        text, tokens, truncated = encode_captions(self._encoders, batch)
        for index, caption in enumerate(batch):
            if self._uses[caption]:  # a copy, so that the batch can go when its captions do
                self._encoded[caption] = (
                    text[index].copy(),
                    tokens[index].copy(),
                    bool(truncated[index]),
                )


def _only_pictures(
    loaded: Iterable[tuple[Record, Picture | UnreadableImageError]],
    leave_out: Callable[[Record, str], None],
) -> Iterator[tuple[Record, Picture]]:
    for record, picture in loaded:
        if isinstance(picture, Picture):
            yield record, picture
        else:
            leave_out(record, str(picture))


def _to_float16(values: Tensor) -> NDArray[np.float16]:
    array: NDArray[np.float16] = values.to(torch.float16).cpu().numpy()
    return array


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: no device is called {name!r}; auto, cpu, cuda are") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device: {name!r} asked for, but there are {count} GPUs here")
    return device
