"""The protocol of producers, and what their modules share.

The VAE and the text encoder are producers that every set has. To add another: write a module with a
class of this protocol and a `load(name, revision)`, and add its line to `FURTHER` in registry.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latent_t2i.model.encoders import load_network
from latent_t2i.model.folders import (
    fetch,
    read_config,
    require_weights,
)
from latent_t2i.shards.layout import FieldSpec, Per

FLAG = "--producers"
STEM = "model"
FILES = (
    "config.json",
    "preprocessor_config.json",
    f"{STEM}.safetensors*",
    f"{STEM}-*-of-*.safetensors",
)
Captions = Mapping[str, Sequence[int]]
"""Captions with the text encoder's token ids, not truncated and not padded."""
Size = tuple[int, int]
"""(width, height) in pixels."""


class Producer(Protocol):
    """A frozen network that makes one or more fields of each record."""

    @property
    def per(self) -> Per:
        """Whether it encodes views or captions."""

    @property
    def network(self) -> nn.Module:
        """The network, which stage one moves to its device."""

    def fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        """Returns the fields that it makes of images of this (width, height)."""

    def encode(self, batch: Any) -> tuple[Tensor, ...]:
        """Returns the items (B, ...) of each field, on any device and in any float dtype.

        A batch of views is images (B, 3, H, W), float32 in [-1, 1], on the network's device; one of
        captions is `Captions`. Several threads call this at once.
        """


def produce(producer: Producer, batch: Any, size_px: Size = (0, 0)) -> dict[str, Tensor]:
    """Returns the items (B, ...) of each of a producer's fields, in the field's dtype."""
    found = zip(producer.fields(size_px), producer.encode(batch), strict=True)
    return {spec.name: items.to(getattr(torch, spec.dtype)) for spec, items in found}


def load_named(cls: Any, name: str, revision: str | None, model_types: Sequence[str]) -> Any:
    """Loads a network of transformers (float32, evaluation mode) from a folder or the Hub.

    Raises ValueError if it is unavailable, or its config has another `model_type`.
    """
    folder = fetch(name, revision, FILES, flag=FLAG)
    read_config(folder, "model_type", model_types, flag=FLAG)
    require_weights(folder, STEM, flag=FLAG)
    return load_network(cls, folder, f"a {cls.__name__}", flag=FLAG)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Converts images (B, 3, H, W) from [-1, 1] to the network's mean and standard deviation."""
    shift, scale = (images.new_tensor(values).reshape(3, 1, 1) for values in (mean, std))
    return ((images + 1) / 2 - shift) / scale
