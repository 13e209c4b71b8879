"""Every sampler of every objective against the exact answer, through the stock pipeline.

For latents that are independent normal numbers the best denoiser is known, and so is where the
probability-flow ODE (Song et al. 2021, 2011.13456, eq. 13) takes each number: to the same quantile.
The denoiser here knows of time what training shows: the noisy input at that timestep. So a sampler
whose timesteps or noise levels are not those of training misses.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from model import diffusion
from model.bundle import sampling_scheduler
from model.diffusion import ObjectiveConfig, make_scheduler
from sample import sampler
from tests.bundles import make_bundle

MEAN, STD = 0.7, 0.4
NUM_IMAGES = 16
FLOW = ObjectiveConfig(prediction="flow")
OBJECTIVES = {
    "epsilon": ObjectiveConfig(),
    "epsilon scaled_linear": ObjectiveConfig(beta_schedule="scaled_linear"),
    "epsilon sigmoid": ObjectiveConfig(beta_schedule="sigmoid"),
    "v": ObjectiveConfig(prediction="v"),
    "v cosine": ObjectiveConfig(prediction="v", beta_schedule="squaredcos_cap_v2"),
    "v zero snr": ObjectiveConfig(prediction="v", zero_terminal_snr=True),
    "v zero snr sigmoid": ObjectiveConfig(
        prediction="v", zero_terminal_snr=True, beta_schedule="sigmoid"
    ),
    "sample": ObjectiveConfig(prediction="sample"),
    "sample zero snr": ObjectiveConfig(
        prediction="sample", zero_terminal_snr=True, beta_schedule="scaled_linear"
    ),
    "flow": FLOW,
    "flow shift 3": replace(FLOW, flow_shift=3.0),
    "flow of 200": replace(FLOW, num_timesteps=200),
}


class Probe(nn.Module):
    """A denoiser that keeps the noisy input."""

    def forward(self, noisy: Tensor, timesteps: Tensor, **_: Any) -> tuple[Tensor]:
        self.noisy = noisy
        return (noisy,)


def training_levels(config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Returns the shares of latents and noise (num_timesteps,) in what training shows.

    Flow's are of the middle of the times that the denoiser is told as one timestep.
    """
    num = config.num_timesteps
    timesteps = torch.arange(num) + (0.5 if config.prediction == "flow" else 0)
    # The first example of each pair is all latent, the second all noise.
    pair = torch.tensor([1.0, 0.0]).repeat(num)[:, None, None, None]
    probe = Probe()
    diffusion.loss(
        probe,
        diffusion.alpha_bar(config),
        pair,
        torch.zeros(2 * num, 1, 1),
        1 - pair,
        timesteps.repeat_interleave(2),
        prediction=config.prediction,
    )
    signal, spread = probe.noisy.flatten().view(num, 2).T
    return signal, spread


def best_denoiser(config: ObjectiveConfig) -> Callable[..., tuple[Tensor]]:
    """Returns the best prediction for latents of MEAN and STD, as a UNet's `forward`."""
    signals, spreads = training_levels(config)

    def forward(x: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        assert timestep.dtype == torch.int64
        signal, spread = signals[timestep], spreads[timestep]
        gain = signal * STD**2 / (signal**2 * STD**2 + spread**2)
        clean = MEAN + gain * (x - signal * MEAN)
        noise = spread / (signal**2 * STD**2 + spread**2) * (x - signal * MEAN)
        return (
            {
                "epsilon": noise,
                "v": signal * noise - spread * clean,
                "sample": clean,
                "flow": noise - clean,
            }[config.prediction],
        )

    return forward


def exact(config: ObjectiveConfig, start: Tensor) -> Tensor:
    """Returns where the ODE takes the first latents."""
    signal, spread = (levels[-1] for levels in training_levels(config))
    return MEAN + STD * (start - signal * MEAN) / (signal**2 * STD**2 + spread**2).sqrt()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return sampler.load(make_bundle(tmp_path_factory.mktemp("closed") / "bundle"))


def make_pipeline(
    stock: StableDiffusionPipeline, config: ObjectiveConfig, folder: Path
) -> StableDiffusionPipeline:
    """Returns a stock pipeline with the best denoiser and the scheduler a bundle would bring."""
    own = sampling_scheduler(make_scheduler(config))
    own.save_pretrained(folder)
    loaded = type(own).from_pretrained(folder)
    pipeline = StableDiffusionPipeline(
        **(stock.components | {"scheduler": loaded}), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.forward = best_denoiser(config)
    return pipeline


def draw(pipeline: StableDiffusionPipeline, start: Tensor, num_steps: int) -> Tensor:
    """Returns the latents that the pipeline makes of the first ones."""
    result = pipeline(
        [""] * len(start),
        latents=start,
        guidance_scale=1.0,
        num_inference_steps=num_steps,
        output_type="latent",
    )
    latents: Tensor = result.images
    return latents


def first_latents() -> Tensor:
    return torch.randn(NUM_IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(0))


CASES = [
    (name, scheduler)
    for name, config in OBJECTIVES.items()
    for scheduler in ("bundle", "ddim", "dpmpp", "unipc", "euler")
    if (config.prediction, scheduler) != ("flow", "ddim")
]


@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_latents_come_out_as_they_were_trained(
    stock: StableDiffusionPipeline, tmp_path: Path, name: str, scheduler: Any
) -> None:
    config, start = OBJECTIVES[name], first_latents()
    pipeline = make_pipeline(stock, config, tmp_path)
    sampler.use_scheduler(pipeline, scheduler)
    drawn = draw(pipeline, start, num_steps=100)
    torch.testing.assert_close(drawn, exact(config, start), rtol=0, atol=0.03)
    assert abs(drawn.mean() - MEAN) < 0.02
    assert abs(drawn.std() - STD) < 0.02
