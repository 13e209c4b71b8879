"""Shards of any autoencoder train and give a stock pipeline, or are refused before training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from latent_t2i.model import diffusion
from latent_t2i.model.encoders import fingerprint, latent_affine, latent_channels, load_vae
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from latent_t2i.train.setup import make_accelerator, make_objective, make_source
from tests import tiny
from tests.train.conftest import MakeConfig

USABLE = ("flux", "shifted", "per_channel", "asymmetric", "tiny", "tiny_f4")


def make_shards(folder: Path, kind: str, **settings: Any) -> str:
    return str(tiny.make_shards(folder, sizes=(6, 4), vae=tiny.vae_folder(kind), **settings))


@pytest.mark.parametrize("kind", USABLE)
def test_the_stock_pipeline_of_a_run_decodes_exactly(
    make_config: MakeConfig, tmp_path: Path, kind: str
) -> None:
    folder = train(make_config(shards=make_shards(tmp_path / "shards", kind), num_steps=1))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            "red",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images
        for output_type in ("latent", "pt")
    ]
    vae = load_vae(tiny.vae_folder(kind))
    shift, scale = latent_affine(vae)
    decoded = vae.decode(drawn[0] / scale + shift).sample
    torch.testing.assert_close(drawn[1], (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", USABLE)
def test_the_loss_gets_shifted_and_scaled_latents(
    make_config: MakeConfig, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(shards=make_shards(tmp_path / "shards", kind))
    plan = validate(config, num_processes=1)
    assert fingerprint(plan.vae) == plan.shards.manifest.vae.sha256
    seen: list[Tensor] = []

    def loss(model: nn.Module, alpha_bar: Tensor, latents: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(latents)
        return torch.zeros(len(latents))

    monkeypatch.setattr(diffusion, "loss", loss)
    batch = make_source(plan, make_accelerator("no")).batch(0)
    objective = make_objective(plan, torch.device("cpu"))
    draws = objective.draw(batch)
    objective(nn.Identity(), batch, draws)
    shift, scale = latent_affine(plan.vae)
    stored, num = batch.latent.float(), latent_channels(plan.vae)
    unscaled = seen[0] / scale + shift
    if plan.shards.manifest.latent_kind == "moments":
        unscaled = unscaled - torch.exp(0.5 * stored[:, num:]) * draws.posterior_noise
    torch.testing.assert_close(unscaled, stored[:, :num], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("dc", "cannot decode with an AutoencoderDC"), ("tiny_shifted", "ignores shift_factor")],
)
def test_shards_of_a_vae_that_stock_pipelines_cannot_use_are_refused(
    make_config: MakeConfig, tmp_path: Path, kind: str, reason: str
) -> None:
    config = make_config(shards=make_shards(tmp_path / "shards", kind))
    with pytest.raises(ValueError, match=rf"vae: .*{reason}"):
        validate(config, num_processes=1)


def test_penultimate_text_is_refused_whatever_text_encoder_is_given(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", "tiny", text_name="a/clip (penultimate)")
    for asked in (None, tiny.encoders().clip):
        with pytest.raises(ValueError, match=r"text_encoder: the shards' text is of 'a/clip \(pen"):
            validate(make_config(shards=shards, text_encoder=asked), num_processes=1)


def test_another_scaling_factor_is_refused_at_a_resume(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The hash of the VAE's weights, which the shards name, does not cover its config.json."""
    vae = shutil.copytree(tiny.encoders().vae, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.3}))
    train(make_config(num_steps=1, vae=str(vae)))
    shown = "latent_scale: the run in .* has {0}, found {1}; use the old value"
    trained, default = r"\[0.3\d*, .*\]", r"\[0.69\d*, .*\]"
    with pytest.raises(ValueError, match=shown.format(trained, default)):
        train(make_config(num_steps=2))
    (vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=shown.format(trained, default)):
        train(make_config(num_steps=2, vae=str(vae)))
