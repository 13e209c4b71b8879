"""Small sets of shards filled with random numbers, for tests that read them."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from latent_t2i.shards.buckets import Buckets, finish_buckets
from latent_t2i.shards.schema import (
    Example,
    Identity,
    LatentKind,
    Layout,
    Manifest,
    Provenance,
    TextDtype,
    encode_meta,
    make_layout,
    round_up,
)
from latent_t2i.shards.writer import FoundScale, ShardWriter, begin_set, finish_set, keep_text_scale

CHANNELS = 4
SIDE = 8
DOWNSCALE = 8
"""Pixels that a cell of latents spans, in a bucket's name."""
MAX_TOKENS = 7
TEXT_WIDTH = 32


def make_identity(part: str) -> Identity:
    """An identity whose hash is the part's first letter 64 times."""
    return Identity(name=f"some/{part}", revision=None, sha256=part[0] * 64)


def make_provenance(kind: LatentKind = "moments", **changes: Any) -> Provenance:
    """The provenance of a set that no encoder made."""
    values: dict[str, Any] = {
        "vae": make_identity("vae"),
        "text_encoder": make_identity("text_encoder"),
        "tokenizer": make_identity("tokenizer"),
        "latent_kind": kind,
        "text_dtype": "float16",
        "max_tokens": MAX_TOKENS,
        "preprocessing": {"image_size_px": 64, "views": 1},
        "source": {"kind": "random", "sha256": "0" * 64},
        "records_per_shard": 4,
        "max_shard_bytes": 10**9,
    }
    return Provenance(**(values | changes))


def make_examples(
    num: int,
    *,
    num_captions: int = 3,
    views: int = 1,
    kind: LatentKind = "moments",
    text_dtype: TextDtype = "float16",
    seed: int = 0,
    size: tuple[int, int] = (SIDE, SIDE),
) -> list[Example]:
    """Examples of random numbers, latents of height and width `size`; the keys tell them apart."""
    rng = np.random.default_rng([seed, num_captions])
    channels = 2 * CHANNELS if kind == "moments" else CHANNELS
    spread = 40 if text_dtype == "int8" else 1
    return [
        Example(
            key=f"{seed:02d}-{num_captions}-{index:06d}",
            latent=rng.normal(size=(views, channels, *size)).astype(np.float16),
            text=(spread * rng.normal(size=(num_captions, MAX_TOKENS, TEXT_WIDTH)))
            .clip(-127, 127)
            .astype(text_dtype),
            tokens=rng.integers(0, 99, (num_captions, MAX_TOKENS)).astype(np.int32),
            meta={"captions": [f"caption {n} of {index}" for n in range(num_captions)]}
            | {"truncated": [0] if index % 2 else []},
        )
        for index in range(num)
    ]


def layout_of(examples: Sequence[Example]) -> Layout:
    """The layout that holds these examples, which are of one shape."""
    first = examples[0]
    room = max(len(encode_meta(example.meta)) for example in examples)
    captions, tokens, width = first.text.shape
    return make_layout(
        latent=first.latent.shape,
        text=(captions, tokens, width),
        json_bytes=round_up(room, 512),
        text_dtype="int8" if first.text.dtype == np.int8 else "float16",
    )


def make_scale(width: int = TEXT_WIDTH) -> FoundScale:
    """A scale for int8 text, other for each channel."""
    scale = np.linspace(0.01, 0.1, width, dtype=np.float32)
    return FoundScale(scale=scale, relative_error=0.01, num_captions=9)


def write_set(
    folder: Path,
    shards: Sequence[Sequence[Example]],
    provenance: Provenance | None = None,
    *,
    quarantined: Mapping[str, str] | None = None,
) -> Manifest:
    """Writes a whole set, a shard for each sequence of examples."""
    first = shards[0][0]
    provenance = provenance or make_provenance(text_dtype=first.text.dtype.name)
    found = make_scale(first.text.shape[2]) if provenance.text_dtype == "int8" else None
    begin_set(folder, provenance)
    if found:
        keep_text_scale(folder, found)
    for index, examples in enumerate(shards):
        with ShardWriter(folder, index, layout_of(examples), provenance.latent_kind) as shard:
            for example in examples:
                shard.write(example)
    return finish_set(
        folder,
        provenance,
        num_shards=len(shards),
        quarantined=quarantined or {},
        empty_text=np.full(first.text.shape[1:], 0.5, np.float16),
        empty_tokens=np.arange(len(first.tokens[0]), dtype=np.int32),
        text_scale=found,
    )


def write_buckets(
    folder: Path,
    sizes: Mapping[str, Sequence[int]],
    provenance: Provenance | None = None,
    *,
    quarantined: Mapping[str, str] | None = None,
    **settings: Any,
) -> Buckets:
    """Writes a whole bucketed set, of shards of so many records by bucket.

    `settings` are those of `make_examples`; all keys differ.
    """
    for number, (name, records) in enumerate(sizes.items()):
        width, height = (int(side) // DOWNSCALE for side in name.split("x"))
        shards = [
            make_examples(num, seed=10 * number + shard, size=(height, width), **settings)
            for shard, num in enumerate(records)
        ]
        write_set(folder / name, shards, provenance)
    return finish_buckets(folder, list(sizes), quarantined=quarantined or {})


def read_stock(folder: Path) -> list[dict[str, Any]]:
    """All samples of a set, as a stock WebDataset pipeline gives them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing files to Python
        return list(webdataset.WebDataset(urls, shardshuffle=False).decode())
