"""The objective on one screen: tensors in, a loss per example out; no I/O, no config object.

Notation of DDPM: x0 a scaled latent, e unit noise, a = alpha_bar_t, snr = a / (1 - a).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

Prediction = Literal["epsilon", "v", "sample"]
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
# The end points of DDPM and of latent diffusion; the cosine of improved DDPM has none of its own.
BETA_RANGES = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (1e-4, 0.02),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the denoiser learns to predict, under which noise."""

    prediction: Prediction = "epsilon"
    """Target: the noise (DDPM), the velocity (progressive distillation) or the clean latent."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """How noise grows with time, by diffusers' names."""
    num_timesteps: int = 1000
    """Number of noise levels."""
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


def make_scheduler(config: ObjectiveConfig) -> DDPMScheduler:
    """Returns the noise schedule as diffusers' DDPM scheduler (Ho et al. 2020, 2006.11239)."""
    beta_start, beta_end = BETA_RANGES[config.beta_schedule]
    return DDPMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=PREDICTION_TYPES[config.prediction],
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def sample_timesteps(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """Turns uniform numbers u (B,) in [0, 1) into timesteps (B,) int64.

    Logit-normal: the logit of t is normal (Esser et al. 2024, 2403.03206, eq. 19), by the inverse
    of the normal distribution function, so that one number gives one timestep either way.
    """
    if config.timestep_sampling == "logit_normal":
        u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    return (u * config.num_timesteps).long().clamp(max=config.num_timesteps - 1)


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
    (B, T, D) and timesteps (B,).
    """
    a = alpha_bar[timesteps]
    a_wide = a[:, None, None, None]
    noisy = a_wide.sqrt() * latents + (1 - a_wide).sqrt() * noise  # DDPM eq. 4
    if prediction == "epsilon":
        target = noise  # DDPM eq. 14
    elif prediction == "v":  # Salimans & Ho 2022, 2202.00512, appendix D
        target = a_wide.sqrt() * noise - (1 - a_wide).sqrt() * latents
    else:
        target = latents
    predicted: Tensor = denoiser(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
    error: Tensor = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    return error if snr_gamma is None else error * min_snr_weight(a, prediction, snr_gamma)


def min_snr_weight(a: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    """Returns the min-SNR-gamma weight of each example (Hang et al. 2023, 2303.09556, section 3.4).

    The paper weighs the error in x0 by min(snr, gamma); an error in e is snr times smaller and one
    in v snr + 1 times. Written in `a` rather than snr, each stays finite at zero SNR.
    """
    if prediction == "epsilon":  # min(snr, gamma) / snr
        return (gamma * (1 - a) / a).clamp(max=1.0)
    if prediction == "v":  # min(snr, gamma) / (snr + 1)
        return torch.minimum(a, gamma * (1 - a))
    return (a / (1 - a)).clamp(max=gamma)
