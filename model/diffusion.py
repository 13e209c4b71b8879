"""The objective on one screen: tensors in, a loss per example out; no I/O, no config object.

Notation: x0 a scaled latent, e noise, x_t = sqrt(a) x0 + sqrt(b) e, snr = a / b. DDPM has
a = alpha_bar_t and b = 1 - a; rectified flow has sqrt(a) = 1 - sigma and sqrt(b) = sigma.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

Prediction = Literal["epsilon", "v", "sample", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
Schedule: TypeAlias = DDPMScheduler | DPMSolverMultistepScheduler
PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "sample": "sample",
    "flow": "flow_prediction",
}
# The end points of DDPM and of latent diffusion; the cosine of improved DDPM has none of its own.
BETA_RANGES = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (1e-4, 0.02),
    "sigmoid": (1e-4, 0.02),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the denoiser learns to predict, under which noise."""

    prediction: Prediction = "epsilon"
    """Target: the noise (DDPM), the velocity (progressive distillation), the clean latent, or the
    velocity of rectified flow (Liu et al. 2022, 2209.03003), which has noise levels of its own."""
    beta_schedule: BetaSchedule = "linear"
    """How noise grows with time, by diffusers' names; `flow` has no betas."""
    num_timesteps: int = 1000
    """Number of noise levels; of `flow`, whose levels are continuous, that the denoiser can tell
    apart."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last level is pure noise (Lin et al. 2023, 2305.08891)."""
    snr_gamma: float | None = None
    """Cap of min-SNR weighting (5 is usual); null weighs every timestep alike."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Which noise levels are trained: all alike, or the middle ones more often (Esser et al. 2024,
    2403.03206, section 3.1), where a caption says most about the picture."""
    logit_mean: float = 0.0
    """Mean of the logit of t / num_timesteps under logit_normal; above zero favours more noise."""
    logit_std: float = 1.0
    """Standard deviation of that logit; smaller keeps closer to the mean."""
    flow_shift: float = 1.0
    """Shift of flow's noise levels, in training and in the bundle's samplers; above 1 favours more
    noise, as more latent pixels need (Esser et al. 2024, 2403.03206, eq. 23: sqrt(m / n))."""
    offset_noise: float = 0.0
    """Adds so much noise that is one number per channel to the noise, so that pictures as a whole
    can be learned to be dark or bright (Guttenberg 2023, crosslabs.org); 0.1 is usual."""
    caption_dropout: float = 0.1
    """Share of examples trained on the empty prompt, which guidance needs (Ho & Salimans 2022)."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"objective.caption_dropout: expected 0 to 1, found {self.caption_dropout}"
            )
        if self.num_timesteps < 1:
            raise ValueError(
                f"objective.num_timesteps: expected 1 or more, found {self.num_timesteps}"
            )
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"objective.snr_gamma: expected more than 0, found {self.snr_gamma}")
        if self.logit_std <= 0:
            raise ValueError(f"objective.logit_std: expected more than 0, found {self.logit_std}")
        if self.offset_noise < 0:
            raise ValueError(
                f"objective.offset_noise: expected 0 or more, found {self.offset_noise}"
            )
        if self.timestep_sampling == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                "objective.logit_mean and logit_std: only logit_normal sampling reads them, found "
                "objective.timestep_sampling uniform"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "objective.zero_terminal_snr: true needs objective.prediction v or sample, found "
                "epsilon: the noise says nothing of the picture where there is only noise"
            )
        self._check_flow()

    def _check_flow(self) -> None:
        """Refuses a schedule of betas for flow, and flow's shift for a schedule of betas."""
        if self.flow_shift <= 0:
            raise ValueError(f"objective.flow_shift: expected more than 0, found {self.flow_shift}")
        if self.prediction != "flow" and self.flow_shift != 1:
            raise ValueError(
                f"objective.flow_shift: only objective.prediction flow reads it; expected 1, found "
                f"{self.flow_shift} with {self.prediction}"
            )
        if self.prediction == "flow" and self.beta_schedule != "linear":
            raise ValueError(
                "objective.beta_schedule: has no effect with objective.prediction flow, whose "
                f"noise grows evenly; expected the default, linear, found {self.beta_schedule}"
            )
        if self.prediction == "flow" and self.zero_terminal_snr:
            raise ValueError(
                "objective.zero_terminal_snr: has no effect with objective.prediction flow, which "
                "ends at pure noise anyway; expected false, found true"
            )


def make_scheduler(config: ObjectiveConfig) -> Schedule:
    """Returns the noise schedule in diffusers' form.

    Of flow it is a sampler that a stock pipeline can use; of the others DDPM's (Ho et al. 2020,
    2006.11239). The sigmoid schedule (Xu et al. 2022, 2203.02923) goes into the config as its betas
    too, since no other scheduler knows it by name.
    """
    beta_start, beta_end = BETA_RANGES[config.beta_schedule]
    settings = {
        "num_train_timesteps": config.num_timesteps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": PREDICTION_TYPES[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing",
    }
    if config.prediction == "flow":
        return DPMSolverMultistepScheduler(
            **settings, use_flow_sigmas=True, flow_shift=config.flow_shift, steps_offset=1
        )
    if config.beta_schedule == "sigmoid":
        betas = DDPMScheduler(**(settings | {"rescale_betas_zero_snr": False})).betas
        settings["trained_betas"] = betas.tolist()
    return DDPMScheduler(**settings, clip_sample=False)


def alpha_bar(config: ObjectiveConfig) -> Tensor:
    """Returns a (num_timesteps,), the picture's share of the power at each whole timestep."""
    if config.prediction == "flow":
        return (1 - torch.arange(config.num_timesteps) / config.num_timesteps).square()
    alphas_cumprod: Tensor = make_scheduler(config).alphas_cumprod
    return alphas_cumprod


def sample_timesteps(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """Turns uniform numbers u (B,) in [0, 1) into timesteps (B,): int64, or float32 of flow.

    Logit-normal: the logit of t is normal (Esser et al. 2024, 2403.03206, eq. 19), by the inverse
    of the normal distribution function, so that one number gives one timestep either way. Flow
    keeps the fraction, sigma = t / num_timesteps, and shifts it (there, eq. 23).
    """
    if config.timestep_sampling == "logit_normal":
        u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    if config.prediction != "flow":
        return (u * config.num_timesteps).long().clamp(max=config.num_timesteps - 1)
    sigma = config.flow_shift * u / (1 + (config.flow_shift - 1) * u)
    return sigma.float().clamp(max=1 - 2**-23) * config.num_timesteps


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draws latents (B, C, h, w) from moments (B, 2C, h, w); moments of C channels are the latents.

    The log-variance is clamped as diffusers' DiagonalGaussianDistribution does.
    """
    moments = moments.float()
    if moments.shape[1] == noise.shape[1]:
        return moments
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def loss(
    denoiser: nn.Module,
    alpha_bar: Tensor,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    prediction: Prediction,
    snr_gamma: float | None = None,
) -> Tensor:
    """Returns the weighted squared error of each example, (B,) float32.

    Takes the schedule's alpha_bar (num_timesteps,), scaled latents and noise (B, C, h, w), text
    (B, T, D) and timesteps (B,). Flow's timesteps have fractions, which the denoiser is not told,
    as by diffusers' flow samplers; of alpha_bar it takes the length only.
    """
    if prediction == "flow":  # Esser et al. 2024, 2403.03206, eq. 13
        sigma = timesteps / len(alpha_bar)
        a, b = (1 - sigma).square(), sigma.square()
    else:
        a = alpha_bar[timesteps]
        b = 1 - a
    signal, spread = (power[:, None, None, None].sqrt() for power in (a, b))
    noisy = signal * latents + spread * noise  # DDPM eq. 4
    if prediction == "epsilon":
        target = noise  # DDPM eq. 14
    elif prediction == "v":  # Salimans & Ho 2022, 2202.00512, appendix D
        target = signal * noise - spread * latents
    elif (
        prediction == "flow"
    ):  # d x_t / d sigma; Liu et al. 2022, 2209.03003, eq. 1 (time reversed)
        target = noise - latents
    else:
        target = latents
    predicted: Tensor = denoiser(
        noisy, timesteps.long(), encoder_hidden_states=text, return_dict=False
    )[0]
    error: Tensor = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    return error if snr_gamma is None else error * min_snr_weight(a, b, prediction, snr_gamma)


def min_snr_weight(a: Tensor, b: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    """Returns the min-SNR-gamma weight of each example (Hang et al. 2023, 2303.09556, section 3.4).

    The paper weighs the squared error in x0 by min(snr, gamma). With x_t given, x0 is
    (x_t - sqrt(b) e) / sqrt(a), or sqrt(a) x_t - sqrt(b) v, or x_t - sigma u for flow's velocity u:
    so the target's error times b / a, b, and b again (sigma^2), is that of x0. Written in the
    powers a and b, each weight stays finite where one of them is zero.
    """
    if prediction == "epsilon":  # min(snr, gamma) / snr
        return (gamma * b / a).clamp(max=1.0)
    if prediction == "sample":
        return (a / b).clamp(max=gamma)
    return torch.minimum(a, gamma * b)  # v, flow: min(snr, gamma) * b
