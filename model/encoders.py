"""The frozen networks: autoencoders and CLIP text encoders.

Weights are loaded as float32, because autoencoders overflow in float16. Networks are identified by
a hash of their weights, which is the same for a copied, renamed or re-saved folder.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from latent_t2i.model.paths import find_path

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
BESIDE, PENULTIMATE = " + ", " (penultimate)"
"""Parts of the name of text that is not from a single stock encoder."""
LatentKind = Literal["moments", "plain"]
HiddenState = Literal["last", "penultimate"]


def load_vae(name: str, revision: str | None = None) -> Autoencoder:
    """Loads an autoencoder (float32, evaluation mode) from a folder or hub repository.

    `name` may be a whole pipeline with a `vae` sub-folder. Raises ValueError, with instructions, if
    it is unavailable or not supported.
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
    name: str, revision: str | None = None, *, number: Literal[1, 2] = 1
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Loads a CLIP tokenizer and text encoder (float32, evaluation mode).

    `name` may contain a CLIPTextModel, a CLIPTextModelWithProjection or CLIPModel, whose other
    parts are ignored, or a whole pipeline, from which the first or second text encoder is loaded.
    Raises ValueError, with instructions, if it is unavailable.
    """
    at = "" if number == 1 else f"_{number}"
    parts, flag = (f"text_encoder{at}", f"tokenizer{at}"), f"--text-encoder{at.replace('_', '-')}"
    root = fetch(name, revision, TEXT_FILES, flag=flag, parts=parts)
    folder = find_part(root, parts[0], flag=flag)
    read_config(folder, "model_type", TEXT_TYPES, flag=flag)
    require_weights(folder, TEXT_STEM, flag=flag)
    with quiet(), loading(folder, flag=flag):
        loaded: Any = CLIPTextModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    encoder, report = loaded
    require_complete(report, folder, "a CLIP text encoder", flag=flag)
    tokenizer = _load_tokenizer(root if folder == root else root / parts[1], encoder, flag)
    return tokenizer, encoder.eval().requires_grad_(False)


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
    """Truncates (keeping the end token) or pads ids to (N, T); returns which were cut (N,)."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A text encoder with its tokenizer."""

    name: str
    revision: str | None
    tokenizer: CLIPTokenizer
    network: CLIPTextModel


class TextEncoders:
    """One text encoder, or two side by side: captions in, hidden states out.

    The states of two stand beside each other along the width, as SDXL has them; "penultimate" takes
    the state before the last layer, without the final norm, and the networks lose both. Any number
    of threads may call it at once: captions are tokenised, once each, by copies of the tokenizers
    that nothing alters.
    """

    def __init__(self, parts: Sequence[TextEncoder], hidden_state: HiddenState = "last") -> None:
        assert parts
        self.parts = tuple(parts)
        self.hidden_state = hidden_state
        is_stock = len(self.parts) == 1 and hidden_state == "last"
        weights = [fingerprint(part.network) for part in self.parts]
        self.fingerprint = weights[0] if is_stock else _hash([*weights, hidden_state])
        """Of one encoder's last state, that of its weights."""
        words = [tokenizer_fingerprint(part.tokenizer) for part in self.parts]
        self.tokenizer_fingerprint = words[0] if len(words) == 1 else _hash(words)
        self._tokenizers = [_alone(p.tokenizer) for p in parts]
        if hidden_state == "penultimate":
            for part in self.parts:
                _end_at_penultimate(part.network)

    @property
    def name(self) -> str:
        """The encoder's name; with two, or the penultimate state, one that says so."""
        if len(self.parts) == 1:
            name = self.parts[0].name
        else:
            name = BESIDE.join(
                f"{p.name}@{p.revision}" if p.revision else p.name for p in self.parts
            )
        return name + (PENULTIMATE if self.hidden_state == "penultimate" else "")

    @property
    def revision(self) -> str | None:
        """The encoder's revision; None with two, whose name tells theirs."""
        return self.parts[0].revision if len(self.parts) == 1 else None

    @property
    def width(self) -> int:
        """D, the size of a token's hidden state, over all encoders."""
        return sum(int(part.network.config.hidden_size) for part in self.parts)

    @property
    def max_length(self) -> int:
        """The most tokens that every encoder can take."""
        return min(int(part.tokenizer.model_max_length) for part in self.parts)

    def to(self, device: torch.device) -> Self:
        """Moves the networks to a device."""
        for part in self.parts:
            part.network.to(device)  # type: ignore[arg-type]  # transformers' own annotation
        return self

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Returns how many tokens each caption has uncut, start and end included.

        With two encoders, by the one that has more.
        """
        counts = [
            [len(found) for found in tokenizer.encode_batch_fast(list(captions))]
            for tokenizer in self._tokenizers
        ]
        return [max(of_caption) for of_caption in zip(*counts, strict=True)]

    def encode(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes captions, cut or padded to `max_tokens`.

        Returns hidden states (N, T, D) float32 on the networks' device, the first encoder's token
        ids (N, T) int64 and whether any encoder's were cut (N,), both on the CPU.
        """
        assert max_tokens <= self.max_length, (max_tokens, self.max_length)
        hidden, ids, is_cut = [], [], []
        for part, tokenizer in zip(self.parts, self._tokenizers, strict=True):
            whole = [found.ids for found in tokenizer.encode_batch_fast(list(captions))]
            own_ids, own_cut = _fit(whole, max_tokens, part.tokenizer.pad_token_id)
            hidden.append(encode_text(part.network, own_ids.to(part.network.device)).float())
            ids.append(own_ids)
            is_cut.append(own_cut)
        return torch.cat(hidden, dim=-1), ids[0], torch.stack(is_cut).any(dim=0)


def load_text_encoders(
    *sources: tuple[str, str | None], hidden_state: HiddenState = "last"
) -> TextEncoders:
    """Loads one or two text encoders, each of a name and a revision.

    Raises ValueError, with the remedy, for one that is neither here nor to be had.
    """
    if len(sources) not in (1, 2):
        raise ValueError(f"text encoders: expected one or two, found {len(sources)}")
    parts = []
    for number, (name, revision) in enumerate(sources, start=1):
        tokenizer, network = load_text_encoder(name, revision, number=1 if number == 1 else 2)
        parts.append(
            TextEncoder(name=name, revision=revision, tokenizer=tokenizer, network=network)
        )
    return TextEncoders(parts, hidden_state)


def is_stock_text(name: str) -> bool:
    """Returns whether `TextEncoders.name` is one encoder's whose last state was taken."""
    return find_path(name) is not None or (BESIDE not in name and not name.endswith(PENULTIMATE))


def _alone(tokenizer: CLIPTokenizer) -> Tokenizer:
    """Returns a copy of the tokenizer's core that neither cuts nor pads."""
    copied = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copied.no_truncation()
    copied.no_padding()
    return copied


def _end_at_penultimate(network: CLIPTextModel) -> None:
    """Takes off the last layer and the final norm, so that nothing is computed in vain."""
    network.encoder.layers = network.encoder.layers[:-1]
    network.add_module("final_layer_norm", nn.Identity())
