"""Drawing: the stock pipeline's own pictures, one seed one picture."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_t2i.sample import sampler
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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


def draw(bundle: Path, **settings: object) -> list[np.ndarray]:
    chosen = {"guidance_scale": 3.0, "num_steps": 4} | settings
    images = sampler.draw(sampler.load(bundle), PROMPTS, [5, 6, 7], **chosen)
    return [pixels(image) for image in images]


def test_a_program_that_knows_only_diffusers_draws_the_same_picture(
    bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stock.png"
    arguments = [str(bundle), PROMPTS[1], "6", str(out)]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=tmp_path)
    ours = draw(bundle, batch_size=1)[1]
    assert np.array_equal(pixels(Image.open(out)), ours)


def test_the_batch_size_changes_no_more_than_rounding(bundle: Path) -> None:
    alone, together = draw(bundle, batch_size=1), draw(bundle, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1


def test_seeds_prompts_and_guidance_each_change_the_picture(bundle: Path) -> None:
    pipeline = sampler.load(bundle)

    def one(prompt: str, seed: int, scale: float) -> np.ndarray:
        images = sampler.draw(pipeline, [prompt], [seed], guidance_scale=scale, num_steps=4)
        return pixels(images[0])

    first = one("a red circle", 0, 3.0)
    assert np.array_equal(first, one("a red circle", 0, 3.0))
    for other in (("a red circle", 1, 3.0), ("a blue star", 0, 3.0), ("a red circle", 0, 1.0)):
        assert not np.array_equal(first, one(*other))


def test_ddim_and_dpmpp_agree_on_a_smooth_model_given_many_steps(bundle: Path) -> None:
    rough = [draw(bundle, scheduler=name, num_steps=50)[0] for name in ("ddim", "dpmpp")]
    assert np.abs(rough[0] - rough[1]).mean() < 3


def test_the_bundle_can_choose_the_sampler(bundle: Path) -> None:
    pipeline = sampler.load(bundle)
    own = sampler.choose_scheduler(pipeline.scheduler, "bundle")
    assert type(own).__name__ == "DDIMScheduler"
    other = sampler.choose_scheduler(pipeline.scheduler, "dpmpp")
    assert type(other).__name__ == "DPMSolverMultistepScheduler"
    assert other.config.prediction_type == "v_prediction"


def test_a_missing_or_broken_bundle_is_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--bundle: no folder 'nowhere'"):
        sampler.load("nowhere")
    with pytest.raises(ValueError, match=r"--bundle: .* has no model_index.json"):
        sampler.load(tmp_path)
    broken = make_bundle(tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--bundle: .*broken does not load"):
        sampler.load(broken)
