"""Bundles with random weights and the tiny encoders, for tests of sampling and evaluation."""

from pathlib import Path

import torch

from latent_t2i.model import denoiser
from latent_t2i.model.bundle import make_pipeline, save_bundle
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.encoders import load_text_encoder, load_vae
from tests import tiny

MAX_TOKENS = 24
VELOCITY = ObjectiveConfig(prediction="v")


def make_bundle(folder: Path, objective: ObjectiveConfig = VELOCITY) -> Path:
    """Writes a bundle whose images are noise, the same at every call."""
    folders = tiny.encoders()
    tokenizer, text_encoder = load_text_encoder(folders.clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = denoiser.build(
            denoiser.DenoiserConfig(
                channels=(16, 16), layers_per_block=1, attention=(True, True), norm_num_groups=8
            ),
            latent_channels=tiny.LATENT_CHANNELS,
            sample_size=8,
            text_width=tiny.TEXT_WIDTH,
        )
    save_bundle(
        folder,
        make_pipeline(
            unet=unet,
            vae=load_vae(folders.vae),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            scheduler=make_scheduler(objective),
            max_tokens=MAX_TOKENS,
        ),
        info={
            "name": "tiny",
            "step": 3,
            "train_seconds": 1.5,
            "num_parameters": unet.num_parameters(),
            "config": {"seed": 0, "optim": {"learning_rate": 0.1}},
            "metrics": {},
        },
    )
    return folder
