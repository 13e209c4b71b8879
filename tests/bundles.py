"""Bundles with random weights and the tiny encoders, for tests of sampling and evaluation."""

from pathlib import Path

import torch

from latent_t2i.model import denoiser
from latent_t2i.model.bundle import make_pipeline, save_bundle
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.encoders import Autoencoder, latent_channels, load_text_encoder, load_vae
from tests import tiny

MAX_TOKENS = 24
COMPUTED = {"versions", "dtype", "device", "batch_size", "channels_last", "compile"}
"""What every PNG says about how it was computed."""
VELOCITY = ObjectiveConfig(prediction="v")


def make_bundle(
    folder: Path,
    objective: ObjectiveConfig = VELOCITY,
    *,
    vae: Autoencoder | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Path:
    """Writes a bundle whose images are noise, the same at every call; `seed` is the denoiser's."""
    folders = tiny.encoders()
    vae = vae or load_vae(folders.vae)
    tokenizer, text_encoder = load_text_encoder(folders.clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = denoiser.build(
            denoiser.DenoiserConfig(
                channels=(16, 16), layers_per_block=1, attention=(True, True), norm_num_groups=8
            ),
            latent_channels=latent_channels(vae),
            sample_size=8,
            text_width=tiny.TEXT_WIDTH,
        )
    save_bundle(
        folder,
        make_pipeline(
            unet=unet,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            scheduler=make_scheduler(objective),
            max_tokens=max_tokens,
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
