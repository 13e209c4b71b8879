"""Sampling: the stock pipeline's images, determined by prompt, seed and settings."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latent_t2i.model.config import EMAConfig
from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.generate import Guidance, generate
from latent_t2i.model.paths import hash_file
from latent_t2i.model.posthoc import average_file, folder_of, save_snapshot
from latent_t2i.sample import sampler
from latent_t2i.sample.config import DrawSettings, SampleConfig, SchedulerName
from latent_t2i.sample.pictures import describe_guide
from latent_t2i.sample.settings import GridConfig, InterpolateConfig
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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_cut_weights_are_an_error(bundle: Path, tmp_path: Path, part: str) -> None:
    (weights,) = (shutil.copytree(bundle, tmp_path / "cut") / part).glob("*.safetensors")
    for num_bytes in (1000, -1000):
        content = next((bundle / part).glob("*.safetensors")).read_bytes()
        weights.write_bytes(content[:num_bytes])
        with pytest.raises(ValueError, match=r"--bundle: .*cut does not load: "):
            sampler.load(tmp_path / "cut")


@pytest.mark.parametrize("kind", [SampleConfig, GridConfig, InterpolateConfig])
def test_a_prompt_that_is_not_unicode_is_an_error(kind: Any) -> None:
    with pytest.raises(ValueError, match="--prompt: expected Unicode text"):
        kind(prompts=("a", "\ud800"))


def test_a_guide_changes_the_image_and_is_a_model_of_the_same_kind(
    bundle: Path, tmp_path: Path
) -> None:
    pipeline = sampler.load(bundle)
    weaker = sampler.load_guide(make_bundle(tmp_path / "weaker", seed=1), pipeline)
    settings: dict[str, Any] = {"num_steps": 2, "guidance_scale": 2.0}
    (guided,) = sampler.draw(pipeline, ["a"], [0], guide=weaker, **settings)
    (plain,) = sampler.draw(pipeline, ["a"], [0], **settings)
    assert not np.array_equal(pixels(guided), pixels(plain))
    with pytest.raises(ValueError, match=r"--guide: .* has the same weights as the bundle"):
        sampler.load_guide(shutil.copytree(bundle, tmp_path / "copy"), pipeline)
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


@pytest.mark.parametrize("scheduler", ["dpmpp", "heun", "bundle"])
def test_an_interval_without_a_step_is_refused(bundle: Path, scheduler: SchedulerName) -> None:
    pipeline = sampler.load(bundle)
    settings = DrawSettings(scheduler=scheduler, num_steps=4, guidance_interval=(1e6, 1e9))
    with pytest.raises(ValueError, match=r"--guidance-interval: none of the 4 .* to 1e\+09$") as e:
        sampler.keywords(pipeline, settings)
    low, high = map(float, re.findall(r"[\d.]+", str(e.value).partition("sigma")[2])[:2])
    assert 0 < low < high
    for interval in ((0.0, low * 1.01), (high * 0.99, high * 1.01)):
        sampler.keywords(pipeline, replace(settings, guidance_interval=interval))


def make_snapshot(folder: Path, pipeline: Any, **settings: Any) -> Path:
    """Writes a snapshot of two averages: the weights times 0.9 (the shortest) and 0.8."""
    averages = {
        width: {n: tensor.detach() * share for n, tensor in pipeline.unet.named_parameters()}
        for width, share in ((0.05, 0.9), (0.1, 0.8))
    }
    average = EMAConfig(sigma_rels=(0.05, 0.1), snapshot_every_steps=2)
    save_snapshot(folder, average, averages, step=2, train_s=1.0, settings=settings)
    return folder_of(folder, 2)


def test_a_guide_may_be_an_average_of_a_snapshot(bundle: Path, tmp_path: Path) -> None:
    pipeline = sampler.load(bundle)
    objective = {"prediction": "v", "beta_schedule": "linear"}
    folder = make_snapshot(tmp_path, pipeline, objective=objective)
    for name, share in ((folder, 0.9), (average_file(folder, 0.1), 0.8)):
        guide = sampler.load_guide(name, pipeline)
        weight = pipeline.unet.conv_in.weight
        assert torch.allclose(guide.conv_in.weight, weight * share, atol=1e-3)
        assert (guide.dtype, guide.device) == (pipeline.unet.dtype, pipeline.unet.device)
    hashes = [describe_guide(str(n)) for n in (folder, average_file(folder, 0.1))]
    assert hashes[0] == {"guide_sha256": hash_file(average_file(folder, 0.05))} != hashes[1]


def test_a_guide_of_another_run_is_named(bundle: Path, tmp_path: Path) -> None:
    pipeline = sampler.load(bundle)
    file = tmp_path / "weights.safetensors"
    file.touch()
    for guide, message in (
        (file, "is not an average of a snapshot; expected the folder of a bundle or snapshot"),
        (
            make_snapshot(tmp_path / "a", pipeline, objective={"prediction": "epsilon"}),
            r"another prediction_type .*\(found epsilon, expected v_prediction\)",
        ),
        (
            make_snapshot(
                tmp_path / "b", pipeline, objective={"prediction": "v", "beta_schedule": "sigmoid"}
            ),
            "another noise schedule than the bundle",
        ),
    ):
        with pytest.raises(ValueError, match=f"^--guide: .*{message}"):
            sampler.load_guide(guide, pipeline)
    folder = make_snapshot(tmp_path / "c", pipeline)
    save_file({"conv_in.weight": torch.zeros(2)}, average_file(folder, 0.05))
    with pytest.raises(ValueError, match=r"^--guide: .* weights of the bundle's denoiser: [^\n]*$"):
        sampler.load_guide(folder, pipeline)


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
