"""The networks of the training step benchmark: the demo's, or ones of Stable Diffusion's size.

The latter have random weights, which need no download and do not change the speed. They use the
embedded tokenizer, whose ids fit into any larger vocabulary.
"""

import shutil
from pathlib import Path

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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def write_sd_encoders(folder: Path) -> tuple[Path, Path]:
    """Writes a VAE and a text encoder of Stable Diffusion 1's size, with seeded random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=49408,
        bos_token_id=657,
        eos_token_id=658,
        pad_token_id=658,
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
