"""Generates images with the parts of a `StableDiffusionPipeline`: sampling and training previews.

The loop makes the images of the stock pipeline, and adds what that one lacks: each distinct prompt
is encoded once, guidance can be limited to an interval of noise levels or use a weaker network, the
VAE decodes in a data type that does not overflow and, on a GPU, beside the next batch.

Each image has its own seed and its own CPU generator, also for the noise of stochastic samplers.
Every batch is filled up to the same size. On a CPU an image therefore depends bit for bit on its
prompt, seed and settings, the batch size and the number of threads, not on its position or on the
other images. Another batch size or device changes it by rounding only. torch's global generator is
not used.
"""

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latent_t2i.model.bundle import STOCK_MULTIPLE_PX

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

MAX_CACHED_PROMPTS = 256
"""Text states kept for later batches: 60 MB with the text encoder of Stable Diffusion 1."""
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How predictions are combined: eq. 6 of Ho & Salimans 2022 (2207.12598), 1 + w = `scale`."""

    scale: float = 1.0
    """1 turns guidance off."""
    interval: tuple[float, float] | None = None
    """Guide at noise levels LOW < sigma <= HIGH only (Kynkäänniemi et al. 2024, 2404.07724)."""
    rescale: float = 0.0
    """Share with the deviation of the conditional prediction (Lin et al. 2023, 2305.08891)."""
    network: Any = None
    """A weaker denoiser, whose conditional prediction replaces the unconditional one of the main
    denoiser (autoguidance, Karras et al. 2024, 2406.02507, eq. 2)."""

    def is_active(self, sigma: float) -> bool:
        """Returns whether a step at this noise level is guided."""
        low, high = self.interval or (0.0, math.inf)
        return self.scale != 1 and (self.interval is None or low < sigma <= high)


def generate_images(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    num_steps: int,
    batch_size: int = 16,
    title: str = "draw",
    **settings: Any,
) -> list[Image.Image]:
    """Returns one image per prompt and seed, in order; `settings` are those of `generate`.

    Fewer images than `batch_size` are one batch of their number. Raises ValueError as `generate`.
    """
    batch_size = min(batch_size, max(1, len(prompts)))
    guidance = Guidance(scale=guidance_scale)
    images = generate(
        pipeline,
        prompts,
        seeds,
        **settings,
        guidance=guidance,
        num_steps=num_steps,
        batch_size=batch_size,
    )
    total = len(prompts)
    return list(tqdm(images, title, total, unit="image", disable=None, leave=False))


def generate(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: Guidance,
    num_steps: int,
    batch_size: int,
    scheduler: Any = None,
    negative_prompt: str = "",
    size: Size | None = None,
    require_finite: bool = True,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Image.Image]:
    """Yields one image per prompt and seed, in order.

    Args:
        pipeline: Its denoiser, VAE, text encoder and tokenizer are used. A VAE that may overflow
            in its data type is converted; see `decode_dtype`.
        prompts: One prompt per image.
        seeds: One seed per image.
        guidance: How predictions are combined.
        num_steps: Number of sampler steps.
        batch_size: Number of images in every batch; the last one is filled up with copies.
        scheduler: The sampler, by default that of the pipeline.
        negative_prompt: Replaces the empty prompt of guidance.
        size: Width and height in pixels, by default those of the training.
        require_finite: Raise an error for an image with NaN or infinity, instead of making these
            pixels black.
        on_step: Called after each step with the number of steps done and the latents (B, C, h, w).

    Raises:
        ValueError: A number of steps or a size that does not fit, or an image that is not finite.
    """
    assert len(prompts) == len(seeds), (len(prompts), len(seeds))
    scheduler = pipeline.scheduler if scheduler is None else scheduler
    check_num_steps(scheduler, num_steps)
    shape = latent_shape(pipeline, size)
    encode = lru_cache(MAX_CACHED_PROMPTS)(partial(encode_prompt, pipeline))

    def denoised(numbers: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seeds[number]) for number in numbers]
        return denoise(
            pipeline.unet,
            scheduler,
            draw_noise(generators, shape),
            torch.cat([encode(prompts[number]) for number in numbers]),
            encode(negative_prompt) if _needs_negative(guidance) else None,
            num_steps=num_steps,
            guidance=guidance,
            generators=generators,
            on_step=on_step,
        )

    convert_vae(pipeline.vae)  # here, since the memory of its old weights is this stream's
    batches = [range(i, min(i + batch_size, len(seeds))) for i in range(0, len(seeds), batch_size)]
    padded = ([*batch, *[batch[-1]] * (batch_size - len(batch))] for batch in batches)
    device = pipeline.unet.device
    finish = partial(decode, pipeline.vae, require_finite=require_finite)
    for batch, pixels in zip(batches, _overlap(map(denoised, padded), finish, device), strict=True):
        for image in pixels[: len(batch)].numpy():
            yield Image.fromarray(image)


def _needs_negative(guidance: Guidance) -> bool:
    return guidance.scale != 1 and guidance.network is None


def decodes_beside(device: torch.device) -> bool:
    """Returns whether images are decoded beside the next batch: on a GPU.

    On a CPU denoising uses all cores already; docs/benchmarks.md has what a thread would gain.
    """
    return device.type == "cuda"


def _overlap(
    batches: Iterable[Tensor], finish: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[Tensor]:
    """Yields `finish` of each batch, computed in a thread and stream beside the next batch."""
    if not decodes_beside(device):
        yield from map(finish, batches)
        return
    on_gpu = device.type == "cuda"
    stream = _decode_stream(device) if on_gpu else None

    def finish_beside(latents: Tensor, ready: Any) -> Tensor:
        if stream is None:
            return finish(latents)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            latents.record_stream(stream)  # its memory is not reused before this stream is done
            return finish(latents)

    with ThreadPoolExecutor(1, "decode") as pool:
        waiting: deque[Future[Tensor]] = deque()
        for latents in batches:
            ready = torch.cuda.current_stream(device).record_event() if on_gpu else None
            waiting.append(pool.submit(finish_beside, latents, ready))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


@lru_cache
def _decode_stream(device: torch.device) -> Any:
    # One for all calls: memory that was freed on a stream is reused on this stream only.
    return torch.cuda.Stream(device)


@torch.no_grad()
def encode_prompt(pipeline: "StableDiffusionPipeline", prompt: str) -> Tensor:
    """Returns the text states of a prompt.  # (1, T, D)

    One prompt at a time, so that its states do not depend on the others.
    """
    device = pipeline.unet.device
    states: Tensor = pipeline.encode_prompt(prompt, device, 1, False)[0]
    return states


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Returns normal noise of each generator, float32 on the CPU.  # (B, C, h, w)"""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def latent_shape(
    pipeline: "StableDiffusionPipeline", size: Size | None = None
) -> tuple[int, int, int]:
    """Returns (C, h, w) of an image's latents; `size` is its width and height in pixels.

    Raises ValueError for a size that a stock pipeline cannot make.
    """
    config, factor = pipeline.unet.config, pipeline.vae_scale_factor
    if size is None:
        trained = config.sample_size
        height, width = (trained, trained) if isinstance(trained, int) else trained
        return config.in_channels, height, width
    multiple = math.lcm(factor, STOCK_MULTIPLE_PX)
    if size[0] % multiple or size[1] % multiple:
        raise ValueError(
            f"--size: expected multiples of {multiple} pixels for this bundle, found "
            f"{size[0]} x {size[1]}"
        )
    return config.in_channels, size[1] // factor, size[0] // factor


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    states: Tensor,
    negative: Tensor | None,
    *,
    num_steps: int,
    guidance: Guidance,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Returns the latents that the sampler makes of noise, in float32 on the denoiser's device.

    Shapes: noise (B, C, h, w), text states (B, T, D), those of the negative prompt (1, T, D). The
    latents stay in float32 between the steps whatever the denoiser computes in.
    """
    scheduler.set_timesteps(num_steps, device=unet.device)
    latents: Tensor = noise.to(unet.device) * scheduler.init_noise_sigma
    # Only stochastic samplers take generators, and only some of those that do draw numbers.
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if stochastic else {}
    both = states if negative is None else torch.cat([negative.expand_as(states), states])
    sigmas = noise_levels(scheduler, scheduler.timesteps)
    for number, (timestep, sigma) in enumerate(zip(scheduler.timesteps, sigmas, strict=True)):
        inputs = scheduler.scale_model_input(latents, timestep)
        if not guidance.is_active(sigma):
            prediction = _predict(unet, inputs, timestep, states)
        elif guidance.network is None:
            twice = torch.cat([inputs, inputs])
            other, text = _predict(unet, twice, timestep, both).chunk(2)
            prediction = _guide(text, other, guidance)
        else:
            text = _predict(unet, inputs, timestep, states)
            other = _predict(guidance.network, inputs, timestep, states)
            prediction = _guide(text, other, guidance)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        if on_step is not None:
            on_step(number + 1, latents)
    return latents


def _predict(unet: Any, latents: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
    inputs = latents.to(states.dtype)
    output: Tensor = unet(inputs, timestep, encoder_hidden_states=states, return_dict=False)[0]
    return output.float()


def _guide(text: Tensor, other: Tensor, guidance: Guidance) -> Tensor:
    """Returns the guided prediction; rescaled as in Lin et al. 2023 (2305.08891), eq. 14 to 16."""
    guided: Tensor = other + guidance.scale * (text - other)
    if not guidance.rescale:
        return guided
    factor = text.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    rescaled: Tensor = guidance.rescale * guided * factor + (1 - guidance.rescale) * guided
    return rescaled


def noise_levels(scheduler: Any, timesteps: Tensor) -> list[float]:
    """Returns sigma of each timestep: the standard deviation of the noise over the signal's scale.

    Rectified flow with weight s of the noise has s / (1 - s).
    """
    steps = timesteps.double().cpu().numpy()
    if scheduler.config.prediction_type == "flow_prediction":
        noise = (steps / scheduler.config.num_train_timesteps).clip(max=1 - 1e-9)
        return list((noise / (1 - noise)).tolist())
    # The signal may be zero at the end; some samplers have timesteps between the trained ones.
    signal = scheduler.alphas_cumprod.double().cpu().numpy().clip(min=1e-12)
    log_sigmas = np.log((1 - signal) / signal) / 2
    return list(np.exp(np.interp(steps, np.arange(len(signal)), log_sigmas)).tolist())


def decode_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Returns the data type in which a VAE with this config decodes, if `dtype` is asked for.

    float16 becomes float32 unless `force_upcast` is false: diffusers' mark of a VAE that does not
    overflow in float16.
    """
    overflows = config.get("force_upcast", True)
    return torch.float32 if dtype == torch.float16 and overflows else dtype


def convert_vae(vae: Any) -> None:
    """Converts a VAE to the data type in which it decodes."""
    dtype = decode_dtype(vae.config, vae.dtype)
    if vae.dtype != dtype:
        vae.to(dtype)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, *, require_finite: bool = True) -> Tensor:
    """Returns images as bytes, on the CPU, of latents (B, C, h, w).  # (B, H, W, 3) uint8

    Converts the VAE as `convert_vae` does. Raises ValueError for images that are not finite, or
    makes such pixels black.
    """
    convert_vae(vae)
    dtype = vae.dtype
    latents = (latents / vae.config.scaling_factor).to(dtype)
    images: Tensor = vae.decode(latents, return_dict=False)[0].float()  # (B, 3, H, W)
    if require_finite and not images.isfinite().all():
        raise ValueError(
            f"--bundle: the images are not finite in {dtype}; the weights have NaN, or overflow: "
            "try --dtype float32 or bfloat16, or another bundle"
        )
    images = ((images / 2 + 0.5).clamp(0, 1) * 255).round().nan_to_num(0)
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


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
