"""The bundle: the result of training, as a stock `StableDiffusionPipeline` folder.

Any diffusers program loads it with `from_pretrained`. `bundle.json` adds the run's settings, step
and metrics. Storing float16 halves the size; the weights are loaded as float32 again.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from latent_t2i.model.checks import read_json_object
from latent_t2i.model.diffusion import Schedule
from latent_t2i.model.encoders import (
    PENULTIMATE,
    Autoencoder,
    latent_channels,
    latent_statistics,
    quiet,
    vae_downscale,
)
from latent_t2i.model.paths import complete_or_absent, find_path

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

INFO_FILE = "bundle.json"
STOCK_MULTIPLE_PX = 8
"""`StableDiffusionPipeline` only makes images whose sides are multiples of this."""
INFO_TYPES = {
    "name": str,
    "step": int,
    "train_seconds": float,
    "num_parameters": int,
    "config": dict,
    "metrics": dict,
}
StorageDtype = Literal["float32", "float16"]


def save_bundle(
    folder: Path,
    pipeline: "StableDiffusionPipeline",
    *,
    info: Mapping[str, Any],
    dtype: StorageDtype = "float32",
) -> None:
    """Writes a pipeline, completely or not at all; replaces an existing bundle."""
    with complete_or_absent(folder) as temporary:
        with quiet():
            pipeline.save_pretrained(temporary)
        # transformers 4 needs vocab.json and merges.txt; transformers 5 writes only tokenizer.json.
        pipeline.tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))
        if dtype == "float16":
            for path in temporary.rglob("*.safetensors"):
                _store_float16(path)
        (temporary / INFO_FILE).write_text(json.dumps(dict(info), indent=1) + "\n")


def make_pipeline(
    *,
    unet: UNet2DConditionModel,
    vae: Autoencoder,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    scheduler: Schedule,
    max_tokens: int,
) -> "StableDiffusionPipeline":
    """Returns a stock pipeline of the parts of a training run.

    `max_tokens` becomes the tokenizer's limit, so that the pipeline pads captions as in training.
    Raises ValueError for a VAE that a stock pipeline cannot use.
    """
    require_stock_vae(vae)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_tokens
    with quiet():  # the import warns about an image processor that is not used here
        from diffusers import StableDiffusionPipeline
    return StableDiffusionPipeline(
        vae=fold_shift(vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sampling_scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def require_stock_vae(vae: Autoencoder) -> None:
    """Raises ValueError for a VAE that a stock `StableDiffusionPipeline` does not decode correctly.

    The pipeline decodes latents / scaling_factor, passes `decode` a random generator, and derives
    the downscale factor from the number of decoder blocks.
    """
    name = type(vae).__name__
    usable = (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny)
    if not isinstance(vae, usable):
        raise ValueError(
            f"vae: the bundle is a stock StableDiffusionPipeline, which cannot decode with an "
            f"{name}; expected {', '.join(kind.__name__ for kind in usable)}: encode the shards "
            "with such a VAE"
        )
    downscale, assumed = vae_downscale(vae), 2 ** (len(vae.config.block_out_channels) - 1)
    if downscale != assumed:
        raise ValueError(
            f"vae: its encoder scales down by {downscale}, but a stock StableDiffusionPipeline "
            f"assumes {assumed}, from the number of decoder blocks; expected the same factor"
        )
    if not isinstance(vae, AutoencoderKL) and not _is_standard(*latent_statistics(vae)):
        raise ValueError(
            f"vae: a stock StableDiffusionPipeline ignores shift_factor, which an {name} cannot "
            f"include in its weights; expected 0, found {vae.config.shift_factor}: set it to 0 in "
            "config.json (and adapt scaling_factor), or encode the shards with another VAE"
        )


def require_stock_shards(vae: Autoencoder, *, text_name: str, latent_size: tuple[int, ...]) -> None:
    """Raises ValueError for shards whose model does not fit a stock `StableDiffusionPipeline`.

    `latent_size` is (h, w).
    """
    if text_name.endswith(PENULTIMATE) and find_path(text_name) is None:
        raise ValueError(
            f"text_encoder: the shards' text is of {text_name!r}; the bundle is a stock "
            "StableDiffusionPipeline, which uses the text encoder's last hidden state: encode "
            "the shards with --text-hidden-state last, or train on these with another program"
        )
    require_stock_vae(vae)
    height, width = (side * vae_downscale(vae) for side in latent_size)
    if height % STOCK_MULTIPLE_PX or width % STOCK_MULTIPLE_PX:
        raise ValueError(
            f"shards: the images have {width} x {height} px; the bundle is a stock "
            f"StableDiffusionPipeline, which needs multiples of {STOCK_MULTIPLE_PX} px: encode the "
            "shards with another --image-size-px"
        )


def fold_shift(vae: Autoencoder) -> Autoencoder:
    """Returns a VAE that has only a scaling factor, for a stock pipeline.

    A shift and per-channel statistics of the latents are folded into the 1x1 convolutions on both
    sides of the latents, which are added if missing (SD3's and Flux's VAEs). This is exact, because
    the map is affine. `vae` is not changed; it is returned itself if there is nothing to fold.
    """
    mean, std = latent_statistics(vae)
    if _is_standard(mean, std):
        return vae
    num = latent_channels(vae)
    changes = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    with_convs = {"use_quant_conv": True, "use_post_quant_conv": True}
    folded = AutoencoderKL.from_config({**vae.config, **changes, **with_convs})
    identities = _identity("quant_conv", 2 * num) | _identity("post_quant_conv", num)
    folded.load_state_dict(identities | vae.state_dict())
    # The new latents are (latents - mean) / std. Log-variances change by -2 log(std).
    encode, decode = folded.quant_conv, folded.post_quant_conv
    both = torch.cat([std, torch.ones_like(std)])
    moved = torch.cat([mean, 2 * std.log()])
    weight, bias = (p.detach().double() for p in (encode.weight, encode.bias))
    encode.weight.data.copy_(weight / both[:, None, None, None])
    encode.bias.data.copy_((bias - moved) / both)
    weight, bias = (p.detach().double() for p in (decode.weight, decode.bias))
    decode.weight.data.copy_(weight * std[None, :, None, None])
    decode.bias.data.copy_(bias + weight[:, :, 0, 0] @ mean)
    return folded.eval().requires_grad_(False)


def _is_standard(mean: Tensor, std: Tensor) -> bool:
    """Returns whether the latents need no shift and no per-channel scale."""
    return not mean.any() and bool((std == 1).all())


def _identity(name: str, num: int) -> dict[str, Tensor]:
    """Returns the weights of a 1x1 convolution that is the identity."""
    weight = torch.eye(num)[:, :, None, None]
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(num)}


def sampling_scheduler(scheduler: Schedule) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """Returns the sampler of a training schedule: DDIM (Song et al. 2020, 2010.02502).

    Sampling starts at the last timestep, which is (nearly) pure noise in training, and the last
    step returns the predicted clean latent. The schedule of flow is already a sampler.
    """
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler
    # steps_offset has no effect with trailing spacing, but the pipeline warns about other values.
    return DDIMScheduler.from_config(
        scheduler.config, set_alpha_to_one=True, steps_offset=1, clip_sample=False
    )


def _store_float16(path: Path) -> None:
    """Rewrites a weights file with its float32 tensors as float16."""
    halved = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(halved, path, metadata={"format": "pt"})


def find_bundle(name: str | Path) -> Path:
    """Returns the folder of a bundle, or of another stock pipeline without `bundle.json`.

    Raises ValueError if there is none.
    """
    folder = find_path(name)
    if folder is None:
        raise ValueError(
            f"--bundle: no folder {str(name)!r} in the current directory or the project"
        )
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"--bundle: {folder} is not a finished bundle: it has no model_index.json")
    return folder


def read_info(folder: Path) -> dict[str, Any]:
    """Returns the content of `bundle.json`; raises ValueError if missing or damaged."""
    if not (folder / INFO_FILE).is_file():
        raise ValueError(
            f"{folder / INFO_FILE} does not exist; expected a bundle of train/run.py, found "
            "another pipeline"
        )
    return read_json_object(folder / INFO_FILE, INFO_TYPES)


def digest(folder: Path) -> str:
    """Returns the sha256 of a bundle: of its files' names and contents."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
