"""The objective agrees with diffusers and with the papers' formulas."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from latent_t2i.model import diffusion
from latent_t2i.model.bundle import sampling_scheduler
from latent_t2i.model.config import ObjectiveConfig
from latent_t2i.model.diffusion import BETA_RANGES, Schedule

B = 64
PREDICTIONS = ["epsilon", "v", "sample", "flow"]


class FixedDenoiser(nn.Module):
    """Returns a fixed tensor and records its inputs."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, noisy: Tensor, timesteps: Tensor, **kwargs: Any) -> tuple[Tensor]:
        self.noisy, self.timesteps = noisy, timesteps
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
) -> tuple[Tensor, FixedDenoiser, Schedule]:
    """Returns the losses (B,), the denoiser with its inputs, and the scheduler."""
    scheduler = diffusion.make_scheduler(config)
    denoiser = FixedDenoiser(example["answer"])
    loss = diffusion.loss(
        denoiser,
        diffusion.alpha_bar(config),
        example["latents"],
        torch.zeros(B, 7, 32),
        example["noise"],
        example["timesteps"],
        prediction=config.prediction,
        snr_gamma=config.snr_gamma,
    )
    return loss, denoiser, scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", BETA_RANGES)
def test_noise_and_target_match_diffusers(
    example: dict[str, Tensor], prediction: Any, schedule: Any
) -> None:
    config = ObjectiveConfig(prediction=prediction, beta_schedule=schedule)
    loss, denoiser, scheduler = losses(example, config)
    assert isinstance(scheduler, DDPMScheduler)
    latents, noise, timesteps = (example[name] for name in ("latents", "noise", "timesteps"))
    target = {
        "epsilon": noise,
        "v": scheduler.get_velocity(latents, noise, timesteps),
        "sample": latents,
    }[prediction]
    expected = (example["answer"] - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoiser.noisy, scheduler.add_noise(latents, noise, timesteps))
    torch.testing.assert_close(loss, expected)
    assert torch.equal(denoiser.timesteps, timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noise_and_target_match_diffusers(example: dict[str, Tensor], shift: float) -> None:
    sampler = FlowMatchEulerDiscreteScheduler(shift=shift)
    example["timesteps"] = sampler.timesteps[example["timesteps"]].clamp(max=999.99)
    loss, denoiser, _ = losses(example, ObjectiveConfig(prediction="flow", flow_shift=shift))
    latents, noise, timesteps = (example[name] for name in ("latents", "noise", "timesteps"))
    given = timesteps.where(timesteps < 999.99, torch.tensor(1000.0))
    expected = sampler.scale_noise(latents, given, noise)
    torch.testing.assert_close(denoiser.noisy, expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(
        loss, (example["answer"] - (noise - latents)).square().mean(dim=(1, 2, 3))
    )
    assert torch.equal(denoiser.timesteps, timesteps.floor().long())


def test_the_flow_target_leads_to_the_clean_latent() -> None:
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    denoiser = FixedDenoiser(noise - clean)
    table = diffusion.alpha_bar(ObjectiveConfig(prediction="flow", num_timesteps=10))
    torch.testing.assert_close(table, torch.linspace(1.0, 0.1, 10).square())
    timesteps = torch.tensor([0.0, 2.5, 9.0])
    text = torch.zeros(3, 7, 32)
    loss = diffusion.loss(denoiser, table, clean, text, noise, timesteps, prediction="flow")
    assert loss.tolist() == [0, 0, 0]
    back = denoiser.noisy - (timesteps / 10)[:, None, None, None] * denoiser.answer
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-6)
    assert denoiser.timesteps.tolist() == [0, 2, 9]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", BETA_RANGES)
def test_every_schedule_matches_diffusers_in_every_sampler(schedule: Any, zero_snr: bool) -> None:
    config = ObjectiveConfig(
        prediction="v", beta_schedule=schedule, zero_terminal_snr=zero_snr, num_timesteps=500
    )
    start, end = BETA_RANGES[schedule]
    stock = DDPMScheduler(500, start, end, schedule, rescale_betas_zero_snr=zero_snr)
    table = diffusion.alpha_bar(config)
    assert torch.equal(table, stock.alphas_cumprod)
    own = sampling_scheduler(diffusion.make_scheduler(config))
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        sampler = kind.from_config(own.config)
        # Solvers in log(snr) replace the final zero by 2^-24.
        torch.testing.assert_close(sampler.alphas_cumprod, table, rtol=0, atol=2**-24)
        sampler.set_timesteps(10)
        assert sampler.timesteps[0] == 499


def test_schedules_match_the_papers() -> None:
    def betas(schedule: Any) -> Tensor:
        scheduler = diffusion.make_scheduler(ObjectiveConfig(beta_schedule=schedule))
        return scheduler.betas.double()

    steps = torch.linspace(0, 1, 1000, dtype=torch.float64)
    ends = 0.00085**0.5, 0.012**0.5
    formulas = {
        "linear": 1e-4 + steps * (0.02 - 1e-4),  # Ho et al. 2020, section 4
        "scaled_linear": (ends[0] + steps * (ends[1] - ends[0])) ** 2,
        "sigmoid": 1e-4 + (0.02 - 1e-4) / (1 + torch.exp(6 - 12 * steps)),
    }
    for schedule, expected in formulas.items():
        torch.testing.assert_close(betas(schedule), expected, rtol=1e-5, atol=1e-9)
    # Nichol & Dhariwal 2021, eq. 17.
    bar = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2).double() ** 2
    expected = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    torch.testing.assert_close(betas("squaredcos_cap_v2"), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", BETA_RANGES)
def test_zero_terminal_snr_matches_the_paper(schedule: Any) -> None:
    tables = [
        diffusion.alpha_bar(
            ObjectiveConfig(prediction="v", beta_schedule=schedule, zero_terminal_snr=zero)
        )
        for zero in (False, True)
    ]
    before, after = (table.double().sqrt() for table in tables)
    # Lin et al. 2023, algorithm 1: shift sqrt(alpha_bar) to end at 0, scale it to start unchanged.
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)
    assert after[-1] == 0


def test_min_snr_weights_at_known_values() -> None:
    snr = torch.tensor([0.0, 0.25, 1.0, 4.0, 24.0, math.inf])
    a = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.96, 1.0])  # a + b = 1
    expected = {
        "epsilon": [1, 1, 1, 1, 5 / 24, 0],
        "v": [0, 0.2, 0.5, 0.8, 5 / 25, 0],
        "sample": [0, 0.25, 1, 4, 5, 5],
    }
    for prediction, weights in expected.items():
        found = diffusion.min_snr_weight(a, 1 - a, prediction, 5.0)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(weights), rtol=1e-4, atol=1e-7)
    sigma = torch.tensor([1.0, 2 / 3, 0.5, 1 / 3, 1 / (1 + math.sqrt(24)), 0.0])  # a, b of flow
    found = diffusion.min_snr_weight((1 - sigma).square(), sigma.square(), "flow", 5.0)
    torch.testing.assert_close(found[1:5], snr[1:5].clamp(max=5) * sigma[1:5].square())
    assert found[[0, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_apply_to_the_error_in_x0(
    example: dict[str, Tensor], prediction: Any
) -> None:
    example["timesteps"] = torch.arange(B) * 10 + 100
    config = ObjectiveConfig(prediction=prediction, snr_gamma=5.0)
    loss, denoiser, _ = losses(example, config)
    x, answer = denoiser.noisy.double(), example["answer"].double()
    t = example["timesteps"].double()[:, None, None, None]
    a = diffusion.alpha_bar(config).double()[example["timesteps"]][:, None, None, None]
    signal, spread = (1 - t / 1000, t / 1000) if prediction == "flow" else (a**0.5, (1 - a) ** 0.5)
    x0 = {
        "epsilon": (x - spread * answer) / signal,
        "v": signal * x - spread * answer,
        "sample": answer,
        "flow": x - spread * answer,
    }[prediction]
    error = (x0 - example["latents"]).square().mean(dim=(1, 2, 3))
    weight = (signal / spread).square().flatten().clamp(max=5.0)
    torch.testing.assert_close(loss.double(), weight * error, rtol=2e-3, atol=0)


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_losses_are_finite_at_zero_snr(example: dict[str, Tensor], prediction: Any) -> None:
    config = ObjectiveConfig(prediction=prediction, zero_terminal_snr=True, snr_gamma=5.0)
    loss, denoiser, _ = losses(example, config)
    assert diffusion.alpha_bar(config)[-1] == 0
    torch.testing.assert_close(denoiser.noisy[1], example["noise"][1])  # timestep 999: noise alone
    assert loss.isfinite().all()


def test_uniform_timesteps_are_equally_frequent() -> None:
    u = torch.arange(4000, dtype=torch.float64) / 4000
    timesteps = diffusion.sample_timesteps(u, ObjectiveConfig(num_timesteps=10))
    assert torch.bincount(timesteps).tolist() == [400] * 10


def test_logit_normal_timesteps_match_the_paper() -> None:
    config = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=0.4, logit_std=0.7)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = (diffusion.sample_timesteps(u, config).double() + 0.5) / 1000
    counts = torch.histc(times, bins=50, min=0, max=1) / 100_000 * 50
    t = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    # Esser et al. 2024, eq. 19: the density of the logit-normal distribution.
    logit = (torch.logit(t) - 0.4) / 0.7
    density = torch.exp(-0.5 * logit**2) / (0.7 * math.sqrt(2 * math.pi) * t * (1 - t))
    torch.testing.assert_close(counts, density, atol=0.02, rtol=0.02)


def test_logit_normal_quantiles_at_known_values() -> None:
    # The normal CDF at -2, -1, 0, 1 and 2 standard deviations.
    u = torch.tensor([0.0227501319, 0.1586552539, 0.5, 0.8413447461, 0.9772498681]).double()
    logits = 0.3 + 0.5 * torch.arange(-2.0, 3.0).double()
    expected = 1000 / (1 + torch.exp(-logits))
    settings: dict[str, Any] = {
        "timestep_sampling": "logit_normal",
        "logit_mean": 0.3,
        "logit_std": 0.5,
    }
    whole = diffusion.sample_timesteps(u, ObjectiveConfig(**settings))
    assert torch.equal(whole, expected.long())
    exact = diffusion.sample_timesteps(u, ObjectiveConfig(prediction="flow", **settings))
    torch.testing.assert_close(exact, expected.float())


def test_flow_shift_at_known_values() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9]).double()
    config = ObjectiveConfig(prediction="flow", flow_shift=3.0)
    # Esser et al. 2024, eq. 23: 3 u / (1 + 2 u).
    expected = torch.tensor([0, 500, 750, 900, 2700 / 2.8])
    torch.testing.assert_close(diffusion.sample_timesteps(u, config), expected)
    plain = ObjectiveConfig(prediction="flow")
    torch.testing.assert_close(diffusion.sample_timesteps(u, plain), 1000 * u.float())
    back = ObjectiveConfig(prediction="flow", flow_shift=1 / 3)
    again = diffusion.sample_timesteps(expected.double() / 1000, back)
    torch.testing.assert_close(again, 1000 * u.float())


@pytest.mark.parametrize("num_timesteps", [1, 10, 1000, 1025])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timestep_sampling": "logit_normal"},
        *({"prediction": "flow", "flow_shift": shift} for shift in (0.2, 1.0, 6.0)),
    ],
)
def test_extreme_random_numbers_give_the_first_and_last_timestep(
    num_timesteps: int, settings: dict[str, Any]
) -> None:
    config = ObjectiveConfig(num_timesteps=num_timesteps, **settings)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    timesteps = diffusion.sample_timesteps(u, config).long()
    assert timesteps.tolist() == [0, num_timesteps - 1]


def test_the_posterior_matches_diffusers() -> None:
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
        ({"logit_mean": 0.5}, "have no effect with .* uniform; .* found 0.5 and 1.0"),
        ({"zero_terminal_snr": True}, "needs objective.prediction v or sample, found epsilon"),
        (
            {"prediction": "flow", "beta_schedule": "sigmoid"},
            "beta_schedule: has no effect .* expected the default, linear, found sigmoid",
        ),
        (
            {"prediction": "flow", "zero_terminal_snr": True},
            "zero_terminal_snr: has no effect with objective.prediction flow",
        ),
        ({"flow_shift": 3.0}, "flow_shift: has no effect .* expected 1, found 3.0 with epsilon"),
        ({"prediction": "flow", "flow_shift": 0.0}, "flow_shift: expected more than 0, found 0.0"),
        ({"offset_noise": -0.1}, "offset_noise: expected 0 or more, found -0.1"),
        *(
            ({name: value}, f"objective.{name}: expected .*, found {value}")
            for name in ("snr_gamma", "logit_mean", "logit_std", "flow_shift", "caption_dropout")
            for value in (math.nan, math.inf)
        ),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**change)
