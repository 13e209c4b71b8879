"""Loads bundles for sampling, and draws a few images from prompts.

The images are those of the stock `StableDiffusionPipeline`: any diffusers program makes the same
image of the same bundle, seed and settings.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from latent_t2i.model.build_tools import require_build_tools
from latent_t2i.model.bundle import find_bundle
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.encoders import quiet
from latent_t2i.model.generate import (
    Guidance,
    check_num_steps,
    decode_dtype,
    encode_prompt,
    generate,
    latent_shape,
    noise_levels,
)
from latent_t2i.sample.config import DrawSettings, DtypeName
from latent_t2i.sample.guides import find_average, load_average
from latent_t2i.sample.schedulers import choose_scheduler

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError),
    *(SafetensorError, UnpicklingError),
)
"""What the libraries raise for damaged files of a pipeline."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def load(
    folder: str | Path, *, device: str = "auto", dtype: DtypeName = "auto"
) -> "StableDiffusionPipeline":
    """Loads a bundle, or the folder of a stock Stable Diffusion pipeline, for sampling.

    A VAE that may overflow in float16 is loaded in float32. A safety checker is not loaded. Raises
    ValueError if the bundle is missing, incomplete or of another kind, or if there is no such
    device.
    """
    found = find_bundle(folder)
    _check_parts(found)
    device = choose_device(device)
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    asked = getattr(torch, dtype)
    vae = decode_dtype(read_json_object(found / "vae" / "config.json"), asked)
    with quiet(), _no_progress_bar():
        # The import warns about an image processor that is not used here.
        from diffusers import StableDiffusionPipeline

        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                found,
                dtype={"vae": vae, "default": asked},
                local_files_only=True,
                requires_safety_checker=False,
                **dict.fromkeys(UNUSED),
            )
        except LOAD_ERRORS as error:
            raise ValueError(f"--bundle: {found} does not load: {error}") from error
    _check_networks(pipeline, found)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _check_parts(folder: Path) -> None:
    """Raises ValueError for a pipeline of another kind, such as Stable Diffusion XL."""
    index = read_json_object(folder / "model_index.json")
    parts = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    missing = [name for name in PARTS if name not in parts]
    more = sorted(parts - {*PARTS, *UNUSED})
    if missing or more:
        raise ValueError(
            f"--bundle: {folder} is a {index.get('_class_name')}, expected a "
            f"StableDiffusionPipeline with {', '.join(PARTS)}; found "
            + (f"no {missing[0]}" if missing else f"{more[0]} too")
        )


def _check_networks(pipeline: "StableDiffusionPipeline", folder: Path) -> None:
    """Raises ValueError for a denoiser with other inputs than noisy latents and text."""
    found, expected = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if found != expected:
        raise ValueError(
            f"--bundle: the denoiser of {folder} has {found} input channels, expected the VAE's "
            f"{expected}; networks for inpainting or depth are not supported"
        )
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            f"--bundle: the denoiser of {folder} takes the guidance scale as an input "
            "(time_cond_proj_dim), as those of LCM; expected one without"
        )


def choose_device(name: str) -> str:
    """Returns `name`, or the default device for "auto": a GPU, else the CPU.

    "cuda" without a number is the GPU of this process under a launcher. Raises
    ValueError if the device is not usable.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: found {name!r}, which PyTorch cannot use here ({reason}); expected auto, "
            "cpu, or a GPU of this machine, such as cuda or cuda:1"
        ) from error
    if name != "cuda":
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hides diffusers' progress bar for loading a bundle's few files."""
    was_enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            diffusers_logging.enable_progress_bar()


def load_guide(folder: str | Path, pipeline: "StableDiffusionPipeline") -> Any:
    """Returns the denoiser of a weaker bundle, on the device and in the data type of `pipeline`.

    `folder` may be a snapshot too, or the file of one of its averages. Raises ValueError for a
    bundle with another prediction, noise schedule, VAE or text encoder, or with the same weights.
    """
    average = find_average(folder)
    if average is not None:
        return load_average(average, pipeline)
    dtype: Any = str(pipeline.unet.dtype).removeprefix("torch.")
    guide = load(folder, device=str(pipeline.unet.device), dtype=dtype)
    other = _properties(guide)
    for name, expected in _properties(pipeline).items():
        if not _is_same(found := other[name], expected):
            values = "" if torch.is_tensor(found) else f" (found {found}, expected {expected})"
            raise ValueError(
                f"--guide: {folder} has another {name} than the bundle{values}; expected an "
                "earlier or shorter average of the same run"
            )
    if _have_same_weights(guide.unet, pipeline.unet):
        raise ValueError(
            f"--guide: {folder} has the same weights as the bundle, so guidance would have no "
            "effect; expected a weaker model, such as an earlier or shorter average of the same run"
        )
    return guide.unet


def _have_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    tensors, others = one.state_dict(), other.state_dict()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def _properties(pipeline: "StableDiffusionPipeline") -> dict[str, Any]:
    """Returns what a model and its guide must have in common, by name."""
    return {
        **{name: pipeline.unet.config[name] for name in ("in_channels", "cross_attention_dim")},
        **{name: pipeline.scheduler.config[name] for name in ("prediction_type",)},
        "scaling_factor": pipeline.vae.config.scaling_factor,
        # What a part computes, because its weights may be stored in float16.
        "noise schedule": pipeline.scheduler.alphas_cumprod,
        "text encoder": encode_prompt(pipeline, "a photograph").float(),
    }


def _is_same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0.01, atol=0.01)
    return bool(one == other)


def speed_up(unet: Any, *, channels_last: bool = False, compiled: bool = False) -> None:
    """Changes how a denoiser computes, and its images by rounding only.

    Raises ValueError if torch.compile has no tools to build kernels for the denoiser's device.
    """
    if compiled:
        require_build_tools(unet.device.type)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if compiled:
        # All batches have one shape, so the kernels do not depend on what was drawn before.
        unet.compile(dynamic=False)


def keywords(
    pipeline: "StableDiffusionPipeline", settings: DrawSettings, guide: Any = None
) -> dict[str, Any]:
    """Returns the settings as arguments of `model.generate.generate`.

    `guide` is the network of `settings.guide`, as `load_guide` returns it. Raises ValueError for
    settings that do not fit the bundle.
    """
    assert (guide is None) == (settings.guide is None), "load_guide makes one of the other"
    scheduler = choose_scheduler(pipeline.scheduler, settings.scheduler)
    check_num_steps(scheduler, settings.num_steps)
    latent_shape(pipeline, settings.size)
    guidance = Guidance(
        scale=settings.guidance_scale,
        interval=settings.guidance_interval,
        rescale=settings.guidance_rescale,
        network=guide,
    )
    _check_interval(scheduler, settings.num_steps, guidance)
    return {
        "guidance": guidance,
        "num_steps": settings.num_steps,
        "scheduler": scheduler,
        "negative_prompt": settings.negative_prompt,
        "size": settings.size,
    }


def _check_interval(scheduler: Any, num_steps: int, guidance: Guidance) -> None:
    """Raises ValueError if no step is inside the interval, which would turn guidance off."""
    if guidance.interval is None:
        return
    scheduler.set_timesteps(num_steps)
    sigmas = noise_levels(scheduler, scheduler.timesteps)
    if not any(map(guidance.is_active, sigmas)):
        low, high = guidance.interval
        raise ValueError(
            f"--guidance-interval: none of the {num_steps} steps is inside; expected a part of "
            f"sigma {min(sigmas):.4g} to {max(sigmas):.4g}, found {low:g} to {high:g}"
        )


def draw(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 16,
    title: str = "draw",
    guide: Any = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Returns one image per prompt and seed; `settings` are those of `DrawSettings`.

    `guide` is a network of `load_guide`, not a folder, and `on_step` that of
    `model.generate.generate`. Raises ValueError for settings that do not fit the bundle, or if an
    image is not finite.
    """
    chosen = DrawSettings(**settings, guide=None if guide is None else "the given network")
    images = generate(
        pipeline,
        prompts,
        seeds,
        **keywords(pipeline, chosen, guide),
        batch_size=min(batch_size, max(1, len(prompts))),
        on_step=on_step,
    )
    return list(tqdm(images, title, len(prompts), unit="image", disable=None, leave=False))
