"""The training objective: noise schedule, timesteps, target and loss, as functions of tensors.

Notation: x0 a scaled latent, e noise, x_t = sqrt(a) x0 + sqrt(b) e, snr = a / b. DDPM has
a = alpha_bar_t and b = 1 - a; rectified flow has sqrt(a) = 1 - sigma and sqrt(b) = sigma.
"""

from typing import TypeAlias

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from latent_t2i.model.config import ObjectiveConfig as ObjectiveConfig
from latent_t2i.model.config import Prediction as Prediction

Schedule: TypeAlias = DDPMScheduler | DPMSolverMultistepScheduler
PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "sample": "sample",
    "flow": "flow_prediction",
}
# First and last beta, of DDPM and of latent diffusion. The cosine schedule ignores them.
BETA_RANGES = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (1e-4, 0.02),
    "sigmoid": (1e-4, 0.02),
}


def make_scheduler(config: ObjectiveConfig) -> Schedule:
    """Returns the noise schedule as a diffusers scheduler.

    For flow this is a sampler that a stock pipeline can use, otherwise DDPM (Ho et al. 2020,
    2006.11239).
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
        # Only DDPMScheduler supports this schedule (Xu et al. 2022, 2203.02923) by name, so the
        # config of other schedulers needs the betas themselves.
        betas = DDPMScheduler(**(settings | {"rescale_betas_zero_snr": False})).betas
        settings["trained_betas"] = betas.tolist()
    return DDPMScheduler(**settings, clip_sample=False)


def alpha_bar(config: ObjectiveConfig) -> Tensor:
    """Returns a (num_timesteps,): the signal's share of the power at each integer timestep."""
    if config.prediction == "flow":
        return (1 - torch.arange(config.num_timesteps) / config.num_timesteps).square()
    alphas_cumprod: Tensor = make_scheduler(config).alphas_cumprod
    return alphas_cumprod


def sample_timesteps(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """Maps uniform numbers u (B,) in [0, 1) to timesteps (B,): int64, or float32 for flow.

    Logit-normal: the logit of t is normal (Esser et al. 2024, 2403.03206, eq. 19), computed with
    the inverse normal CDF. Flow: sigma = t / num_timesteps is continuous and shifted (eq. 23).
    """
    if config.timestep_sampling == "logit_normal":
        u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    if config.prediction != "flow":
        return (u * config.num_timesteps).long().clamp(max=config.num_timesteps - 1)
    sigma = config.flow_shift * u / (1 + (config.flow_shift - 1) * u)
    # Below 1 also after rounding: timestep num_timesteps does not exist.
    return sigma.float().clamp(max=1 - 2**-23) * config.num_timesteps


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Samples latents (B, C, h, w) from moments (B, 2C, h, w); C channels are already latents.

    The log-variance is clamped as in diffusers' DiagonalGaussianDistribution.
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

    Shapes: alpha_bar (num_timesteps,), scaled latents and noise (B, C, h, w), text (B, T, D),
    timesteps (B,). Flow uses only the length of alpha_bar. Its timesteps are fractional, and the
    denoiser gets them rounded down, as from diffusers' flow samplers.
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
    elif prediction == "flow":
        target = noise - latents  # d x_t / d sigma; Liu et al. 2022, 2209.03003, eq. 1, reversed
    else:
        target = latents
    predicted: Tensor = denoiser(
        noisy, timesteps.long(), encoder_hidden_states=text, return_dict=False
    )[0]
    error: Tensor = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    return error if snr_gamma is None else error * min_snr_weight(a, b, prediction, snr_gamma)


def min_snr_weight(a: Tensor, b: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    """Returns the min-SNR-gamma weight of each example (Hang et al. 2023, 2303.09556, section 3.4).

    The paper multiplies the squared error in x0 by min(snr, gamma). Given x_t, x0 is
    (x_t - sqrt(b) e) / sqrt(a), or sqrt(a) x_t - sqrt(b) v, or x_t - sigma u for flow's velocity u.
    The error in x0 is therefore b / a, b, or b = sigma^2 times the error in the target.
    """
    # In terms of a and b, the weights stay finite where one of them is zero.
    if prediction == "epsilon":  # min(snr, gamma) / snr
        return (gamma * b / a).clamp(max=1.0)
    if prediction == "sample":
        return (a / b).clamp(max=gamma)
    return torch.minimum(a, gamma * b)  # v, flow: min(snr, gamma) * b
