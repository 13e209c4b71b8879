"""`sample.interpolate`: images on the way between prompts, seeds or both.

The key frames are the images that `sample.run` makes, up to rounding. Between them the initial
noise and the text encoder's states are interpolated on the sphere: on a straight line the noise
would have too small a variance in the middle, which the denoiser has never seen.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latent_t2i.model.bundle import find_bundle
from latent_t2i.model.generate import (
    decode,
    denoise,
    draw_noise,
    encode_prompt,
    latent_shape,
    not_finite_advice,
)
from latent_t2i.model.grid import comparison_grid, settings_chunks
from latent_t2i.sample import sampler
from latent_t2i.sample.config import DrawSettings
from latent_t2i.sample.folder import describe_computation, refuse_foreign, save_whole, whole_file
from latent_t2i.sample.pictures import describe_bundle, describe_guide
from latent_t2i.sample.settings import InterpolateConfig

Shape = tuple[int, int, int]
NEARLY_PARALLEL = 1e-4
"""Below this sine of the angle the straight line is used: the formula divides by it."""


def interpolate(config: InterpolateConfig) -> Path:
    """Writes the strip or the animation and returns its path."""
    out = Path(config.out)
    if out.suffix.lower() != ".gif":  # a GIF carries no settings
        refuse_foreign(out)
    pipeline = sampler.load(config.bundle, device=config.device, dtype=config.dtype)
    images = draw_frames(pipeline, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = _describe(config) | describe_computation(
        pipeline, batch_size=min(config.batch_size, len(images))
    )
    if out.suffix.lower() == ".png":
        save_whole(comparison_grid([images], rows=[""], columns=_labels(config)), out, settings)
    else:
        save_animation(images, out, frame_ms=config.frame_ms, settings=settings)
    print(f"{len(images)} images: {out}")
    return out


@torch.no_grad()
def draw_frames(pipeline: Any, config: InterpolateConfig) -> list[Image.Image]:
    """Returns the frames from the first key frame to the last."""
    keys = _key_frames(config)
    guide = None if config.guide is None else sampler.load_guide(config.guide, pipeline)
    settings = sampler.keywords(pipeline, config, guide)
    shape = latent_shape(pipeline, config.size)
    noise = _way([draw_noise([_seeded(seed)], shape) for _, seed in keys], config.num_frames, 3)
    text = _way([encode_prompt(pipeline, prompt) for prompt, _ in keys], config.num_frames, 1)
    guided = config.guidance_scale > 1 and guide is None
    negative = encode_prompt(pipeline, config.negative_prompt) if guided else None
    dtype, scale = pipeline.unet.dtype, config.guidance_scale
    advice = not_finite_advice(dtype, settings["scheduler"], config.num_steps, scale)
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(noise), config.batch_size), "draw", disable=None, leave=False):
        batch = range(start, min(start + config.batch_size, len(noise)))
        latents = denoise(
            pipeline.unet,
            settings["scheduler"],
            torch.cat([noise[number] for number in batch]),
            torch.cat([text[number] for number in batch]),
            negative,
            num_steps=config.num_steps,
            guidance=settings["guidance"],
            generators=[_after_noise(keys, number, config, shape) for number in batch],
        )
        images += map(Image.fromarray, decode(pipeline.vae, latents, advice=advice).numpy())
    return images


def _key_frames(config: InterpolateConfig) -> list[tuple[str, int]]:
    """Returns prompt and seed of each key frame; a single one of either is used for all."""
    num = max(len(config.prompts), len(config.seed))
    prompts = config.prompts * (num // len(config.prompts))
    return list(zip(prompts, config.seed * (num // len(config.seed)), strict=True))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _after_noise(
    keys: Sequence[tuple[str, int]], frame: int, config: InterpolateConfig, shape: Shape
) -> torch.Generator:
    """Returns the generator of a frame's further noise, which stochastic samplers add in each step.

    It is that of the key frame before it: the noise stays the same, so an animation does not
    flicker.
    """
    generator = _seeded(keys[frame // (config.num_frames - 1)][1])
    draw_noise([generator], shape)
    return generator


def slerp(first: Tensor, last: Tensor, fraction: float, *, dims: tuple[int, ...]) -> Tensor:
    """Returns the point at `fraction` of the great circle between two vectors over `dims`.

    Shoemake 1985, "Animating rotation with quaternion curves". Vectors that are nearly parallel or
    opposite get the straight line.
    """
    a, b = first.double(), last.double()
    lengths = [v.square().sum(dims, keepdim=True).sqrt() for v in (a, b)]
    product = lengths[0] * lengths[1]
    cosine = (a * b).sum(dims, keepdim=True) / product.clamp(min=torch.finfo(a.dtype).tiny)
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    is_straight = sine < NEARLY_PARALLEL
    safe = sine.masked_fill(is_straight, 1)
    weights = ((1 - fraction) * angle).sin() / safe, (fraction * angle).sin() / safe
    curved = weights[0] * a + weights[1] * b
    straight = (1 - fraction) * a + fraction * b
    return torch.where(is_straight, straight, curved).to(first.dtype)


def save_animation(
    images: Sequence[Image.Image], path: Path, *, frame_ms: int, settings: dict[str, Any]
) -> None:
    """Writes an endless GIF or APNG that runs forth and back; the file is complete or absent."""
    frames = [*images, *images[-2:0:-1]]
    frames = [frame.convert("RGB") for frame in frames]
    shared: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
    shared |= {"duration": frame_ms}
    with whole_file(path) as partial:
        if path.suffix.lower() == ".gif":
            # Without a palette per frame, colours that the first frame lacks would be lost.
            frames[0].save(partial, format="GIF", optimize=False, **shared)
        else:
            frames[0].save(partial, format="PNG", pnginfo=settings_chunks(settings), **shared)


def _way(keys: Sequence[Tensor], num_frames: int, num_dims: int) -> list[Tensor]:
    """Returns the frames through all keys; vectors are over the last `num_dims` dimensions."""
    steps, dims = num_frames - 1, tuple(range(-num_dims, 0))
    between = [
        slerp(first, last, step / steps, dims=dims)
        for first, last in itertools.pairwise(keys)
        for step in range(steps)
    ]
    return [*between, keys[-1]]


def _labels(config: InterpolateConfig) -> list[str]:
    """Returns the headers of a strip: the key frames' prompts and seeds, shares between them."""
    steps, keys = config.num_frames - 1, _key_frames(config)
    between = [f"{step / steps:.0%}" for step in range(1, steps)]
    named = [f"{prompt}, seed {seed}" for prompt, seed in keys]
    return [label for name in named[:-1] for label in (name, *between)] + [named[-1]]


def _describe(config: InterpolateConfig) -> dict[str, Any]:
    names = [field.name for field in fields(DrawSettings)]
    own = {name: getattr(config, name) for name in ("prompts", "seed", "num_frames", *names)}
    return own | describe_bundle(find_bundle(config.bundle)) | describe_guide(config.guide)
