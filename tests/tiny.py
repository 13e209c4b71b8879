"""Tiny random encoders in the stock formats, and shards of noise that name them, for tests.

64 px pictures become 4 x 8 x 8 latents; text is up to 77 positions of 32 numbers
(7 in the shards).

    from tests import tiny
    folders = tiny.encoders()                     # .vae, .clip: what --vae and --text-encoder take
    tiny.make_shards(tmp_path / "train")
"""

import atexit
import functools
import shutil
import string
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from model.encoders import (
    fingerprint,
    load_text_encoder,
    load_vae,
    quiet,
    tokenizer_fingerprint,
)
from shards.schema import Identity, Manifest, TextDtype
from tests import shard_sets

LATENT_CHANNELS = 4
TEXT_WIDTH = 32
MAX_POSITIONS = 77
SCALING_FACTOR = 0.7


@dataclass(frozen=True)
class TinyEncoders:
    """Folders as the commands take them: `--vae` and `--text-encoder`."""

    vae: str
    clip: str


@functools.cache
def encoders() -> TinyEncoders:
    """Returns the encoders of this test process, made on the first call."""
    root = Path(tempfile.mkdtemp(prefix="tiny-encoders-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return make_encoders(root)


def make_encoders(root: Path, seed: int = 0) -> TinyEncoders:
    """Writes a VAE folder and a whole-CLIP folder under `root`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _make_vae(root / "vae")
        _make_clip(root / "clip")
    return TinyEncoders(vae=str(root / "vae"), clip=str(root / "clip"))


def _make_vae(folder: Path) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    ).save_pretrained(folder)


def _make_clip(folder: Path) -> None:
    tokenizer = _make_tokenizer(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    tower = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 16,
    }
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_POSITIONS}
    vision = tower | {"image_size": 64, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with quiet():
        CLIPModel(config).save_pretrained(folder)


_SPECIAL = ("bos", "eos", "pad")


def _make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes a byte-level tokenizer with no merges: a character is a token."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_shards(
    folder: Path, *, sizes: Sequence[int] = (10, 10, 4), text_dtype: TextDtype = "float16"
) -> Path:
    """Writes a finished set of shards of `sizes` records: noise that names the tiny encoders."""
    folders = encoders()
    tokenizer, text_encoder = load_text_encoder(folders.clip)
    provenance = shard_sets.make_provenance(
        vae=Identity(name=folders.vae, revision=None, sha256=fingerprint(load_vae(folders.vae))),
        text_encoder=Identity(name=folders.clip, revision=None, sha256=fingerprint(text_encoder)),
        tokenizer=Identity(
            name=folders.clip, revision=None, sha256=tokenizer_fingerprint(tokenizer)
        ),
        text_dtype=text_dtype,
    )
    shards = [
        shard_sets.make_examples(size, seed=seed, text_dtype=text_dtype)
        for seed, size in enumerate(sizes)
    ]
    shard_sets.write_set(folder, shards, provenance)
    return folder


def plant_nan(folder: Path, *, shard: int, records: Sequence[int]) -> None:
    """Overwrites the first latents of some of a shard's records."""
    manifest = Manifest.load(folder)
    entry = manifest.shards[shard]
    layout = manifest.layouts[entry.layout]
    with (folder / entry.name).open("r+b") as file:
        for record in records:
            file.seek(record * layout.record_bytes + layout.fields["latent"].offset_bytes)
            file.write(np.full(4, np.nan, np.float16).tobytes())
