"""Pictures from a stock `StableDiffusionPipeline`, for sampling and for the previews of training.

One seed is one picture: each has a generator of its own on the CPU, so neither the batch size nor
the device changes what is drawn beyond rounding, and torch's global generator stays as it was.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
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

    Guidance is eq. 6 of Ho & Salimans 2022 (2207.12598) with 1 + w = `guidance_scale`.
    """
    assert len(prompts) == len(seeds), (len(prompts), len(seeds))
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
