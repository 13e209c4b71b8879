"""Pictures from a stock `StableDiffusionPipeline`, for sampling and for the previews of training.

One seed is one picture: each has a generator of its own on the CPU, so neither the batch size nor
the device changes what is drawn beyond rounding, and torch's global generator stays as it was.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def draw(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    num_steps: int,
    batch_size: int = 16,
    title: str = "draw",
) -> list[Image.Image]:
    """Draws one picture per prompt and seed, in their order, with the pipeline's scheduler.

    Guidance is eq. 6 of Ho & Salimans 2022 (2207.12598) with 1 + w = `guidance_scale`. Raises
    ValueError for a number of steps that the scheduler cannot serve.
    """
    assert len(prompts) == len(seeds), (len(prompts), len(seeds))
    check_steps(pipeline.scheduler, num_steps)
    pictures: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=title, unit="image", disable=None, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            piece = slice(start, start + batch_size)
            result = pipeline(
                prompt=list(prompts[piece]),
                guidance_scale=guidance_scale,
                num_inference_steps=num_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[piece]],
            )
            pictures += result.images
            bar.update(len(result.images))
    return pictures


def check_steps(scheduler: Any, num_steps: int, flag: str = "--num-steps") -> None:
    """Raises ValueError for a number of steps with which the sampler would miss.

    Two faults of diffusers (0.42) would go unseen. Its DDIM goes down by a whole number of
    timesteps whatever the next one is, so that noise stays where the steps do not divide the
    timesteps (of 150 steps, 9 % too much deviation). And of two first steps that fall on one
    timestep, as many steps of flow do, its solvers take the second for the first.
    """
    num_timesteps = scheduler.config.num_train_timesteps
    if num_steps > num_timesteps:
        raise ValueError(
            f"{flag}: expected at most the {num_timesteps} timesteps trained on, found {num_steps}"
        )
    if isinstance(scheduler, DDIMScheduler) and num_timesteps % num_steps:
        raise ValueError(
            f"{flag}: DDIM leaves noise unless the steps divide the bundle's {num_timesteps} "
            f"timesteps; expected a divisor of them (or --scheduler euler, which is DDIM without "
            f"that), found {num_steps}"
        )
    scheduler.set_timesteps(num_steps)
    first = scheduler.timesteps[:2].tolist()
    if len(first) == 2 and first[0] == first[1]:
        raise ValueError(
            f"{flag}: the first two of {num_steps} steps fall on timestep {first[0]} of the "
            f"bundle's {num_timesteps}; expected fewer steps"
        )
