"""The frozen networks: autoencoders and CLIP text encoders.

An autoencoder is any of diffusers' that makes 2-D latents of images; text is encoded by one CLIP.
Weights are loaded as float32 (an autoencoder in float16 overflows) and identified by the hash of
their content, so a copied or renamed folder is the same network. With the last hidden state, the
precomputed text is exactly what a stock `StableDiffusionPipeline` computes while sampling.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    VQModel,
)
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from latent_t2i.model.folders import (
    fetch,
    find_part,
    loading,
    read_config,
    require_complete,
    require_weights,
)

AUTOENCODERS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel)
}
"""Supported autoencoders, by the `_class_name` in config.json."""
Autoencoder: TypeAlias = (
    AutoencoderKL | AsymmetricAutoencoderKL | AutoencoderTiny | AutoencoderDC | VQModel
)
VAE_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
VAE_FILES = ("config.json", f"{VAE_STEM}.safetensors*", f"{VAE_STEM}-*-of-*.safetensors")
TEXT_FILES = (
    "config.json",
    f"{TEXT_STEM}.safetensors*",
    f"{TEXT_STEM}-*-of-*.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
TEXT_TYPES = ("clip", "clip_text_model")
PENULTIMATE = " (penultimate)"
"""Ends the name of a text encoder whose penultimate hidden state is used."""
LatentKind = Literal["moments", "plain"]
HiddenState = Literal["last", "penultimate"]


def load_vae(name: str, revision: str | None = None) -> Autoencoder:
    """Loads an autoencoder (float32, evaluation mode) from a folder or Hub repository.

    `name` may be a whole pipeline. Raises ValueError if it is unavailable or not supported.
    """
    flag = "--vae"
    folder = find_part(
        fetch(name, revision, VAE_FILES, flag=flag, parts=("vae",)), "vae", flag=flag
    )
    kind = read_config(folder, "_class_name", tuple(AUTOENCODERS), flag=flag)
    require_weights(folder, VAE_STEM, flag=flag)
    with quiet(), loading(folder, flag=flag):
        vae, report = AUTOENCODERS[kind].from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    require_complete(report, folder, f"an {kind}", flag=flag)
    if vae.config.in_channels != 3:
        raise ValueError(
            f"{flag}: {folder}: expected images of 3 channels, found {vae.config.in_channels}"
        )
    vae.register_to_config(_name_or_path="")  # local paths do not belong in a bundle
    return vae.eval().requires_grad_(False)


def round_to_bfloat16(vae: Autoencoder) -> None:
    """Rounds the weights to bfloat16, in place."""
    nn.Module.to(vae, dtype=torch.bfloat16)  # diffusers' own `to` prints a warning


def load_text_encoder(
    name: str, revision: str | None = None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Loads a CLIP tokenizer and text encoder (float32, evaluation mode).

    `name` may hold a CLIPTextModel, a CLIPTextModelWithProjection (the projection is ignored), a
    whole CLIPModel (the image tower is ignored) or a whole pipeline. Raises ValueError if it is
    unavailable or not supported.
    """
    parts, flag = ("text_encoder", "tokenizer"), "--text-encoder"
    root = fetch(name, revision, TEXT_FILES, flag=flag, parts=parts)
    folder = find_part(root, parts[0], flag=flag)
    read_config(folder, "model_type", TEXT_TYPES, flag=flag)
    require_weights(folder, TEXT_STEM, flag=flag)
    encoder = load_network(CLIPTextModel, folder, "a CLIP text encoder", flag=flag)
    tokenizer = _load_tokenizer(root if folder == root else root / parts[1], encoder, flag)
    return tokenizer, encoder


def load_network(cls: Any, folder: Path, what: str, *, flag: str, optional: str = "") -> Any:
    """Returns the network of transformers in a folder, in float32 and for inference.

    Weights whose names start with `optional` may be missing. Raises ValueError if others are, or if
    the files are broken.
    """
    with quiet(), loading(folder, flag=flag):
        network, report = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = [
        name for name in report["missing_keys"] if not (optional and name.startswith(optional))
    ]
    require_complete({"missing_keys": missing}, folder, what, flag=flag)
    return network.eval().requires_grad_(False)


def _load_tokenizer(folder: Path, encoder: CLIPTextModel, flag: str) -> CLIPTokenizer:
    """Loads the tokenizer of an encoder; raises ValueError if it is missing or does not fit."""
    needed = ("tokenizer.json",), ("vocab.json", "merges.txt")
    if not any(all((folder / name).is_file() for name in names) for names in needed):
        raise ValueError(  # transformers would silently create a tokenizer of two tokens
            f"{flag}: {folder} has no tokenizer; expected tokenizer.json, or vocab.json and "
            "merges.txt (for a pipeline, give the whole folder)"
        )
    with loading(folder, flag=flag):
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    most = max(tokenizer.get_vocab().values())
    if most >= encoder.config.vocab_size or tokenizer.padding_side != "right":
        raise ValueError(
            f"{flag}: the tokenizer in {folder} does not fit the encoder: expected right padding "
            f"and ids below {encoder.config.vocab_size}, found {tokenizer.padding_side} padding "
            f"and ids up to {most}"
        )
    # A folder with only vocab.json and merges.txt has the limit 1e30.
    limit = encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings of transformers and diffusers, and transformers' progress bars."""
    libraries = (transformers_logging, diffusers_logging)
    before = [library.get_verbosity() for library in libraries]
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    for library in libraries:
        library.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
        if bar_was_on:
            transformers_logging.enable_progress_bar()


def fingerprint(module: nn.Module) -> str:
    """Returns the sha256 of a network's weights: names, shapes and float32 values, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        # transformers 5 dropped this prefix of CLIPTextModel's names.
        digest.update(f"{name.removeprefix('text_model.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> str:
    """Returns the sha256 of everything the ids depend on: vocabulary, merges, special tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return _hash([sorted(model["vocab"].items()), merges, special])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def vae_downscale(vae: Autoencoder) -> int:
    """Returns the downscale factor from pixels to latents (8 for Stable Diffusion's VAE)."""
    if isinstance(vae, AutoencoderDC):
        return int(vae.spatial_compression_ratio)
    names = {
        AsymmetricAutoencoderKL: "down_block_out_channels",
        AutoencoderTiny: "encoder_block_out_channels",
    }
    blocks = vae.config[names.get(type(vae), "block_out_channels")]
    return int(2 ** (len(blocks) - 1))


def latent_channels(vae: Autoencoder) -> int:
    """Returns the number of channels of a latent (4 for Stable Diffusion's VAE)."""
    if isinstance(vae, VQModel) and vae.config.vq_embed_dim is not None:
        return int(vae.config.vq_embed_dim)
    return int(vae.config.latent_channels)


def latent_kind(vae: Autoencoder) -> LatentKind:
    """Returns "moments" for an autoencoder with a posterior, "plain" for one without.

    A VQModel has plain latents, from before the quantisation.
    """
    has_posterior = isinstance(vae, AutoencoderKL | AsymmetricAutoencoderKL)
    return "moments" if has_posterior else "plain"


def scaling_factor(vae: Autoencoder) -> float:
    """Returns the factor that scales shifted latents to about unit variance."""
    return float(vae.config.scaling_factor)


def shift_factor(vae: Autoencoder) -> float:
    """Returns the value subtracted from latents before scaling; not 0 for SD3's and Flux's VAEs."""
    return float(vae.config.get("shift_factor") or 0.0)


def latent_statistics(vae: Autoencoder) -> tuple[Tensor, Tensor]:
    """Returns the latents' mean and standard deviation (C,) float64 from the VAE's config.

    A shift factor is the mean of all channels. The defaults are 0 and 1.
    """
    num = latent_channels(vae)
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None:
        mean = [shift_factor(vae)] * num
    if std is None:
        std = [1.0] * num
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)


def latent_affine(vae: Autoencoder) -> tuple[Tensor, Tensor]:
    """Returns shift and scale (C, 1, 1) float32: the denoiser sees (latent - shift) * scale."""
    mean, std = latent_statistics(vae)
    scale = scaling_factor(vae) / std
    return mean.float().reshape(-1, 1, 1), scale.float().reshape(-1, 1, 1)


@torch.no_grad()
def encode_images(vae: Autoencoder, images: Tensor) -> Tensor:
    """Encodes images (B, 3, H, W) in [-1, 1] to unscaled moments or plain latents, in float32.

    Moments are means and log-variances (B, 2C, h, w); plain latents are (B, C, h, w). The
    computation is in the weights' dtype.
    """
    # Autocast would run even a float32 VAE in half precision.
    with torch.autocast(images.device.type, enabled=False):
        encoded = vae.encode(images.to(vae.dtype))
    if "latent_dist" in encoded:
        latents: Tensor = encoded.latent_dist.parameters
    else:
        latents = encoded["latent" if isinstance(vae, AutoencoderDC) else "latents"]
    return latents.float()


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Returns token ids (N, T) int64, padded on the right, and whether each was truncated (N,)."""
    whole = tokenizer(list(captions), verbose=False)["input_ids"] if captions else []
    return _fit(whole, max_tokens, tokenizer.pad_token_id)


def _fit(whole: Sequence[Sequence[int]], max_tokens: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Truncates (keeping the end token) or pads ids to (N, T); returns which were truncated."""
    fitted = [
        [*ids[: max_tokens - 1], ids[-1]]
        if len(ids) > max_tokens
        else [*ids, *[pad_id] * (max_tokens - len(ids))]
        for ids in whole
    ]
    is_cut = torch.tensor([len(ids) > max_tokens for ids in whole], dtype=torch.bool)
    return torch.tensor(fitted, dtype=torch.int64).reshape(len(whole), max_tokens), is_cut


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Returns the last hidden state (N, T, D) of ids (N, T), unmasked, as Stable Diffusion."""
    with torch.autocast(ids.device.type, enabled=False):
        hidden: Tensor = text_encoder(ids, attention_mask=None)[0]
    return hidden


class TextEncoder:
    """A CLIP text encoder with its tokenizer: captions to token ids to hidden states.

    Any number of threads may use it at once. "penultimate" selects the state before the last layer
    and the final norm, as SDXL does; both are removed from `network`.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        network: CLIPTextModel,
        *,
        name: str,
        revision: str | None = None,
        hidden_state: HiddenState = "last",
    ) -> None:
        weights = fingerprint(network)
        self.network = network
        self.revision = revision
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.max_length = int(tokenizer.model_max_length)
        self._pad_id = int(tokenizer.pad_token_id)
        # A copy: truncation and padding are mutable state of the tokenizer, shared by its callers.
        self._tokenizer = _without_truncation(tokenizer)
        if hidden_state == "penultimate":
            self.name = name + PENULTIMATE
            self.fingerprint = _hash([weights, hidden_state])
            network.encoder.layers = network.encoder.layers[:-1]
            network.add_module("final_layer_norm", nn.Identity())
        else:
            self.name = name
            self.fingerprint = weights

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, hidden_state: HiddenState = "last"
    ) -> Self:
        """Loads a text encoder. Raises ValueError as `load_text_encoder` does."""
        tokenizer, network = load_text_encoder(name, revision)
        return cls(tokenizer, network, name=name, revision=revision, hidden_state=hidden_state)

    @property
    def width(self) -> int:
        """D, the size of a token's hidden state."""
        return int(self.network.config.hidden_size)

    def to(self, device: torch.device) -> Self:
        """Moves the network to a device."""
        self.network.to(device)  # type: ignore[arg-type]  # transformers' own annotation
        return self

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns each caption's token ids, not truncated and not padded."""
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(captions))]

    def encode(
        self, token_ids: Sequence[Sequence[int]], max_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes the token ids that `tokenize` returns, truncated or padded to T = `max_tokens`.

        Returns hidden states (N, T, D) float32 on the network's device, and on the CPU the ids
        (N, T) int64 and which captions were truncated (N,).
        """
        assert max_tokens <= self.max_length, (max_tokens, self.max_length)
        ids, is_cut = _fit(token_ids, max_tokens, self._pad_id)
        hidden = encode_text(self.network, ids.to(self.network.device))
        return hidden.float(), ids, is_cut


def _without_truncation(tokenizer: CLIPTokenizer) -> Tokenizer:
    """Returns a copy of the tokenizer's core that neither truncates nor pads."""
    copied = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copied.no_truncation()
    copied.no_padding()
    return copied
