"""The denoiser: a diffusers `UNet2DConditionModel` described by a few numbers.

Which attention kernel is fastest depends on the device and is no property of the weights, so it is
chosen when training starts. Measured on a CPU with bf16 autocast, a step with diffusers' plain
`AttnProcessor` was 1.67 times as fast as with scaled-dot-product attention at 8 x 8 latents, 1.43
at 16 x 16 and 0.89 at 32 x 32; in float32 it was slower at all of them (docs/benchmarks.md).
"""

from dataclasses import dataclass
from typing import Literal

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

AttentionKernel = Literal["auto", "sdpa", "plain"]
LONG_SIDE = 32
"""Of the finest map that is attended to: from here on bf16 on a CPU is faster with sdpa too."""


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Size and shape of the network. The default is Stable Diffusion 1's: 860 million weights."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width of each level, from full resolution down; each level halves the resolution."""
    layers_per_block: int = 2
    """Residual blocks per level on the way down (one more on the way up)."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Whether each level attends to itself and the text. The middle always does."""
    attention_head_dim: int = 8
    """Number of attention heads of every level: diffusers' name, which says something else."""
    heads: tuple[int, ...] = ()
    """Attention heads by level, in place of attention_head_dim; Stable Diffusion 2: 5 10 20 20."""
    linear_projection: bool = False
    """Attention blocks begin and end with linear layers, not convolutions: Stable Diffusion 2."""
    attention_kernel: AttentionKernel = "auto"
    """`sdpa`, `plain` (diffusers' AttnProcessor), or `auto`: the faster one, mostly sdpa."""
    transformer_layers: int = 1
    """Transformer layers in each attention block."""
    dropout: float = 0.0
    """Dropout inside residual blocks."""
    norm_num_groups: int = 32
    """Groups of every group normalisation; must divide every width."""

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("model.channels: expected one width per level, found none")
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"model.attention: expected one flag per level of model.channels "
                f"({len(self.channels)}), found {len(self.attention)}"
            )
        for name in ("norm_num_groups", "attention_head_dim"):
            divisor = getattr(self, name)
            bad = [width for width in self.channels if divisor < 1 or width % divisor]
            if bad:
                raise ValueError(f"model.{name}: {divisor} does not divide the width {bad[0]}")
        if self.heads and len(self.heads) != len(self.channels):
            raise ValueError(
                f"model.heads: expected one number per level of model.channels "
                f"({len(self.channels)}) or none, found {len(self.heads)}"
            )
        for heads, width in zip(self.heads, self.channels, strict=False):
            if heads < 1 or width % heads:
                raise ValueError(f"model.heads: {heads} does not divide the width {width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected 0 <= p < 1, found {self.dropout}")


def build(
    config: DenoiserConfig,
    *,
    latent_channels: int,
    sample_size: int | tuple[int, int],
    text_width: int,
) -> UNet2DConditionModel:
    """Returns a denoiser with fresh weights, drawn from torch's global generator.

    It maps latents (B, latent_channels, h, w), timesteps (B,) and text (B, T, text_width) to a
    prediction of the latents' shape; `sample_size` is the side, or the h and w, that a pipeline
    draws by default.
    """
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention))
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=text_width,
        attention_head_dim=config.heads or config.attention_head_dim,
        use_linear_projection=config.linear_projection,
        transformer_layers_per_block=config.transformer_layers,
        dropout=config.dropout,
        norm_num_groups=config.norm_num_groups,
    )


def choose_attention(
    unet: UNet2DConditionModel, kernel: AttentionKernel, *, device_type: str, precision: str
) -> Literal["sdpa", "plain"]:
    """Sets the attention kernel of `unet`, and returns which one `auto` stood for."""
    if kernel == "auto":
        short = (device_type, precision) == ("cpu", "bf16") and _attended_side(unet) < LONG_SIDE
        kernel = "plain" if short else "sdpa"
    unet.set_attn_processor(AttnProcessor() if kernel == "plain" else AttnProcessor2_0())
    return kernel


def _attended_side(unet: UNet2DConditionModel) -> int:
    """Returns the longer side of the finest map that is attended to; the middle one always is."""
    size, kinds = unet.config["sample_size"], unet.config["down_block_types"]
    side = size if isinstance(size, int) else max(size)
    level = next((i for i, kind in enumerate(kinds) if "CrossAttn" in kind), len(kinds) - 1)
    return int(side >> level)
