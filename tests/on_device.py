"""Stage one and sampling on a device: the same checks for the tests of a CPU and of a GPU."""

import signal
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import torch

from latent_t2i.model.encoders import Autoencoder, load_vae
from latent_t2i.pipeline import stage
from latent_t2i.sample import sampler
from tests import tiny
from tests.bundles import make_bundle
from tests.coco_folders import make_coco
from tests.stage_one import contents, make_config, run


def check_that_a_killed_set_ends_with_the_same_bytes(
    folder: Path, forks: ForkServerContext, device: str, *, compiled: bool
) -> None:
    """Builds a set at once, and in two runs: the first one is killed after a shard."""
    config = make_config(
        make_coco(folder / "coco", [2] * 7),
        folder / "killed",
        records_per_shard=4,
        vae=tiny.vae_folder("tiny"),  # has the fewest kernels to build
        device=device,
        compile=compiled,
    )
    stage.build(replace(config, out=str(folder / "whole")))
    assert run(forks, config, kill_at="shard-000001.tar") == -signal.SIGKILL
    torch.compiler.reset()
    stage.build(config)
    found, expected = contents(folder / "killed"), contents(folder / "whole")
    assert found == expected and "shard-000001.tar" in found


def check_that_float16_pictures_are_not_flat(folder: Path, device: str) -> None:
    """Draws two batches in float16 with a VAE whose activations overflow in float16."""
    vae = make_overflowing_vae()
    pipeline = sampler.load(make_bundle(folder, vae=vae), device=device, dtype="float16")
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)
    pictures = sampler.draw(
        pipeline, ["a", "b"], [0, 1], num_steps=2, guidance_scale=4.0, batch_size=1
    )
    assert all(np.asarray(picture).std() > 1 for picture in pictures)


def make_overflowing_vae() -> Autoencoder:
    """Returns a VAE with large activations, which its group norms make small again."""
    vae = load_vae(tiny.encoders().vae)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e6)
        activations = vae.decoder.conv_in(torch.ones(1, tiny.LATENT_CHANNELS, 8, 8))
    assert activations.abs().max() > torch.finfo(torch.float16).max
    assert vae.config.force_upcast
    return vae
