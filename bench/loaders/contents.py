"""The records that the loaders are compared on: random numbers, the same in every format.

A record has the fields that stage one makes of a COCO image: the moments of its latent, and five
captions as CLIP-L's hidden states with their token ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH_SIZE = 256
NUM_CAPTIONS = 5
TEXT_WIDTH = 768  # CLIP-L
CHANNELS = 8  # moments of a VAE with four channels
POOL_VALUES = 1 << 23
ITEMS = ("text", "tokens")
"""Fields with one item per caption."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The shapes and the number of the records."""

    name: str
    max_tokens: int
    text_dtype: Literal["float16", "int8"]
    latent_px: int
    """Side of the latent: an eighth of the image's."""
    num_records: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a record's fields: one view, all captions."""
        return {
            "latent": (1, CHANNELS, self.latent_px, self.latent_px),
            "text": (NUM_CAPTIONS, self.max_tokens, TEXT_WIDTH),
            "tokens": (NUM_CAPTIONS, self.max_tokens),
        }

    @property
    def dtypes(self) -> dict[str, str]:
        """NumPy's dtype names of the fields."""
        return {"latent": "float16", "text": self.text_dtype, "tokens": "int32"}

    @property
    def stored_bytes(self) -> int:
        """Bytes of a record's arrays, without a format's overhead."""
        return sum(self._bytes(name, self.shapes[name]) for name in self.shapes)

    @property
    def delivered_bytes(self) -> int:
        """Bytes of a record in a batch: one view, one caption."""
        return sum(self._bytes(name, self.shapes[name][1:]) for name in self.shapes)

    def resized(self, num_records: int) -> "Content":
        """Returns the content with another number of records."""
        return replace(self, num_records=num_records)

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape)) * np.dtype(self.dtypes[name]).itemsize


CONTENTS = (
    Content(name="77-float16", max_tokens=77, text_dtype="float16", latent_px=8, num_records=2048),
    Content(name="32-int8", max_tokens=32, text_dtype="int8", latent_px=8, num_records=8192),
    Content(
        name="77-float16-512px", max_tokens=77, text_dtype="float16", latent_px=64, num_records=1792
    ),
)
SMALL = Content(name="small", max_tokens=2, text_dtype="float16", latent_px=8, num_records=4000)
"""For measurements that depend on the number of shards, not on their size."""


class Batch(NamedTuple):
    """The batch that every loader delivers."""

    latent: Tensor  # (B, 8, h, w) float16
    text: Tensor  # (B, T, D) float16 or int8
    tokens: Tensor  # (B, T) int32


class Contender(Protocol):
    """A loader and the writer of its format."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes all records in the loader's format."""

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches forever."""


@cache
def pool(dtype: str) -> NDArray[Any]:
    """Returns normally distributed numbers, of which each record is a slice."""
    values = np.random.default_rng(0).standard_normal(POOL_VALUES, np.float32)
    return (values if dtype == "float16" else (values * 32).clip(-127, 127)).astype(dtype)


def record(content: Content, number: int) -> dict[str, NDArray[Any]]:
    """Returns a record's fields. Its token ids hold its number and its captions' indices."""
    rng = np.random.default_rng(number)
    fields = {}
    for name in ("latent", "text"):
        numbers, size = pool(content.dtypes[name]), int(np.prod(content.shapes[name]))
        start = int(rng.integers(len(numbers) - size))
        fields[name] = numbers[start : start + size].reshape(content.shapes[name])
    tokens = np.zeros(content.shapes["tokens"], np.int32)
    tokens[:, 0], tokens[:, 1] = number, np.arange(NUM_CAPTIONS)
    return {**fields, "tokens": tokens}


def split_record(content: Content, number: int) -> dict[str, NDArray[Any]]:
    """Returns a record's fields with one field per caption: latent, text0.., tokens0.."""
    whole = record(content, number)
    return {"latent": whole["latent"]} | {
        f"{name}{caption}": whole[name][caption]
        for name in ITEMS
        for caption in range(NUM_CAPTIONS)
    }


def check(content: Content, batch: Batch, num_rows: int = 8) -> None:
    """Raises ValueError if a batch differs from the records written or is not shuffled."""
    number, caption = batch.tokens[:, 0].numpy(), batch.tokens[:, 1].numpy()
    captions = set(caption.tolist())
    if len(number) != BATCH_SIZE or len(captions) != NUM_CAPTIONS:
        raise ValueError(f"{content.name}: {len(number)} records with captions {captions}")
    if (np.diff(number) == 1).mean() > 0.5:
        raise ValueError(f"{content.name}: not shuffled: {number}")
    for row in range(0, BATCH_SIZE, BATCH_SIZE // num_rows):
        expected = record(content, int(number[row]))
        for found, wanted in (
            (batch.latent, expected["latent"][0]),
            (batch.text, expected["text"][caption[row]]),
            (batch.tokens, expected["tokens"][caption[row]]),
        ):
            if not torch.equal(found[row], torch.tensor(wanted)):
                raise ValueError(f"{content.name}: record {number[row]}: wrong value")


def choose(record: Sequence[Any], caption: int) -> tuple[Any, Any, Any]:
    """Returns the first view and one caption of a record's (latent, text, tokens)."""
    latent, text, tokens = record
    return latent[0], text[caption], tokens[caption]
