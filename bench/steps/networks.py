"""The networks of the benchmarks: the demo's, or random ones of Stable Diffusion's size or tiny.

Random weights need no download and do not change the speed. These networks use the embedded
tokenizer, whose ids fit into any larger vocabulary. The tiny ones have Stable Diffusion's layers,
but few channels: with them a benchmark is tried on a CPU.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from latent_t2i.configs import cli
from latent_t2i.model import denoiser
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.encoders import quiet
from latent_t2i.train.config import TrainConfig

EMBEDDED = Path(__file__).resolve().parents[2] / "scenes/encoders"
DEMO = cli.parse(TrainConfig, "train", ["--config", "demo"]).model
"""The demo's denoiser. The defaults of DenoiserConfig are Stable Diffusion 1's."""
TINY = DenoiserConfig(
    channels=(8, 16), attention=(True, True), attention_head_dim=2, norm_num_groups=4
)
Networks = Literal["embedded", "sd", "tiny"]
NETWORKS: dict[Networks, DenoiserConfig] = {"embedded": DEMO, "sd": DenoiserConfig(), "tiny": TINY}
"""The denoiser by the name of the networks."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


SD_SIZES: tuple[dict[str, Any], dict[str, Any]] = (
    {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
)
TINY_SIZES: tuple[dict[str, Any], dict[str, Any]] = (
    {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
)
"""Of the VAE and of the text encoder."""


def find_encoders(networks: Networks, folder: Path) -> tuple[Path, Path]:
    """Returns the folders of a VAE and a text encoder; random ones are written into `folder`."""
    if networks == "embedded":
        return EMBEDDED / "vae", EMBEDDED / "clip"
    vae_sizes, text_sizes = SD_SIZES if networks == "sd" else TINY_SIZES
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=512,
        **vae_sizes,
    )
    text = CLIPTextConfig(
        vocab_size=49408, bos_token_id=657, eos_token_id=658, pad_token_id=658, **text_sizes
    )
    with quiet():
        vae.save_pretrained(folder / "vae")
        CLIPTextModel(text).save_pretrained(folder / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "clip" / name, folder / "clip" / name)
    return folder / "vae", folder / "clip"


def make_unet(
    config: DenoiserConfig,
    *,
    latent_channels: int,
    side: int,
    text_width: int,
    device: torch.device,
    precision: str,
    channels_last: bool = False,
) -> UNet2DConditionModel:
    """Returns a denoiser with seeded random weights in training mode."""
    torch.manual_seed(0)
    with device:  # drawing a billion numbers on the CPU takes ten seconds
        unet = denoiser.build(
            config, latent_channels=latent_channels, sample_size=side, text_width=text_width
        )
    denoiser.choose_attention(
        unet, config.attention_kernel, device_type=device.type, precision=precision
    )
    form = torch.channels_last if channels_last else torch.contiguous_format
    unet.to(device, memory_format=form)
    return unet.train()


def num_parameters(module: nn.Module) -> int:
    """Returns the number of parameters of a network."""
    return sum(parameter.numel() for parameter in module.parameters())
