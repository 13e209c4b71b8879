"""The bundle is a stock pipeline folder that loads without a word and says where it comes from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from model import bundle
from model.denoiser import DenoiserConfig, build
from model.diffusion import ObjectiveConfig, make_scheduler
from model.encoders import encode_text, load_text_encoder, load_vae, tokenize
from tests import tiny

MAX_TOKENS = 20


def save(folder: Path, **changes: Any) -> Path:
    """Saves a bundle of fresh weights."""
    config = DenoiserConfig(
        channels=(8, 8),
        attention=(True, False),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    torch.manual_seed(0)
    tokenizer, text_encoder = load_text_encoder(tiny.encoders().clip)
    values: dict[str, Any] = {
        "unet": build(config, latent_channels=4, sample_size=8, text_width=32),
        "vae": load_vae(tiny.encoders().vae),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "scheduler": make_scheduler(ObjectiveConfig(prediction="v")),
        "max_tokens": MAX_TOKENS,
        "info": {"step": 7},
    }
    bundle.save_bundle(folder, **(values | changes))
    assert tokenizer.model_max_length == tiny.MAX_POSITIONS  # the caller's own is left alone
    return folder


def draw(pipeline: StableDiffusionPipeline) -> Any:
    """Draws one picture of four steps."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("red", num_inference_steps=4, generator=generator, output_type="np")
    return drawn.images


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_stock_pipeline_loads_it_without_a_word(
    tmp_path: Path, dtype: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "bundle", dtype=dtype)
    assert capfd.readouterr() == ("", "")
    diffusers_logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert "WARN" not in capfd.readouterr().err.upper()
    assert pipeline.tokenizer.model_max_length == MAX_TOKENS
    assert pipeline.vae.config.scaling_factor == tiny.SCALING_FACTOR
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    assert draw(pipeline).shape == (1, 64, 64, 3)


def test_the_pipeline_sees_the_text_that_training_saw(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(save(tmp_path / "bundle"))
    tokenizer, text_encoder = load_text_encoder(tiny.encoders().clip)
    prompt = "a red circle above a blue square"
    seen, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    ids, cut = tokenize(tokenizer, [prompt], MAX_TOKENS)
    assert cut.all()
    torch.testing.assert_close(seen, encode_text(text_encoder, ids), rtol=0, atol=0)


def test_half_the_bytes_give_nearly_the_same_picture(tmp_path: Path) -> None:
    whole, half = save(tmp_path / "whole"), save(tmp_path / "half", dtype="float16")
    sizes = [
        sum(p.stat().st_size for p in folder.rglob("*.safetensors")) for folder in (whole, half)
    ]
    assert sizes[1] < 0.7 * sizes[0]
    pictures = [draw(StableDiffusionPipeline.from_pretrained(f)) for f in (whole, half)]
    np.testing.assert_allclose(*pictures, atol=0.02)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
def test_sampling_starts_at_the_last_timestep_and_knows_the_target(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(save(tmp_path / "bundle"))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    solver = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for scheduler in (pipeline.scheduler, solver):
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 999


def test_a_perfect_denoiser_ends_at_the_clean_latent() -> None:
    ddpm = make_scheduler(ObjectiveConfig())
    ddim = bundle.sampling_scheduler(ddpm)
    ddim.set_timesteps(10)
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    latents = ddpm.add_noise(clean, noise, ddim.timesteps[:1])
    for t in ddim.timesteps:
        a = ddpm.alphas_cumprod[t]
        latents = ddim.step((latents - a.sqrt() * clean) / (1 - a).sqrt(), t, latents).prev_sample
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-4)


def test_a_bundle_is_found_read_and_signed(tmp_path: Path) -> None:
    folder = save(tmp_path / "bundle")
    assert bundle.find_bundle(folder) == folder
    assert bundle.read_info(folder) == {"step": 7}
    before = bundle.digest(folder)
    (folder / bundle.INFO_FILE).write_text(json.dumps({"step": 8}))
    assert bundle.digest(folder) != before


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--bundle: no folder"):
        bundle.find_bundle(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no model_index.json, so it is no finished bundle"):
        bundle.find_bundle(tmp_path)
