"""Tiny random encoders in the stock formats, and shards of noise made with them, for tests.

Images of 64 px become latents of 4 x 8 x 8; text is up to 77 tokens of width 32
(7 tokens in the shards). Other kinds of autoencoders and text encoders are made on demand.

    from tests import tiny
    folders = tiny.encoders()                     # .vae, .clip: for --vae and --text-encoder
    tiny.vae_folder("flux")                       # one of tiny.VAES
    tiny.make_shards(tmp_path / "train")
"""

import atexit
import functools
import shutil
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    VQModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from latent_t2i.model.encoders import (
    fingerprint,
    latent_channels,
    latent_kind,
    load_text_encoder,
    load_vae,
    quiet,
    tokenizer_fingerprint,
)
from latent_t2i.shards.schema import Identity, Manifest, TextDtype
from tests import shard_sets

LATENT_CHANNELS = 4
TEXT_WIDTH = 32
MAX_POSITIONS = 77
SCALING_FACTOR = 0.7


@dataclass(frozen=True)
class TinyEncoders:
    """Folders for `--vae` and `--text-encoder`."""

    vae: str
    clip: str


@functools.cache
def encoders() -> TinyEncoders:
    """Returns the encoders of this test process; the first call makes them."""
    return make_encoders(_root())


@functools.cache
def vae_folder(kind: str) -> str:
    """Returns the folder of an autoencoder of this test process; the first call makes it."""
    folder = _root() / kind
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(1)
        VAES[kind]().save_pretrained(folder)
    return str(folder)


@functools.cache
def clip_with_projection() -> str:
    """Returns a folder of a CLIPTextModelWithProjection with a tokenizer of its own."""
    folder = _root() / "clip-with-projection"
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(2)
        config = CLIPTextConfig(**_text_settings(_make_tokenizer(folder, "re")))
        CLIPTextModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@functools.cache
def vision_folder(kind: str) -> str:
    """Returns the folder of an image network of this test process; the first call makes it."""
    folder = _root() / kind
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(3)
        VISION_NETWORKS[kind]().save_pretrained(folder)
    return str(folder)


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny-encoders-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def make_encoders(root: Path, seed: int = 0, text_width: int = TEXT_WIDTH) -> TinyEncoders:
    """Writes a VAE folder and a whole-CLIP folder under `root`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _make_vae(root / "vae")
        _make_clip(root / "clip", text_width)
    return TinyEncoders(vae=str(root / "vae"), clip=str(root / "clip"))


def _make_vae(folder: Path) -> None:
    _make_kl(scaling_factor=SCALING_FACTOR).save_pretrained(folder)


def _make_kl(latent_channels: int = LATENT_CHANNELS, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        **settings,
    )


def _make_asymmetric() -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        down_block_out_channels=(4, 4, 4),
        layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3,
        up_block_out_channels=(8, 8, 8),
        layers_per_up_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def _make_tiny(num_stages: int = 4, decoder_stages: int | None = None, **settings: Any) -> Any:
    decoder_stages = decoder_stages or num_stages
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * num_stages,
        num_encoder_blocks=(1,) * num_stages,
        decoder_block_out_channels=(8,) * decoder_stages,
        num_decoder_blocks=(1,) * decoder_stages,
        **settings,
    )


def _make_dc() -> AutoencoderDC:
    blocks = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    widths = (8, 8, 8, 8, 16, 16)
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        attention_head_dim=8,
        scaling_factor=0.41407,
    )


def _make_vq() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=5,
        vq_embed_dim=3,
        num_vq_embeddings=16,
    )


VAES: dict[str, Callable[[], Any]] = {
    "sd": partial(_make_kl, scaling_factor=0.18215),
    "flux": partial(
        _make_kl,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "shifted": partial(_make_kl, scaling_factor=0.5, shift_factor=-0.3),
    "per_channel": partial(
        _make_kl,
        scaling_factor=0.5,
        latents_mean=(-1.5, 0.25, 0.5, 2.0),
        latents_std=(8.0, 5.5, 0.5, 3.0),
    ),
    "asymmetric": _make_asymmetric,
    "tiny": _make_tiny,
    "tiny_f4": partial(_make_tiny, num_stages=3, latent_channels=16, scaling_factor=1.5),
    "dc": _make_dc,
    "vq": _make_vq,
    "tiny_shifted": partial(_make_tiny, shift_factor=0.5),
    "tiny_lopsided": partial(_make_tiny, decoder_stages=3),
    "four_bands": partial(_make_kl, in_channels=4),
}
"""One per class and per way to state scale and shift. The last three do not fit into a bundle, and
`four_bands` is not supported at all."""


VISION_NETWORKS: dict[str, Callable[[], Any]] = {
    "clip_image": lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(**_TOWER, image_size=64, patch_size=16)
    ),
    "dino": lambda: Dinov2Model(Dinov2Config(**_TOWER, image_size=28, patch_size=7, mlp_ratio=2)),
    "dino_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_TOWER, image_size=28, patch_size=7, mlp_ratio=2)
    ),
}


def _make_clip(folder: Path, text_width: int) -> None:
    text = _text_settings(_make_tokenizer(folder)) | {"hidden_size": text_width}
    vision = _TOWER | {"image_size": 64, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with quiet():
        CLIPModel(config).save_pretrained(folder)


_TOWER = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 16,
}


def _text_settings(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_POSITIONS}
    return _TOWER | ids | sizes


_SPECIAL = ("bos", "eos", "pad")


def _make_tokenizer(folder: Path, *pairs: str) -> CLIPTokenizer:
    """Writes a byte-level tokenizer whose tokens are characters and the given pairs of them."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokens += pairs
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(pair[0], pair[1]) for pair in pairs],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_identities(folders: TinyEncoders) -> dict[str, Identity]:
    """Returns what a manifest says of encoders, by key."""
    tokenizer, text_encoder = load_text_encoder(folders.clip)
    hashes = {
        "vae": (folders.vae, fingerprint(load_vae(folders.vae))),
        "text_encoder": (folders.clip, fingerprint(text_encoder)),
        "tokenizer": (folders.clip, tokenizer_fingerprint(tokenizer)),
    }
    return {
        key: Identity(name=name, revision=None, sha256=sha256)
        for key, (name, sha256) in hashes.items()
    }


def make_shards(
    folder: Path,
    *,
    sizes: Sequence[int] = (10, 10, 4),
    text_dtype: TextDtype = "float16",
    vae: str | None = None,
    text_name: str | None = None,
    latent_side: int = shard_sets.SIDE,
    first_seed: int = 0,
) -> Path:
    """Writes a finished set of noise with the identities of the tiny encoders.

    `sizes` are the shards' numbers of records, `vae` the folder of another autoencoder, and
    `text_name` the text encoder's name in the manifest. Another `first_seed` gives other records
    with other keys.
    """
    folders = encoders()
    vae = vae or folders.vae
    network = load_vae(vae)
    identities = make_identities(TinyEncoders(vae=vae, clip=folders.clip))
    if text_name:
        identities["text_encoder"] = replace(identities["text_encoder"], name=text_name)
    provenance = shard_sets.make_provenance(
        latent_kind(network), text_dtype=text_dtype, **identities
    )
    shards = [
        shard_sets.make_examples(
            size,
            seed=seed,
            text_dtype=text_dtype,
            kind=latent_kind(network),
            size=(latent_side, latent_side),
        )
        for seed, size in enumerate(sizes, start=first_seed)
    ]
    times = latent_channels(network) // LATENT_CHANNELS  # repeats the examples' noise
    shards = [
        [replace(example, latent=np.tile(example.latent, (1, times, 1, 1))) for example in shard]
        for shard in shards
    ]
    shard_sets.write_set(folder, shards, provenance)
    return folder


def plant_nan(folder: Path, *, shard: int, records: Sequence[int]) -> None:
    """Overwrites the first latent values of some of a shard's records with NaN."""
    manifest = Manifest.load(folder)
    entry = manifest.shards[shard]
    layout = manifest.layouts[entry.layout]
    with (folder / entry.name).open("r+b") as file:
        for record in records:
            file.seek(record * layout.record_bytes + layout.fields["latent"].offset_bytes)
            file.write(np.full(4, np.nan, np.float16).tobytes())
    shard_sets.update_hash(folder, entry.name)
