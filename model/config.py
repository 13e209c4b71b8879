"""Settings of the denoiser, the objective and the weight averages.

This module imports neither torch nor diffusers, so that `--help` starts quickly.
"""

from dataclasses import dataclass
from typing import Literal

from latent_t2i.model.checks import check_number

AttentionKernel = Literal["auto", "sdpa", "plain"]
Prediction = Literal["epsilon", "v", "sample", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
MAX_SIGMA_REL = 12**-0.5
"""Width of the plain mean of all steps (gamma 0), the widest power function that is useful."""


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Size and shape of the U-Net. The default is Stable Diffusion 1's: 860 million parameters."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width of each level, from full resolution down; each level halves the resolution."""
    layers_per_block: int = 2
    """Residual blocks per level on the way down (one more on the way up)."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Whether each level has self- and cross-attention. The middle block always has."""
    attention_head_dim: int = 8
    """Number of attention heads of every level. The name is diffusers', which is misleading."""
    heads: tuple[int, ...] = ()
    """Attention heads of each level, instead of attention_head_dim; Stable Diffusion 2: 5 10 20 20.
    """
    linear_projection: bool = False
    """Use linear layers, not 1x1 convolutions, around attention blocks, as Stable Diffusion 2."""
    attention_kernel: AttentionKernel = "auto"
    """`sdpa`, `plain` (diffusers' AttnProcessor), or `auto`: the faster one, usually sdpa."""
    transformer_layers: int = 1
    """Transformer layers in each attention block."""
    dropout: float = 0.0
    """Dropout probability in residual blocks."""
    norm_num_groups: int = 32
    """Number of groups of every group normalisation; must divide every width."""

    def __post_init__(self) -> None:
        num_levels = len(self.channels)
        if not self.channels:
            raise ValueError("model.channels: expected one width per level, found none")
        if len(self.attention) != num_levels:
            raise ValueError(
                f"model.attention: expected one flag per level of model.channels ({num_levels}), "
                f"found {len(self.attention)}"
            )
        if self.heads and len(self.heads) != num_levels:
            raise ValueError(
                f"model.heads: expected one number per level of model.channels ({num_levels}) or "
                f"none, found {len(self.heads)}"
            )
        for width in self.channels:
            check_number("model.channels", width, least=1)
            _check_divides("norm_num_groups", self.norm_num_groups, width)
            _check_divides("attention_head_dim", self.attention_head_dim, width)
        for heads, width in zip(self.heads, self.channels, strict=False):
            _check_divides("heads", heads, width)
        check_number("model.layers_per_block", self.layers_per_block, least=1)
        check_number("model.transformer_layers", self.transformer_layers, least=1)
        check_number("model.dropout", self.dropout, least=0, below=1)


def _check_divides(name: str, divisor: int, width: int) -> None:
    if divisor < 1 or width % divisor:
        raise ValueError(f"model.{name}: expected a divisor of the width {width}, found {divisor}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the denoiser predicts, and the noise schedule."""

    prediction: Prediction = "epsilon"
    """Target: the noise (DDPM), the velocity (progressive distillation), the clean latent, or the
    velocity of rectified flow (Liu et al. 2022, 2209.03003), which has its own noise schedule."""
    beta_schedule: BetaSchedule = "linear"
    """Noise schedule, by its name in diffusers; `flow` has no betas."""
    num_timesteps: int = 1000
    """Number of noise levels. `flow` has continuous levels, which are rounded to this many for the
    denoiser."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last level is pure noise (Lin et al. 2023, 2305.08891)."""
    snr_gamma: float | None = None
    """Cap of min-SNR weighting (usually 5); null gives all timesteps the same weight."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the timesteps: uniform, or more of the middle ones (Esser et al. 2024,
    2403.03206, section 3.1), where the caption says most about the image."""
    logit_mean: float = 0.0
    """Mean of the logit of t / num_timesteps under logit_normal; above zero favours more noise."""
    logit_std: float = 1.0
    """Standard deviation of that logit; smaller keeps closer to the mean."""
    flow_shift: float = 1.0
    """Shift of flow's noise levels, in training and in the bundle's samplers; above 1 favours more
    noise, which larger latents need (Esser et al. 2024, 2403.03206, eq. 23: sqrt(m / n))."""
    offset_noise: float = 0.0
    """Scale of additional noise that is constant per channel, so that dark and bright images can be
    learned (Guttenberg 2023, crosslabs.org); usually 0.1."""
    caption_dropout: float = 0.1
    """Share of examples trained with the empty prompt, for guidance (Ho & Salimans 2022)."""

    def __post_init__(self) -> None:
        check_number("objective.caption_dropout", self.caption_dropout, least=0, most=1)
        check_number("objective.num_timesteps", self.num_timesteps, least=1)
        if self.snr_gamma is not None:
            check_number("objective.snr_gamma", self.snr_gamma, above=0)
        check_number("objective.logit_mean", self.logit_mean)
        check_number("objective.logit_std", self.logit_std, above=0)
        check_number("objective.offset_noise", self.offset_noise, least=0)
        check_number("objective.flow_shift", self.flow_shift, above=0)
        if self.timestep_sampling == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError(
                "objective.logit_mean, objective.logit_std: have no effect with "
                "objective.timestep_sampling uniform; expected the defaults, 0 and 1, "
                f"found {self.logit_mean} and {self.logit_std}"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            # At pure noise the noise is the input itself, so nothing is learned there.
            raise ValueError(
                "objective.zero_terminal_snr: true needs objective.prediction v or sample, "
                "found epsilon"
            )
        self._check_flow()

    def _check_flow(self) -> None:
        """Refuses a beta schedule with flow, and flow's shift without flow."""
        if self.prediction != "flow":
            if self.flow_shift != 1:
                raise ValueError(
                    "objective.flow_shift: has no effect without objective.prediction flow; "
                    f"expected 1, found {self.flow_shift} with {self.prediction}"
                )
            return
        if self.beta_schedule != "linear":
            raise ValueError(
                "objective.beta_schedule: has no effect with objective.prediction flow; "
                f"expected the default, linear, found {self.beta_schedule}"
            )
        if self.zero_terminal_snr:
            raise ValueError(
                "objective.zero_terminal_snr: has no effect with objective.prediction flow, which "
                "always ends at pure noise; expected false, found true"
            )


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Averages of the weights. Each one needs 4 bytes per parameter.

    The bundle gets the average of `decay` or, without one, that of the first of `sigma_rels`.
    """

    decay: float | None = 0.9999
    """Decay of the exponential average; 0.9999 averages about 10,000 updates. None: no such
    average."""
    warmup: bool = True
    """Start `decay` low: the decay of update n is at most (1 + n) / (10 + n)."""
    sigma_rels: tuple[float, ...] = ()
    """Widths of additional power-function averages, as shares of the run."""
    snapshot_every_steps: int | None = None
    """Save the averages of `sigma_rels` at this interval, for `python -m model.posthoc`."""
    snapshot_dtype: Literal["float16", "float32"] = "float16"
    """Storage type of snapshots: 2 or 4 bytes per parameter and average."""

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_number("ema.decay", self.decay, least=0, below=1)
        if self.decay is None and not self.sigma_rels:
            raise ValueError("ema.decay, ema.sigma_rels: expected at least one, found neither")
        for sigma_rel in self.sigma_rels:
            check_sigma_rel("ema.sigma_rels", sigma_rel)
        if len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError(f"ema.sigma_rels: expected different widths, found {self.sigma_rels}")
        if self.snapshot_every_steps is None:
            return
        check_number("ema.snapshot_every_steps", self.snapshot_every_steps, above=0)
        if len(self.sigma_rels) < 2:
            raise ValueError(
                "ema.snapshot_every_steps: snapshots need two or more ema.sigma_rels (0.05 0.1 "
                f"work well), found {self.sigma_rels}"
            )


def check_sigma_rel(flag: str, sigma_rel: float) -> None:
    """Raises ValueError for a width that no power function with gamma > 0 has."""
    check_number(flag, sigma_rel, above=0, below=MAX_SIGMA_REL)
