"""Every sampler and objective against the exact solution, through the stock pipeline.

For latents that are independent Gaussians, the best denoiser is known in closed form, and the
probability-flow ODE (Song et al. 2021, 2011.13456, eq. 13) maps each value to the same quantile.
The denoiser here uses the noise levels of training at each timestep, so a sampler with other
timesteps or noise levels misses the solution.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from latent_t2i.model import diffusion
from latent_t2i.model.bundle import sampling_scheduler
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.sample import sampler
from latent_t2i.train.batches import make_positions
from latent_t2i.train.draws import draw as draw_numbers
from tests.bundles import make_bundle

MEAN, STD = 0.7, 0.4
NUM_IMAGES = 4
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
    """A denoiser that stores its noisy input."""

    def forward(self, noisy: Tensor, timesteps: Tensor, **_: Any) -> tuple[Tensor]:
        self.noisy = noisy
        return (noisy,)


def training_levels(config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Returns the weights of latent and noise (num_timesteps,) in training's noisy latents."""
    num = config.num_timesteps
    # Flow rounds continuous times down to timesteps: these are the middles of the intervals.
    timesteps = torch.arange(num) + (0.5 if config.prediction == "flow" else 0)
    # The first example of each pair is a latent of one without noise, the second the reverse.
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
    """Returns the best prediction for latents of MEAN and STD, as a U-Net's `forward`."""
    signals, spreads = training_levels(config)

    def forward(x: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        assert timestep.dtype == torch.int64
        signal, spread = signals[timestep], spreads[timestep]
        gain = signal * STD**2 / (signal**2 * STD**2 + spread**2)
        clean = MEAN + gain * (x - signal * MEAN)
        noise = spread / (signal**2 * STD**2 + spread**2) * (x - signal * MEAN)
        predictions = {
            "epsilon": noise,
            "v": signal * noise - spread * clean,
            "sample": clean,
            "flow": noise - clean,
        }
        return (predictions[config.prediction],)

    return forward


def exact(config: ObjectiveConfig, start: Tensor) -> Tensor:
    """Returns the ODE's solution for the initial latents."""
    signal, spread = (levels[-1] for levels in training_levels(config))
    return MEAN + STD * (start - signal * MEAN) / (signal**2 * STD**2 + spread**2).sqrt()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return sampler.load(make_bundle(tmp_path_factory.mktemp("closed") / "bundle"))


def make_pipeline(
    stock: StableDiffusionPipeline, config: ObjectiveConfig, folder: Path
) -> StableDiffusionPipeline:
    """Returns a stock pipeline with the best denoiser and the scheduler that a bundle stores."""
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
    """Returns the latents that the pipeline samples from the initial ones."""
    result = pipeline(
        [""] * len(start),
        latents=start,
        guidance_scale=1.0,
        num_inference_steps=num_steps,
        output_type="latent",
    )
    latents: Tensor = result.images
    return latents


def initial_latents() -> Tensor:
    """Returns noise with a sample mean of exactly 0 and a sample deviation of exactly 1."""
    noise = torch.randn(NUM_IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return (noise - noise.mean()) / noise.std()


CASES = [
    (name, scheduler)
    for name, config in OBJECTIVES.items()
    for scheduler in ("bundle", "ddim", "dpmpp", "unipc", "euler")
    if (config.prediction, scheduler) != ("flow", "ddim")
]


@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_samplers_reach_the_exact_solution(
    stock: StableDiffusionPipeline, tmp_path: Path, name: str, scheduler: Any
) -> None:
    config, start = OBJECTIVES[name], initial_latents()
    pipeline = make_pipeline(stock, config, tmp_path)
    pipeline.scheduler = sampler.choose_scheduler(pipeline.scheduler, scheduler)
    drawn = draw(pipeline, start, num_steps=config.num_timesteps // 4)
    first_order = scheduler in ("ddim", "euler") or (scheduler, config.flow_shift) == ("bundle", 1)
    tolerance = 0.045 if first_order else 0.02
    torch.testing.assert_close(drawn, exact(config, start), rtol=0, atol=tolerance)
    # If the last noise level is not pure noise, the mean is biased (Lin et al. 2023).
    assert abs(drawn.mean() - MEAN) < (0.03 if "scaled" in name else 0.01)
    assert abs(drawn.std() - STD) < 0.02


def fitted_denoiser(config: ObjectiveConfig) -> Callable[..., tuple[Tensor]]:
    """Returns the linear fit to training's targets at each timestep, as a U-Net's `forward`.

    The targets are read from the loss alone: at a prediction of zero its gradient is -2 * target.
    """
    num = 40_000
    # A seed for which every timestep is drawn more than once.
    numbers = draw_numbers(make_positions(0, range(num)), 2, (1, 4, 4), config)
    latents = MEAN + STD * numbers.posterior_noise
    seen: list[Tensor] = []

    def predict_zero(noisy: Tensor, timesteps: Tensor, **_: Any) -> tuple[Tensor]:
        seen.extend((noisy, timesteps, torch.zeros_like(noisy, requires_grad=True)))
        return (seen[2],)

    loss = diffusion.loss(
        predict_zero,  # type: ignore[arg-type]
        diffusion.alpha_bar(config),
        latents,
        torch.zeros(len(latents), 1, 1),
        numbers.noise,
        numbers.timesteps,
        prediction=config.prediction,
    )
    loss.sum().backward()
    noisy, timesteps, prediction = seen
    assert prediction.grad is not None
    target = -prediction.grad * latents[0].numel() / 2
    lines = torch.empty(config.num_timesteps, 2)
    for timestep in range(config.num_timesteps):
        x, y = noisy[timesteps == timestep].flatten(), target[timesteps == timestep].flatten()
        gain = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
        lines[timestep] = torch.stack([gain, y.mean() - gain * x.mean()])
    return lambda x, timestep, *_, **__: (lines[timestep, 0] * x + lines[timestep, 1],)


COSINE = ObjectiveConfig(beta_schedule="squaredcos_cap_v2", num_timesteps=200)
LEARNED = {
    "epsilon": COSINE,
    "v": replace(COSINE, prediction="v", beta_schedule="linear", zero_terminal_snr=True),
    "sample": replace(COSINE, prediction="sample"),
    "flow": replace(FLOW, num_timesteps=200),
    "flow shift 2": replace(
        FLOW, num_timesteps=200, flow_shift=2.0, timestep_sampling="logit_normal", logit_std=1.5
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_fitted_denoiser_samples_the_training_distribution(
    stock: StableDiffusionPipeline, tmp_path: Path, name: str
) -> None:
    pipeline = make_pipeline(stock, LEARNED[name], tmp_path)
    pipeline.unet.forward = fitted_denoiser(LEARNED[name])
    own = pipeline.scheduler
    for scheduler in ("bundle", "dpmpp", "unipc"):
        pipeline.scheduler = sampler.choose_scheduler(own, scheduler)  # type: ignore[arg-type]
        drawn = draw(pipeline, initial_latents(), 50)
        assert abs(drawn.mean() - MEAN) < 0.02
        assert abs(drawn.std() - STD) < 0.03


@pytest.mark.parametrize(
    ("trained", "sampled"),
    [
        ("v", "v cosine"),
        ("v", "epsilon"),
        ("v", "sample"),
        ("v zero snr", "sample zero snr"),
        ("flow", "v"),
    ],
)
def test_a_sampler_of_another_objective_misses(
    stock: StableDiffusionPipeline, tmp_path: Path, trained: str, sampled: str
) -> None:
    pipeline = make_pipeline(stock, OBJECTIVES[sampled], tmp_path)
    pipeline.unet.forward = best_denoiser(OBJECTIVES[trained])
    missed = draw(pipeline, initial_latents(), 250) - exact(OBJECTIVES[trained], initial_latents())
    assert missed.abs().max() > 0.08


@pytest.mark.parametrize("scheduler", ["bundle", "dpmpp", "unipc", "euler"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_timesteps_match_the_noise_levels(
    stock: StableDiffusionPipeline, tmp_path: Path, scheduler: Any, shift: float
) -> None:
    config = replace(FLOW, flow_shift=shift)
    pipeline = make_pipeline(stock, config, tmp_path)
    pipeline.scheduler = sampler.choose_scheduler(pipeline.scheduler, scheduler)
    pipeline.scheduler.set_timesteps(25)
    sigmas = pipeline.scheduler.sigmas[:-1]
    timesteps = pipeline.scheduler.timesteps
    assert (timesteps - (sigmas.double() * 1000)).abs().max() < 1  # training rounds down
    unshifted = torch.linspace(1.0, 0.04, 25)
    expected = shift * unshifted / (1 + (shift - 1) * unshifted)
    torch.testing.assert_close(sigmas, expected, rtol=0, atol=4e-3)


def test_euler_equals_diffusers_euler_on_flow(
    stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline = make_pipeline(stock, FLOW, tmp_path)
    pipeline.scheduler = sampler.choose_scheduler(pipeline.scheduler, "euler")
    pipeline.scheduler.set_timesteps(20)
    timesteps, sigmas = pipeline.scheduler.timesteps, pipeline.scheduler.sigmas
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=sigmas[:-1].tolist())
    latents = initial_latents()
    for rounded, t in zip(timesteps, euler.timesteps, strict=True):
        latents = euler.step(best_denoiser(FLOW)(latents, rounded)[0], t, latents).prev_sample
    torch.testing.assert_close(draw(pipeline, initial_latents(), 20), latents, rtol=0, atol=1e-5)


def test_euler_equals_ddim_on_other_objectives(
    stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline = make_pipeline(stock, OBJECTIVES["v"], tmp_path)
    own, results = pipeline.scheduler, []
    for scheduler in ("ddim", "euler"):
        pipeline.scheduler = sampler.choose_scheduler(own, scheduler)  # type: ignore[arg-type]
        results.append(draw(pipeline, initial_latents(), 10))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_drawing_keeps_the_scheduler_of_the_bundle(
    stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline = make_pipeline(stock, FLOW, tmp_path)
    own = pipeline.scheduler
    prompts: dict[str, Any] = {"prompts": ["a"], "seeds": [0], "guidance_scale": 1.0}
    sampler.draw(pipeline, num_steps=2, scheduler="euler", **prompts)
    assert pipeline.scheduler is own
    assert sampler.choose_scheduler(own, "euler").config.solver_order == 1
    assert sampler.choose_scheduler(own, "dpmpp").config.solver_order == 2
    assert sampler.choose_scheduler(own, "bundle") is own


def test_unsuitable_samplers_and_step_counts_are_errors(
    stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline = make_pipeline(stock, replace(FLOW, num_timesteps=50, flow_shift=4.0), tmp_path)
    with pytest.raises(ValueError, match=r"--scheduler: found ddim.* \(flow\); expected .*, unipc"):
        sampler.choose_scheduler(pipeline.scheduler, "ddim")
    prompts: dict[str, Any] = {"prompts": ["a"], "seeds": [0], "guidance_scale": 1.0}
    with pytest.raises(ValueError, match=r"--num-steps: expected at most .* 50 .* found 51"):
        sampler.draw(pipeline, num_steps=51, **prompts)
    with pytest.raises(ValueError, match=r"40 steps the first two round to .* 49 .* fewer"):
        sampler.draw(pipeline, num_steps=40, **prompts)
    sampler.draw(pipeline, num_steps=5, **prompts)
    pipeline = make_pipeline(stock, OBJECTIVES["v"], tmp_path)
    for scheduler in ("ddim", "bundle"):
        with pytest.raises(ValueError, match=r"--num-steps: DDIM .* divisor, found 30.* euler"):
            sampler.draw(pipeline, num_steps=30, scheduler=scheduler, **prompts)  # type: ignore[arg-type]


def test_diffusers_ddim_needs_steps_that_divide_the_timesteps(
    stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """If this fails, diffusers has fixed DDIM and `check_steps` can allow such step counts."""
    pipeline = make_pipeline(stock, OBJECTIVES["v cosine"], tmp_path)
    dividing, other = (draw(pipeline, initial_latents(), num).std() for num in (125, 150))
    assert abs(dividing / STD - 1) < 0.02
    assert other / STD - 1 > 0.05
    pipeline.scheduler = sampler.choose_scheduler(pipeline.scheduler, "euler")
    assert abs(draw(pipeline, initial_latents(), 150).std() / STD - 1) < 0.02
