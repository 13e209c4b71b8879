"""Every objective trains and gives a bundle that a stock pipeline samples from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.sample import sampler
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from latent_t2i.train.setup import make_accelerator, make_objective, make_source
from tests.train.conftest import MakeConfig, losses

FLOW = ObjectiveConfig(
    prediction="flow",
    flow_shift=2.0,
    timestep_sampling="logit_normal",
    offset_noise=0.1,
    snr_gamma=5.0,
)
OBJECTIVES = {
    "epsilon": ObjectiveConfig(beta_schedule="sigmoid", offset_noise=0.1),
    "v": ObjectiveConfig(prediction="v", zero_terminal_snr=True, snr_gamma=5.0),
    "v sigmoid": ObjectiveConfig(
        prediction="v", zero_terminal_snr=True, beta_schedule="sigmoid", num_timesteps=100
    ),
    "sample": ObjectiveConfig(prediction="sample", beta_schedule="squaredcos_cap_v2"),
    "flow": ObjectiveConfig(prediction="flow"),
    "flow with everything": FLOW,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stock_pipeline_draws_the_images_of_sample(make_config: MakeConfig, name: str) -> None:
    objective = OBJECTIVES[name]
    bundle = train(make_config(objective=objective, num_steps=3))
    stock = StableDiffusionPipeline.from_pretrained(bundle)
    stock.set_progress_bar_config(disable=True)
    drawn = stock(
        ["red", "blue"],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    )
    pipeline = sampler.load(bundle)
    ours = sampler.draw(
        pipeline, ["red", "blue"], [5, 6], guidance_scale=3.0, num_steps=4, scheduler="bundle"
    )
    for one, other in zip(drawn.images, ours, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    flow = objective.prediction == "flow"
    config = stock.scheduler.config
    assert type(stock.scheduler) is (DPMSolverMultistepScheduler if flow else DDIMScheduler)
    assert config.num_train_timesteps == objective.num_timesteps
    assert config.rescale_betas_zero_snr == objective.zero_terminal_snr
    if flow:
        assert config.flow_shift == objective.flow_shift and config.use_flow_sigmas
    for scheduler in ("dpmpp", "unipc", "euler"):
        other = sampler.choose_scheduler(pipeline.scheduler, scheduler)  # type: ignore[arg-type]
        other.set_timesteps(4)
        assert other.timesteps[0] == objective.num_timesteps - 1


def test_a_flow_run_resumes_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    for out, num_steps in (("whole", 6), ("resumed", 3), ("resumed", 6)):
        folder = str(tmp_path / out)
        train(make_config(out=folder, objective=FLOW, num_steps=num_steps, log_every_steps=1))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_offset_noise_is_in_input_and_target(make_config: MakeConfig, prediction: Any) -> None:
    """A denoiser that knows the noise has no error only if both contain the same offset."""
    config = make_config(objective=ObjectiveConfig(prediction=prediction, offset_noise=0.5))
    accelerator = make_accelerator("no")
    plan = validate(config, num_processes=1)
    objective = make_objective(plan, accelerator.device)
    batch = make_source(plan, accelerator).batch(0)
    draws = objective.draw(batch)

    def oracle(noisy: torch.Tensor, timesteps: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        t = draws.timesteps[:, None, None, None]
        a = objective.alpha_bar[timesteps][:, None, None, None]
        flow = prediction == "flow"
        signal, spread = (1 - t / 1000, t / 1000) if flow else (a.sqrt(), (1 - a).sqrt())
        clean = (noisy - spread * draws.noise) / signal
        return (
            {
                "epsilon": draws.noise,
                "v": signal * draws.noise - spread * clean,
                "sample": clean,
                "flow": draws.noise - clean,
            }[prediction],
        )

    assert objective(oracle, batch, draws).max() < 1e-6  # type: ignore[arg-type]
    plain = replace(draws, noise=draws.noise - draws.noise.mean(dim=(2, 3), keepdim=True))
    assert objective(oracle, batch, plain).max() > 1e-3  # type: ignore[arg-type]
