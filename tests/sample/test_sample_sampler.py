"""Sampling: the stock pipeline's images, determined by prompt, seed and settings."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.generate import Guidance, generate
from latent_t2i.sample import sampler
from tests import on_device
from tests.bundles import make_bundle

PROMPTS = ["a red circle", "two blue squares", ""]

STOCK = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
folder, prompt, seed, out = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(folder)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
image = pipeline(prompt, guidance_scale=3.0, num_inference_steps=4,
                 generator=torch.Generator().manual_seed(int(seed))).images[0]
image.save(out)
"""


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


def draw(bundle: Path, **settings: object) -> list[np.ndarray]:
    chosen = {"guidance_scale": 3.0, "num_steps": 4} | settings
    images = sampler.draw(sampler.load(bundle), PROMPTS, [5, 6, 7], **chosen)
    return [pixels(image) for image in images]


@pytest.mark.slow
def test_a_program_with_diffusers_alone_gives_the_same_image(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "stock.png"
    arguments = [str(bundle), PROMPTS[1], "6", str(out)]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=tmp_path)
    assert np.array_equal(pixels(Image.open(out)), draw(bundle, batch_size=1)[1])


def test_the_batch_size_affects_images_by_rounding_only(bundle: Path) -> None:
    for one, other in zip(draw(bundle, batch_size=1), draw(bundle, batch_size=3), strict=True):
        assert np.abs(one - other).max() <= 1


def test_seed_prompt_and_guidance_each_change_the_image(bundle: Path) -> None:
    pipeline = sampler.load(bundle)

    def one(prompt: str, seed: int, scale: float) -> np.ndarray:
        images = sampler.draw(pipeline, [prompt], [seed], guidance_scale=scale, num_steps=4)
        return pixels(images[0])

    first = one("a red circle", 0, 3.0)
    assert np.array_equal(first, one("a red circle", 0, 3.0))
    for other in (("a red circle", 1, 3.0), ("a blue star", 0, 3.0), ("a red circle", 0, 1.0)):
        assert not np.array_equal(first, one(*other))


def test_ddim_and_dpmpp_converge_to_the_same_image(bundle: Path) -> None:
    ddim, dpmpp = (draw(bundle, scheduler=name, num_steps=50)[0] for name in ("ddim", "dpmpp"))
    assert np.abs(ddim - dpmpp).mean() < 3


def test_the_bundle_scheduler_can_be_selected(bundle: Path) -> None:
    own = sampler.load(bundle).scheduler
    assert type(sampler.choose_scheduler(own, "bundle")).__name__ == "DDIMScheduler"
    other = sampler.choose_scheduler(own, "dpmpp")
    assert type(other).__name__ == "DPMSolverMultistepScheduler"
    assert other.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "tpu", "meta", ""])
def test_an_unusable_device_is_an_error(bundle: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=rf"--device: found '{device}', .*; expected auto, cpu"):
        sampler.load(bundle, device=device)


def test_a_missing_or_incomplete_bundle_is_an_error(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--bundle: .*nowhere"):
        sampler.load("nowhere")
    with pytest.raises(ValueError, match=r"--bundle: .*model_index.json"):
        sampler.load(tmp_path)
    broken = make_bundle(tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--bundle: .*broken does not load"):
        sampler.load(broken)


def test_a_guide_changes_the_image_and_is_a_model_of_the_same_kind(
    bundle: Path, tmp_path: Path
) -> None:
    pipeline = sampler.load(bundle)
    weaker = sampler.load_guide(make_bundle(tmp_path / "weaker", seed=1), pipeline)
    settings: dict[str, Any] = {"num_steps": 2, "guidance_scale": 2.0}
    (guided,) = sampler.draw(pipeline, ["a"], [0], guide=weaker, **settings)
    (plain,) = sampler.draw(pipeline, ["a"], [0], **settings)
    assert not np.array_equal(pixels(guided), pixels(plain))
    # A model that guides itself: the two predictions are equal, so their scale has no effect.
    # A model that guides itself: both predictions are equal, so the scale has no effect.
    own_guide = Guidance(scale=2.0, network=pipeline.unet)
    (own,) = generate(pipeline, ["a"], [0], guidance=own_guide, num_steps=2, batch_size=1)
    (unguided,) = generate(pipeline, ["a"], [0], guidance=Guidance(), num_steps=2, batch_size=1)
    assert np.abs(pixels(own) - pixels(unguided)).max() <= 1
    other = make_bundle(tmp_path / "other", ObjectiveConfig())
    with pytest.raises(ValueError, match=r"--guide: .*other has another prediction_type .*epsilon"):
        sampler.load_guide(other, pipeline)
    cosine = ObjectiveConfig(prediction="v", beta_schedule="squaredcos_cap_v2")
    with pytest.raises(
        ValueError, match=r"--guide: .* has another noise schedule than the bundle;"
    ):
        sampler.load_guide(make_bundle(tmp_path / "cosine", cosine), pipeline)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "found text_encoder_2 too"),
        ({"vae": [None, None]}, "found no vae"),
    ],
)
def test_pipelines_of_another_kind_are_refused(
    bundle: Path, tmp_path: Path, part: dict[str, Any], message: str
) -> None:
    shutil.copytree(bundle, tmp_path / "other")
    path = tmp_path / "other" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | part))
    with pytest.raises(
        ValueError, match=f"expected a StableDiffusionPipeline with unet, .*{message}"
    ):
        sampler.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("in_channels", 9, "has 9 input channels"), ("time_cond_proj_dim", 32, "time_cond_proj_dim")],
)
def test_denoisers_with_other_inputs_are_refused(
    bundle: Path, tmp_path: Path, key: str, value: int, message: str
) -> None:
    shutil.copytree(bundle, tmp_path / "other")
    pipeline = sampler.load(bundle)
    pipeline.unet.register_to_config(**{key: value})
    with pytest.raises(ValueError, match=f"--bundle: the denoiser of .*{message}"):
        sampler._check_networks(pipeline, tmp_path)


def test_pictures_in_float16_are_not_flat(tmp_path: Path) -> None:
    on_device.check_that_float16_pictures_are_not_flat(tmp_path, "cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor
def test_a_compiled_denoiser_draws_the_same_images(bundle: Path) -> None:
    pipeline = sampler.load(bundle)
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_steps": 4, "batch_size": 2}
    eager = sampler.draw(pipeline, PROMPTS, [5, 6, 7], **settings)
    sampler.speed_up(pipeline.unet, channels_last=True, compiled=True)
    for one, other in zip(
        eager, sampler.draw(pipeline, PROMPTS, [5, 6, 7], **settings), strict=True
    ):
        assert np.abs(pixels(one) - pixels(other)).max() <= 2
