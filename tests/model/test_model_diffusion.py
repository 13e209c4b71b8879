"""The objective against diffusers' own arithmetic and against the papers' by hand."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from model import diffusion
from model.diffusion import ObjectiveConfig

B = 64


class Returns(nn.Module):
    """A denoiser that answers with a fixed tensor and keeps what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noisy: Tensor, timesteps: Tensor, **kwargs: Any) -> tuple[Tensor]:
        self.noisy = noisy
        return (self.answer,)


@pytest.fixture
def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise, answer = torch.randn(3, B, 4, 8, 8, generator=generator)
    timesteps = torch.randint(1000, (B,), generator=generator)
    timesteps[:2] = torch.tensor([0, 999])
    return {"latents": latents, "noise": noise, "timesteps": timesteps, "answer": answer}


def losses(
    example: dict[str, Tensor], config: ObjectiveConfig
) -> tuple[Tensor, Tensor, DDPMScheduler]:
    """Returns the losses (B,), the noisy latents and the scheduler."""
    scheduler = diffusion.make_scheduler(config)
    denoiser = Returns(example["answer"])
    loss = diffusion.loss(
        denoiser,
        scheduler.alphas_cumprod,
        example["latents"],
        torch.zeros(B, 7, 32),
        example["noise"],
        example["timesteps"],
        prediction=config.prediction,
        snr_gamma=config.snr_gamma,
    )
    return loss, denoiser.noisy, scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_and_target_are_diffusers(
    example: dict[str, Tensor], prediction: Any, schedule: Any
) -> None:
    config = ObjectiveConfig(prediction=prediction, beta_schedule=schedule)
    loss, noisy, scheduler = losses(example, config)
    latents, noise, timesteps = (example[name] for name in ("latents", "noise", "timesteps"))
    target = {
        "epsilon": noise,
        "v": scheduler.get_velocity(latents, noise, timesteps),
        "sample": latents,
    }[prediction]
    expected = (example["answer"] - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_min_snr_weights_are_the_papers(example: dict[str, Tensor], prediction: Any) -> None:
    plain, _, scheduler = losses(example, ObjectiveConfig(prediction=prediction))
    weighted, _, _ = losses(example, ObjectiveConfig(prediction=prediction, snr_gamma=5.0))
    snr = compute_snr(scheduler, example["timesteps"])
    by_hand = {"epsilon": snr, "v": snr + 1, "sample": torch.ones(B)}[prediction]
    weight = snr.clamp(max=5.0) / by_hand
    torch.testing.assert_close(weighted, plain * weight, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_losses_are_finite_at_zero_snr(example: dict[str, Tensor], prediction: Any) -> None:
    config = ObjectiveConfig(prediction=prediction, zero_terminal_snr=True, snr_gamma=5.0)
    loss, noisy, scheduler = losses(example, config)
    assert scheduler.alphas_cumprod[-1] == 0
    torch.testing.assert_close(noisy[1], example["noise"][1])  # timestep 999: noise alone
    assert loss.isfinite().all()


def test_uniform_timesteps_come_alike() -> None:
    u = torch.arange(4000, dtype=torch.float64) / 4000
    timesteps = diffusion.sample_timesteps(u, ObjectiveConfig(num_timesteps=10))
    assert torch.bincount(timesteps).tolist() == [400] * 10


def test_logit_normal_timesteps_are_the_papers() -> None:
    config = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=0.4, logit_std=0.7)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = (diffusion.sample_timesteps(u, config).double() + 0.5) / 1000
    counts = torch.histc(times, bins=50, min=0, max=1) / 100_000 * 50
    t = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    # Esser et al. 2024, eq. 19: the density of the logit-normal distribution.
    logit = (torch.logit(t) - 0.4) / 0.7
    density = torch.exp(-0.5 * logit**2) / (0.7 * math.sqrt(2 * math.pi) * t * (1 - t))
    torch.testing.assert_close(counts, density, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_ends_of_chance_are_timesteps(sampling: Any) -> None:
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    timesteps = diffusion.sample_timesteps(u, ObjectiveConfig(timestep_sampling=sampling))
    assert timesteps.tolist() == [0, 999]


def test_the_posterior_is_diffusers() -> None:
    moments, noise = torch.randn(2, 8, 8, 8) * 30, torch.randn(2, 4, 8, 8)
    posterior = DiagonalGaussianDistribution(moments.half().float())
    drawn = diffusion.sample_posterior(moments.half(), noise)
    torch.testing.assert_close(drawn, posterior.mean + posterior.std * noise)
    plain = torch.randn(2, 4, 8, 8).half()
    torch.testing.assert_close(diffusion.sample_posterior(plain, noise), plain.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_dropout": 1.5}, "objective.caption_dropout: expected 0 to 1, found 1.5"),
        ({"num_timesteps": 0}, "objective.num_timesteps: expected 1 or more, found 0"),
        ({"snr_gamma": 0.0}, "objective.snr_gamma: expected more than 0, found 0.0"),
        (
            {"timestep_sampling": "logit_normal", "logit_std": 0.0},
            "logit_std: expected more than 0",
        ),
        ({"logit_mean": 0.5}, "only logit_normal sampling reads them"),
        ({"zero_terminal_snr": True}, "needs objective.prediction v or sample, found epsilon"),
    ],
)
def test_an_impossible_objective_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**change)
