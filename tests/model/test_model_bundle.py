"""The bundle is a stock pipeline folder that loads without warnings and records its origin."""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer

from latent_t2i.model import bundle
from latent_t2i.model.checks import MAX_JSON_BYTES
from latent_t2i.model.config import DenoiserConfig, ObjectiveConfig
from latent_t2i.model.denoiser import build
from latent_t2i.model.diffusion import make_scheduler
from latent_t2i.model.encoders import (
    encode_images,
    encode_text,
    fingerprint,
    latent_affine,
    latent_channels,
    load_text_encoder,
    load_vae,
    tokenize,
    tokenizer_fingerprint,
)
from latent_t2i.model.paths import ROOT
from tests import tiny

MAX_TOKENS = 20
INFO: dict[str, Any] = {
    "name": "tiny",
    "step": 7,
    "train_seconds": 1.5,
    "num_parameters": 100,
    "config": {"seed": 0, "optim": {"betas": [0.9, 0.99]}},
    "metrics": {"loss": 0.5},
}


def save(
    folder: Path, *, channels: int = 4, dtype: bundle.StorageDtype = "float32", **changes: Any
) -> Path:
    """Saves a bundle of random weights for latents with `channels` channels."""
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
        "unet": build(config, latent_channels=channels, sample_size=8, text_width=32),
        "vae": load_vae(tiny.encoders().vae),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "scheduler": make_scheduler(ObjectiveConfig(prediction="v")),
        "max_tokens": MAX_TOKENS,
    }
    pipeline = bundle.make_pipeline(**(values | changes))
    bundle.save_bundle(folder, pipeline, info=INFO, dtype=dtype)
    assert tokenizer.model_max_length == tiny.MAX_POSITIONS  # the caller's tokenizer is unchanged
    return folder


def draw(pipeline: StableDiffusionPipeline, output_type: str = "np") -> Any:
    """Makes one image in four steps."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("red", num_inference_steps=4, generator=generator, output_type=output_type)
    return drawn.images


SHIFTED = ("flux", "shifted", "per_channel")
USABLE = ("sd", *SHIFTED, "asymmetric", "tiny", "tiny_f4")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_stock_pipeline_loads_it_without_warnings(
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


def test_the_pipeline_encodes_text_as_in_training(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(save(tmp_path / "bundle"))
    tokenizer, text_encoder = load_text_encoder(tiny.encoders().clip)
    prompt = "a red circle above a blue square"
    seen, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    ids, cut = tokenize(tokenizer, [prompt], MAX_TOKENS)
    assert cut.all()
    torch.testing.assert_close(seen, encode_text(text_encoder, ids), rtol=0, atol=0)


def test_the_tokenizer_has_the_files_of_transformers_4(tmp_path: Path) -> None:
    saved = save(tmp_path / "bundle") / "tokenizer"
    for folder in (saved, ROOT / "scenes/bundle/tokenizer", ROOT / "scenes/encoders/clip"):
        expected = tokenizer_fingerprint(CLIPTokenizer.from_pretrained(folder))
        copied = Path(shutil.copytree(folder, tmp_path / expected, dirs_exist_ok=True))
        (copied / "tokenizer.json").unlink()
        assert tokenizer_fingerprint(CLIPTokenizer.from_pretrained(copied)) == expected
        assert (copied / "merges.txt").read_text().startswith("#version")


DRAW = """
import sys
import numpy, torch
from diffusers import StableDiffusionPipeline

torch.set_num_threads(1)
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(0)
drawn = pipeline("a red star", num_inference_steps=10, generator=generator, output_type="np")
numpy.save(sys.argv[2], drawn.images)
"""


@pytest.mark.slow
def test_old_diffusers_and_transformers_make_the_same_image(tmp_path: Path) -> None:
    venv.create(tmp_path / "old", with_pip=True)
    python = str(tmp_path / "old" / "bin" / "python")
    packages = "diffusers==0.35.*", "transformers==4.57.*", "huggingface_hub<1", "tokenizers<0.23"
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *packages]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("pip cannot download the old packages")
    # All other packages, such as torch, are this environment's.
    (site,) = (tmp_path / "old" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
    images = []
    for number, interpreter in enumerate((python, sys.executable)):
        path = tmp_path / f"{number}.npy"
        subprocess.run([interpreter, "-c", DRAW, ROOT / "scenes/bundle", path], check=True)
        images.append(np.load(path))
    np.testing.assert_allclose(*images, rtol=0, atol=1e-6)


def test_float16_gives_nearly_the_same_image(tmp_path: Path) -> None:
    whole, half = save(tmp_path / "whole"), save(tmp_path / "half", dtype="float16")
    sizes = [
        sum(p.stat().st_size for p in folder.rglob("*.safetensors")) for folder in (whole, half)
    ]
    assert sizes[1] < 0.7 * sizes[0]
    pictures = [draw(StableDiffusionPipeline.from_pretrained(f)) for f in (whole, half)]
    np.testing.assert_allclose(*pictures, atol=0.02)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
def test_sampling_starts_at_the_last_timestep_with_the_trained_prediction(tmp_path: Path) -> None:
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


def test_a_bundle_is_found_read_and_hashed(tmp_path: Path) -> None:
    folder = save(tmp_path / "bundle")
    assert bundle.find_bundle(folder) == folder
    assert bundle.read_info(folder) == INFO
    before = bundle.digest(folder)
    (folder / bundle.INFO_FILE).write_text(json.dumps({"step": 8}))
    assert bundle.digest(folder) != before


VALUES = (None, True, -1, 1.5, 1e400, 10**400, "x", "\x1b[31m", [], [[1]], {}, {"step": []})


def mutate(rng: random.Random) -> bytes:
    """Returns INFO as JSON with a changed or missing value, a changed byte, or a missing end."""
    kind, record = rng.randrange(4), copy.deepcopy(INFO)
    name = rng.choice(list(record))
    if kind == 0:
        record[name] = rng.choice(VALUES)
    elif kind == 1:
        del record[name]
    data = bytearray(json.dumps(record), "utf-8")
    if kind == 2:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if kind == 3 else data)


def test_damaged_bundle_files_are_refused_by_name(tmp_path: Path) -> None:
    path, rng, num_refused = tmp_path / bundle.INFO_FILE, random.Random(0), 0
    nested = b"[" * 10**6
    for data in [nested, b"[]", b" " * (MAX_JSON_BYTES + 1), *(mutate(rng) for _ in range(400))]:
        path.write_bytes(data)
        try:
            info = bundle.read_info(tmp_path)
        except ValueError as error:
            num_refused += 1
            assert str(error).startswith(str(path))
            assert len(str(error)) < 500 and str(error).isprintable()
        else:
            assert {type(info[name]) for name in ("config", "metrics")} == {dict}
            assert {type(info[name]) for name in ("step", "num_parameters")} == {int}
            assert isinstance(info["name"], str) and math.isfinite(info["train_seconds"])
    assert num_refused > 300


def test_other_folders_are_not_bundles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--bundle: no folder"):
        bundle.find_bundle(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a finished bundle: it has no model_index.json"):
        bundle.find_bundle(tmp_path)


@pytest.mark.parametrize("kind", USABLE)
def test_the_stock_pipeline_decodes_as_the_vae(tmp_path: Path, kind: str) -> None:
    vae = load_vae(tiny.vae_folder(kind))
    before = fingerprint(vae)
    folder = save(tmp_path / "bundle", vae=vae, channels=latent_channels(vae))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    latents = draw(pipeline, "latent")
    shift, scale = latent_affine(vae)
    decoded = vae.decode(latents / scale + shift).sample
    torch.testing.assert_close(
        draw(pipeline, "pt"), (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5
    )
    assert pipeline.vae.config.scaling_factor == vae.config.scaling_factor
    assert fingerprint(vae) == before


@pytest.mark.parametrize("kind", SHIFTED)
def test_a_folded_vae_has_standard_latents(kind: str) -> None:
    vae = load_vae(tiny.vae_folder(kind))
    folded = bundle.fold_shift(vae)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    shift, scale = latent_affine(vae)
    mean, log_variance = encode_images(vae, images).chunk(2, dim=1)
    std = vae.config.scaling_factor / scale
    expected = torch.cat([(mean - shift) / std, log_variance - 2 * std.log()], dim=1)
    torch.testing.assert_close(encode_images(folded, images), expected, rtol=1e-5, atol=2e-6)
    assert (latent_affine(folded)[0] == 0).all()
    assert (latent_affine(folded)[1] == vae.config.scaling_factor).all()
    assert not torch.allclose(encode_images(vae, images), expected, atol=1e-3)
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())


def test_a_vae_with_nothing_to_fold_is_returned_itself() -> None:
    for kind in ("sd", "asymmetric", "tiny"):
        vae = load_vae(tiny.vae_folder(kind))
        assert bundle.fold_shift(vae) is vae


@pytest.mark.parametrize("kind", ["dc", "vq"])
def test_vaes_that_a_stock_pipeline_cannot_use_are_refused(tmp_path: Path, kind: str) -> None:
    vae = load_vae(tiny.vae_folder(kind))
    name = type(vae).__name__
    with pytest.raises(ValueError, match=rf"cannot decode with an {name}; expected AutoencoderKL"):
        bundle.require_stock_vae(vae)
    folder = save(tmp_path / "bundle")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises((AttributeError, TypeError), match=r"block_out_channels|generator"):
        draw(StableDiffusionPipeline(**(pipeline.components | {"vae": vae})))


def test_vaes_that_a_stock_pipeline_decodes_incorrectly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ignores shift_factor, .*AutoencoderTiny.* found 0.5"):
        bundle.require_stock_vae(load_vae(tiny.vae_folder("tiny_shifted")))
    lopsided = load_vae(tiny.vae_folder("tiny_lopsided"))
    with pytest.raises(ValueError, match=r"scales down by 8, but .* assumes 4"):
        save(tmp_path / "bundle", vae=lopsided)
    assert not (tmp_path / "bundle").exists()


def test_shards_that_do_not_fit_a_stock_pipeline_are_refused() -> None:
    vae = load_vae(tiny.vae_folder("tiny_f4"))
    bundle.require_stock_shards(vae, text_name="some/clip", latent_size=(8, 10))
    with pytest.raises(ValueError, match=r"the images have 32 x 36 px; .* multiples of 8 px"):
        bundle.require_stock_shards(vae, text_name="some/clip", latent_size=(9, 8))
    with pytest.raises(ValueError, match=r"uses the text encoder's last hidden state: encode"):
        bundle.require_stock_shards(vae, text_name="some/clip (penultimate)", latent_size=(8, 8))


def test_a_folder_may_be_named_like_a_penultimate_state(elsewhere: Path) -> None:
    (elsewhere / "a (penultimate)").mkdir()
    vae = load_vae(tiny.encoders().vae)
    bundle.require_stock_shards(vae, text_name="a (penultimate)", latent_size=(8, 8))
