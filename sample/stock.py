"""Calls diffusers' stock pipelines for edits, with one generator per image.

Any diffusers program makes the same images of the same bundle, seeds and settings. The pipelines
run all networks in one data type, so the default is float32 even on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latent_t2i.model.encoders import quiet
from latent_t2i.model.generate import check_num_steps, latent_shape, not_finite_advice
from latent_t2i.sample import sampler
from latent_t2i.sample.schedulers import choose_scheduler
from latent_t2i.sample.settings import EditConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

OnStep = Callable[[int, Tensor], None]
"""Called after each step with the number of steps done and the latents (B, C, h, w)."""


def load_stock(settings: EditConfig) -> "StableDiffusionPipeline":
    """Loads a bundle for a stock pipeline.

    Raises ValueError if it does not load, or if its VAE overflows in float16 and that is chosen.
    """
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    pipeline = sampler.load(settings.bundle, device=settings.device, dtype=dtype)
    if pipeline.vae.dtype != pipeline.unet.dtype:
        raise ValueError(
            f"--dtype: found {dtype}, in which the VAE of {settings.bundle} may overflow "
            "(force_upcast in its config); expected float32 or bfloat16"
        )
    return pipeline


def as_pipeline(name: str, pipeline: "StableDiffusionPipeline", settings: EditConfig) -> Any:
    """Returns the named class of diffusers with the same networks and the chosen scheduler.

    Unlike `from_pipe` it accepts every VAE of a bundle, and changes no data type.
    """
    scheduler = choose_scheduler(pipeline.scheduler, settings.scheduler)
    with quiet():  # warnings about an image processor and a safety checker that are not used here
        made = getattr(diffusers, name)(
            **pipeline.components | {"scheduler": scheduler},
            requires_safety_checker=False,
        )
    made.set_progress_bar_config(disable=True)
    return made


def output_size(pipeline: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the width and height in pixels of images; by default those of the training.

    Raises ValueError if a stock pipeline cannot make such images.
    """
    _, height, width = latent_shape(pipeline, size)
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor


def draw_stock(
    pipeline: Any,
    inputs: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    settings: EditConfig,
    num_steps: int | None = None,
    on_step: OnStep | None = None,
    title: str = "draw",
    **shared: Any,
) -> Iterator[Image.Image]:
    """Yields one image per element of `inputs`, which are the pipeline's arguments for it.

    `num_steps` are those of the whole schedule, of which a pipeline may run a part. Arguments that
    are tensors have a batch dimension of 1. Raises ValueError if an image is not finite.
    """
    assert len(inputs) == len(seeds), (len(inputs), len(seeds))
    steps = settings.num_steps if num_steps is None else num_steps
    check_num_steps(pipeline.scheduler, steps, "--num-steps (of the whole schedule)")
    with tqdm(total=len(seeds), desc=title, unit="image", disable=None, leave=False) as bar:
        for start in range(0, len(seeds), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            pixels = pipeline(
                **_collate(inputs[batch]),
                **shared,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
                output_type="pt",
                callback_on_step_end=_callback(on_step),
            ).images  # (B, 3, H, W) in [0, 1]
            dtype, scale = pipeline.unet.dtype, settings.guidance_scale
            advice = not_finite_advice(dtype, pipeline.scheduler, steps, scale)
            yield from _to_images(pixels, settings, advice)
            bar.update(len(pixels))


def _collate(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns arguments of a batch: tensors concatenated, everything else in lists."""
    columns = {name: [single[name] for single in inputs] for name in inputs[0]}
    return {
        name: torch.cat(values) if isinstance(values[0], Tensor) else values
        for name, values in columns.items()
    }


def _callback(on_step: OnStep | None) -> Any:
    def call(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, tensors["latents"])
        return {}

    return call


def _to_images(pixels: Tensor, settings: EditConfig, advice: str) -> list[Image.Image]:
    if not bool(pixels.isfinite().all()):
        raise ValueError(
            f"--bundle: the images of {settings.bundle} are not finite with --dtype "
            f"{settings.dtype}; {advice}"
        )
    arrays = pixels.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
