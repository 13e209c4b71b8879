"""Generates the images to evaluate: each kind of prompt at each guidance scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latent_t2i.evaluation.captions import read_captions
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.sample import sampler
from latent_t2i.scenes import prompts as scene_prompts
from latent_t2i.scenes.prompts import Prompt

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The images of one kind of prompt at one guidance scale."""

    kind: str
    guidance_scale: float
    prompts: Sequence[Prompt]
    images: Sequence[Image.Image]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The images as one array.  # (B, H, W, 3)"""
        return np.stack([np.asarray(image.convert("RGB")) for image in self.images])


def make_prompts(config: EvaluationConfig) -> dict[str, list[Prompt]]:
    """Returns the prompts by kind."""
    if config.captions is not None:
        return {"captions": read_captions(config.captions, config.num_prompts)}
    return {
        kind: scene_prompts.make_prompts(config.world, kind, config.num_prompts, config.seed)
        for kind in scene_prompts.KINDS
    }


def draw_all(config: EvaluationConfig, folder: Path) -> list[Samples]:
    """Generates all images of each kind at the main guidance scale, and half at the others."""
    pipeline = sampler.load(folder, device=config.device, dtype=config.dtype)
    if config.oracle:
        _require_square(pipeline)
    others = sorted({*config.guidance_scales} - {config.guidance_scale})
    samples = []
    for kind, prompts in make_prompts(config).items():
        samples.append(_draw(pipeline, config, kind, prompts, config.guidance_scale))
        half = prompts[: max(1, len(prompts) // 2)]
        samples += [_draw(pipeline, config, kind, half, scale) for scale in others]
    return samples


def _require_square(pipeline: "StableDiffusionPipeline") -> None:
    size, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    if not isinstance(size, int) and size[0] != size[1]:
        raise ValueError(
            f"--oracle: the bundle generates images of {size[1] * factor} x {size[0] * factor} "
            "pixels, but the oracle needs square ones; expected --no-oracle and --captions"
        )


def _draw(
    pipeline: "StableDiffusionPipeline",
    config: EvaluationConfig,
    kind: str,
    prompts: Sequence[Prompt],
    scale: float,
) -> Samples:
    images = sampler.draw(
        pipeline,
        [prompt.text for prompt in prompts],
        # The seed of a prompt is the same at every guidance scale.
        [config.seed + number for number in range(len(prompts))],
        guidance_scale=scale,
        num_steps=config.num_steps,
        scheduler=config.scheduler,
        batch_size=config.batch_size,
        title=f"{kind}, guidance {scale:g}",
    )
    return Samples(kind=kind, guidance_scale=scale, prompts=prompts, images=images)
