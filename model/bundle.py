"""The bundle: what training leaves and sampling needs, as a stock `StableDiffusionPipeline` folder.

Any diffusers program loads it with `from_pretrained`. Beside diffusers' files lies `bundle.json`:
where the weights come from and how they did. `float16` halves the folder; the weights load as
float32 again, as the files' configurations say, and the pictures differ by rounding only.
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
"""`StableDiffusionPipeline` draws pictures whose sides are multiples of this, whatever the VAE."""
StorageDtype = Literal["float32", "float16"]


def save_bundle(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    vae: Autoencoder,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    scheduler: Schedule,
    max_tokens: int,
    info: Mapping[str, Any],
    dtype: StorageDtype = "float32",
) -> None:
    """Writes the bundle, complete or not at all; an older one in its place is replaced.

    `max_tokens` becomes the tokenizer's limit, so that a pipeline pads captions as training did. A
    shift of the VAE's latents is folded into its weights. Raises ValueError for a VAE that a stock
    pipeline cannot use.
    """
    pipeline = make_pipeline(
        unet=unet,
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        scheduler=scheduler,
        max_tokens=max_tokens,
    )
    with complete_or_absent(folder) as temporary:
        with quiet():
            pipeline.save_pretrained(temporary)
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
    """Returns the stock pipeline of a training's parts, as `save_bundle` keeps it.

    Raises ValueError for a VAE that it cannot use.
    """
    require_stock_vae(vae)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_tokens
    with quiet():  # the import tells at length of an image processor that nothing here uses
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
    """Raises ValueError for a VAE whose latents a stock `StableDiffusionPipeline` does not decode.

    It decodes latents / scaling_factor, hands `decode` a random generator, and takes what one cell
    spans from the number of the decoder's blocks.
    """
    name = type(vae).__name__
    usable = (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny)
    if not isinstance(vae, usable):
        raise ValueError(
            f"vae: the bundle is a stock StableDiffusionPipeline, which cannot decode with an "
            f"{name}; expected {', '.join(kind.__name__ for kind in usable)}: make the shards with "
            "such a VAE, or train on these with a program of another pipeline"
        )
    downscale, assumed = vae_downscale(vae), 2 ** (len(vae.config.block_out_channels) - 1)
    if downscale != assumed:
        raise ValueError(
            f"vae: its encoder scales down by {downscale}, but a stock StableDiffusionPipeline "
            f"takes {assumed} from its decoder's blocks; expected the same number of both"
        )
    if not isinstance(vae, AutoencoderKL) and not _is_standard(*latent_statistics(vae)):
        raise ValueError(
            f"vae: a stock StableDiffusionPipeline ignores shift_factor, and an {name} has no "
            f"layer that takes it in; expected 0, found {vae.config.shift_factor}: set it to 0 in "
            "the config.json (with a scaling_factor to suit) or make the shards with another VAE"
        )


def require_stock_shards(vae: Autoencoder, *, text_name: str, latent_size: tuple[int, ...]) -> None:
    """Raises ValueError for shards that no stock `StableDiffusionPipeline` can draw from.

    Takes the name of their text encoder and the latents' (h, w).
    """
    if text_name.endswith(PENULTIMATE) and find_path(text_name) is None:
        raise ValueError(
            f"text_encoder: the shards' text is of {text_name!r}; the bundle is a stock "
            "StableDiffusionPipeline, which uses the text encoder's last hidden state: make the "
            "shards with --text-hidden-state last, or train on these with another program"
        )
    require_stock_vae(vae)
    height, width = (side * vae_downscale(vae) for side in latent_size)
    if height % STOCK_MULTIPLE_PX or width % STOCK_MULTIPLE_PX:
        raise ValueError(
            f"shards: images of {width} x {height} px; a stock StableDiffusionPipeline, which the "
            f"bundle is, draws multiples of {STOCK_MULTIPLE_PX} px only: make them with another "
            "--image-size-px"
        )


def fold_shift(vae: Autoencoder) -> Autoencoder:
    """Returns a VAE whose own latents, times its scaling factor, are what the denoiser works on.

    A stock pipeline knows one scaling factor; a shift, and means and deviations of channels, go
    into the 1x1 convolutions on both sides of the latents, which a VAE without them (SD3's, Flux's)
    is given. The map is affine, so this is exact. A VAE that has none of these is returned as it
    is, and else left alone.
    """
    mean, std = latent_statistics(vae)
    if _is_standard(mean, std):
        return vae
    num = latent_channels(vae)
    changes = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    with_convs = {"use_quant_conv": True, "use_post_quant_conv": True}
    folded = AutoencoderKL.from_config({**vae.config, **changes, **with_convs})
    identities = {
        **_identity("quant_conv", 2 * num),
        **_identity("post_quant_conv", num),
    }
    folded.load_state_dict(identities | vae.state_dict())
    # The pipeline's latents are (the VAE's - mean) / std; log-variances are only moved.
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
    """Returns whether one scaling factor is all that the latents need."""
    return not mean.any() and bool((std == 1).all())


def _identity(name: str, num: int) -> dict[str, Tensor]:
    """Returns the weights of a 1x1 convolution that changes nothing."""
    weight = torch.eye(num)[:, :, None, None]
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(num)}


def sampling_scheduler(scheduler: Schedule) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """Returns the sampler of the schedule trained on: DDIM (Song et al. 2020, 2010.02502).

    Timesteps count back from the last one, where training saw (nearly) pure noise, and the last
    step gives the predicted clean latent. `steps_offset` has no effect on that spacing, but
    `StableDiffusionPipeline` warns of any other value. Flow's schedule is a sampler already: DDIM
    does not know flow, and the pipeline cannot use diffusers' Euler sampler of it.
    """
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler
    return DDIMScheduler.from_config(
        scheduler.config, set_alpha_to_one=True, steps_offset=1, clip_sample=False
    )


def _store_float16(path: Path) -> None:
    """Rewrites a weights file with float32 tensors in half precision."""
    tensors = load_file(path)
    halved = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors.items()
    }
    save_file(halved, path, metadata={"format": "pt"})


def find_bundle(name: str | Path) -> Path:
    """Returns the folder of a bundle; raises ValueError where there is none."""
    folder = find_path(name)
    if folder is None:
        raise ValueError(f"--bundle: no folder {str(name)!r} here or in the project")
    missing = [f for f in ("model_index.json", INFO_FILE) if not (folder / f).is_file()]
    if missing:
        raise ValueError(f"--bundle: {folder} holds no {missing[0]}, so it is no finished bundle")
    return folder


def read_info(folder: Path) -> dict[str, Any]:
    """Returns what `bundle.json` says of a bundle."""
    info: dict[str, Any] = json.loads((folder / INFO_FILE).read_text())
    return info


def digest(folder: Path) -> str:
    """Returns the sha256 over a bundle's files, by name and content; pictures name it."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
