"""The samplers of diffusers on our bundles: docs/samplers.md has what these tests measure."""

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latent_t2i.model.generate import generate_images
from latent_t2i.model.paths import ROOT
from latent_t2i.sample import sampler
from latent_t2i.scenes import oracle
from latent_t2i.scenes.prompts import make_prompts
from tests.sample import test_sample_closed_form as closed_form

NUM_IMAGES = 16
TABLE = (ROOT / "docs" / "samplers.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (\d+) \| (\S+)(?: %)? \| (.+) \|$", TABLE, re.M)
# Some of diffusers' samplers use deprecated functions of numpy and print warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")
stock = closed_form.stock


@pytest.mark.parametrize(("name", "documented"), [(row[0], row[2]) for row in ROWS])
def test_flow_with_each_sampler(
    stock: StableDiffusionPipeline, tmp_path: Path, name: str, documented: str
) -> None:
    config = closed_form.FLOW
    pipeline = closed_form.make_pipeline(stock, config, tmp_path)
    best = closed_form.best_denoiser(config)

    def forward(x: torch.Tensor, timestep: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return best(x, timestep.round().long())

    def draw() -> torch.Tensor:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        return closed_form.draw(pipeline, closed_form.initial_latents(), 50)

    pipeline.unet.forward = forward
    if documented == "-":
        with pytest.raises((ValueError, NotImplementedError)):
            draw()
    else:
        error = draw().std() / closed_form.STD - 1
        assert 100 * error == pytest.approx(float(documented), abs=0.1, rel=0.01)


def test_the_advice_follows_from_the_measurements() -> None:
    assert len(ROWS) >= 19
    for _, correct, flow, use in ROWS:
        good, good_flow = int(correct) >= 14, flow != "-" and abs(float(flow)) < 5
        assert use == ("no" if not good else "yes" if good_flow else "yes, except for flow")


def test_the_choices_of_the_command_are_samplers_that_fit() -> None:
    fitting = {name for name, _, _, use in ROWS if use != "no"}
    assert {kind.__name__ for kind, _ in sampler.SAMPLERS.values()} <= fitting


@pytest.mark.slow
@pytest.mark.parametrize(("name", "documented"), [(row[0], int(row[1])) for row in ROWS])
def test_the_oracle_with_each_sampler(name: str, documented: int) -> None:
    prompts = make_prompts("full", "single", NUM_IMAGES, seed=0)
    pipeline = sampler.load(ROOT / "scenes" / "bundle")
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    texts, seeds = [prompt.text for prompt in prompts], list(range(NUM_IMAGES))
    images = generate_images(pipeline, texts, seeds, guidance_scale=4, num_steps=20)
    detections = oracle.detect(np.stack([np.asarray(image) for image in images]))
    correct = [
        oracle.check(prompt.scene, detected)["shape_and_colour"]
        for prompt, detected in zip(prompts, detections, strict=True)
    ]
    assert abs(sum(correct) - documented) <= 1, "rounding may change an image"
