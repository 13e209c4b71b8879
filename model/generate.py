"""Generates images with a stock `StableDiffusionPipeline`, for sampling and training previews.

Each image has its own seed and its own CPU generator. Batch size and device therefore change an
image by rounding only, and torch's global generator is not used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def generate_images(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    num_steps: int,
    batch_size: int = 16,
    title: str = "draw",
) -> list[Image.Image]:
    """Returns one image per prompt and seed, in order, made with the pipeline's scheduler.

    Guidance is eq. 6 of Ho & Salimans 2022 (2207.12598) with 1 + w = `guidance_scale`. Raises
    ValueError for a number of steps that the scheduler does not support.
    """
    assert len(prompts) == len(seeds), (len(prompts), len(seeds))
    check_num_steps(pipeline.scheduler, num_steps)
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=title, unit="image", disable=None, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            result = pipeline(
                prompt=list(prompts[batch]),
                guidance_scale=guidance_scale,
                num_inference_steps=num_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
            )
            images += result.images
            bar.update(len(result.images))
    return images


def check_num_steps(scheduler: Any, num_steps: int, flag: str = "--num-steps") -> None:
    """Raises ValueError for a number of steps with which diffusers' sampler gives wrong images."""
    num_timesteps = scheduler.config.num_train_timesteps
    if num_steps > num_timesteps:
        raise ValueError(
            f"{flag}: expected at most the {num_timesteps} training timesteps, found {num_steps}"
        )
    # diffusers' DDIM (0.42) subtracts a fixed number of timesteps to find the next one, so noise
    # remains if the steps do not divide the timesteps (150 steps: std 9 % too large).
    if isinstance(scheduler, DDIMScheduler) and num_timesteps % num_steps:
        raise ValueError(
            f"{flag}: DDIM leaves noise in the image unless the steps divide the bundle's "
            f"{num_timesteps} timesteps; expected a divisor, found {num_steps}: choose one, or use "
            "--scheduler euler, which is DDIM without this limit"
        )
    # If the first two steps round to the same timestep (many steps of flow), diffusers' solvers
    # confuse the second with the first.
    scheduler.set_timesteps(num_steps)
    first = scheduler.timesteps[:2].tolist()
    if len(first) == 2 and first[0] == first[1]:
        raise ValueError(
            f"{flag}: with {num_steps} steps the first two round to the same timestep, {first[0]} "
            f"of {num_timesteps}; expected fewer steps"
        )
