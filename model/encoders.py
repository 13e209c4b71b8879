"""The frozen networks on both sides of the denoiser: the VAE and the CLIP text encoder.

They are loaded from a local folder or, failing that, from the Hugging Face hub, always as float32:
a VAE in float16 overflows. Fingerprints identify weights by content, so that a folder that was
copied, renamed or stored again is still recognised and another network never is. Encoding here is
exactly what a stock `StableDiffusionPipeline` does, so what is precomputed equals what it computes
while sampling.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from model.paths import find_path

CONNECT_TIMEOUT_S = 10.0
VAE_FILES = ("config.json", "*.safetensors")
TEXT_FILES = ("config.json", "model.safetensors", "tokenizer*.json", "vocab.json", "merges.txt")


def load_vae(name: str, revision: str | None = None) -> AutoencoderKL:
    """Loads a VAE from a folder or hub repository, in float32 and evaluation mode.

    Raises ValueError, with the remedy, where it is neither here nor to be had.
    """
    folder = fetch(name, revision, VAE_FILES, flag="--vae")
    _require_config(folder, name, "--vae", "_class_name", "AutoencoderKL")
    vae = AutoencoderKL.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    vae.register_to_config(_name_or_path="")  # a bundle shall not tell of this machine's folders
    return vae.eval().requires_grad_(False)


def load_text_encoder(
    name: str, revision: str | None = None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Loads a CLIP tokenizer and text encoder (float32, evaluation mode).

    `name` may hold a CLIPTextModel or a whole CLIPModel, whose image tower is then left out.
    Raises ValueError, with the remedy, where it is neither here nor to be had.
    """
    folder = fetch(name, revision, TEXT_FILES, flag="--text-encoder")
    _require_config(folder, name, "--text-encoder", "model_type", "clip")
    with quiet():
        loaded: Any = CLIPTextModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    encoder, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"--text-encoder: {folder} lacks {len(missing)} weights of a CLIP text encoder, "
            f"{missing[0]} first"
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    # A folder with only vocab.json and merges.txt says "no limit" (1e30).
    limit = encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer, encoder.eval().requires_grad_(False)


def fetch(name: str, revision: str | None, files: Sequence[str], *, flag: str) -> Path:
    """Returns the local folder of `name`: a path, a cached hub repository or a fresh download."""
    local = find_path(name)
    if local is not None and local.is_dir():
        return local
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub below
    except HFValidationError:
        raise ValueError(
            f"{flag}: no folder {name!r} here or in the project (and it is no hub name)"
        ) from None
    return _download(name, revision, files, flag)


def _download(name: str, revision: str | None, files: Sequence[str], flag: str) -> Path:
    """Downloads the named files of a hub repository; asks first whether the hub can be reached."""
    found = f"{name!r} at revision {revision!r}" if revision else repr(name)
    remedy = (
        f"download {', '.join(files)} of https://huggingface.co/{name} into a folder on a machine "
        f"with a network and point {flag} to it"
    )
    try:  # one short question: a download alone would retry for half a minute per file
        HfApi().model_info(name, revision=revision, timeout=CONNECT_TIMEOUT_S)
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{flag}: the hub refuses {found}: {reason}; {remedy}") from error
    except _connection_errors() as error:
        raise ValueError(
            f"{flag}: no folder {found}, not in the cache, no network; {remedy}"
        ) from error
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))


def _connection_errors() -> tuple[type[BaseException], ...]:
    """Returns what the hub's client raises without a network, whatever library it is built on."""
    return (OSError, *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))


def _require_config(folder: Path, name: str, flag: str, field: str, expected: str) -> None:
    """Refuses a folder whose config.json does not announce the expected kind of network."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{flag}: {name!r} holds no config.json; expected one of a {expected}")
    found = str(json.loads(path.read_text()).get(field))
    if not found.startswith(expected):
        raise ValueError(f"{flag}: {path} says {field} {found!r}, expected {expected!r}")


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back transformers' progress bars and its report on weights left out on purpose."""
    verbosity = transformers_logging.get_verbosity()
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar_was_on:
            transformers_logging.enable_progress_bar()


def fingerprint(module: nn.Module) -> str:
    """Returns the sha256 of a network's weights: names, shapes, float32 values, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        # transformers 5 dropped this prefix of CLIPTextModel's names; the weights are the same.
        digest.update(f"{name.removeprefix('text_model.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> str:
    """Returns the sha256 of what decides the ids: vocabulary, merges and special tokens."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    content = json.dumps([sorted(model["vocab"].items()), merges, special])
    return hashlib.sha256(content.encode()).hexdigest()


def vae_downscale(vae: AutoencoderKL) -> int:
    """Returns how many pixels one latent cell spans along each axis (8 for Stable Diffusion's)."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_channels(vae: AutoencoderKL) -> int:
    """Returns the number of channels of a latent (4 for Stable Diffusion's VAE)."""
    return int(vae.config.latent_channels)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encodes pixels to the moments of the posterior, unscaled.

    Takes images (B, 3, H, W) in [-1, 1] and returns float32 (B, 2C, h, w): means, then
    log-variances. Autocast is off inside: it would run even a float32 VAE in half precision.
    """
    with torch.autocast(images.device.type, enabled=False):
        moments: Tensor = vae.encode(images.float()).latent_dist.parameters
    return moments


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Returns token ids (N, T) int64, padded on the right, and which captions were cut (N,)."""
    whole = tokenizer(list(captions), verbose=False)["input_ids"]
    ids: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        max_length=max_tokens,
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    return ids, torch.tensor([len(tokens) > max_tokens for tokens in whole])


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Returns the last hidden state (N, T, D) of ids (N, T), unmasked, as Stable Diffusion does."""
    with torch.autocast(ids.device.type, enabled=False):
        hidden: Tensor = text_encoder(ids, attention_mask=None)[0]
    return hidden
