"""The stock pipelines make the images of the command: objectives, VAEs, text lengths, samplers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.encoders import load_vae
from latent_t2i.sample import sampler
from latent_t2i.sample.schedulers import SAMPLERS, fitting
from tests import tiny
from tests.bundles import make_bundle

PROMPTS = ["a red circle on a white background", "a blue star", "x " * 40]
SEEDS = [3, 4, 5]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of bundle."""

    objective: ObjectiveConfig
    vae: str | None = None
    scaling_factor: float | None = None
    max_tokens: int = 24


V = ObjectiveConfig(prediction="v", beta_schedule="squaredcos_cap_v2")
CASES = {
    "calibrated scaling, max_tokens 32": Case(objective=V, scaling_factor=0.3137, max_tokens=32),
    "flow, VAE with a shift": Case(
        objective=ObjectiveConfig(prediction="flow", flow_shift=2.0), vae="flux"
    ),
}
MORE = {
    "epsilon, SD's VAE": Case(objective=ObjectiveConfig(), vae="sd", max_tokens=77),
    "v zero snr": Case(objective=ObjectiveConfig(prediction="v", zero_terminal_snr=True)),
    "VAE with statistics": Case(objective=V, vae="per_channel"),
    "VAE that decodes more": Case(objective=V, vae="asymmetric"),
}
SAMPLED = {
    "v": ObjectiveConfig(prediction="v"),
    "zero_snr": ObjectiveConfig(prediction="v", zero_terminal_snr=True),
    "flow": ObjectiveConfig(prediction="flow"),
}
"""The bundles on which samplers are compared, by their trait."""
QUICK = dict.fromkeys(SAMPLERS, ("v",)) | {"sa-solver": ("v", "flow")}
"""Without the slow tests, each sampler is compared on these."""


def make(case: Case, folder: Path) -> Path:
    vae = load_vae((case.vae and tiny.vae_folder(case.vae)) or tiny.encoders().vae)
    if case.scaling_factor is not None:
        vae.register_to_config(scaling_factor=case.scaling_factor)
    return make_bundle(folder, case.objective, vae=vae, max_tokens=case.max_tokens)


def stock_images(pipeline: Any, **settings: Any) -> np.ndarray:
    images = pipeline(
        PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **settings
    ).images
    return np.stack([np.asarray(image, int) for image in images])


def own_images(bundle: Path, **settings: Any) -> np.ndarray:
    images = sampler.draw(sampler.load(bundle), PROMPTS, SEEDS, **settings)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_stock_pipelines_make_the_same_images(name: str, tmp_path: Path) -> None:
    bundle = make((CASES | MORE)[name], tmp_path / "bundle")
    own = own_images(bundle, scheduler="bundle", num_steps=4, guidance_scale=3.0)
    assert own.std() > 10
    for kind in (StableDiffusionPipeline, AutoPipelineForText2Image):
        pipeline = kind.from_pretrained(bundle)
        pipeline.set_progress_bar_config(disable=True)
        stock = stock_images(pipeline, num_inference_steps=4, guidance_scale=3.0)
        assert np.abs(stock - own).max() <= 2


@pytest.fixture(scope="module")
def stocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The stock pipelines of the bundles in SAMPLED."""
    folder, found = tmp_path_factory.mktemp("stock"), {}
    for trait, objective in SAMPLED.items():
        bundle = make_bundle(folder / trait, objective)
        found[trait] = StableDiffusionPipeline.from_pretrained(bundle)
        found[trait].set_progress_bar_config(disable=True)
    return found


@pytest.mark.filterwarnings("ignore")  # some schedulers print warnings of their own
@pytest.mark.parametrize(
    ("trait", "name"),
    [
        pytest.param(trait, name, marks=[] if trait in QUICK[name] else pytest.mark.slow)
        for trait in SAMPLED
        for name in SAMPLERS
        if trait not in SAMPLERS[name].unfit
    ],
)
def test_stock_pipelines_make_the_same_images_with_each_sampler(
    stocks: dict[str, Any], trait: str, name: str
) -> None:
    stock = stocks[trait]
    own_scheduler = stock.scheduler
    assert name in fitting(own_scheduler)
    common: dict[str, Any] = {"guidance_scale": 3.0, "guidance_rescale": 0.3}
    images = sampler.draw(
        stock, PROMPTS, SEEDS, scheduler=name, num_steps=4, negative_prompt="blurry", **common
    )
    own = np.stack([np.asarray(image, int) for image in images])
    sample = SAMPLERS[name]
    kind = getattr(diffusers, sample.kind)
    stock.scheduler = kind.from_config(own_scheduler.config, **sample.overrides)
    try:
        common["negative_prompt"] = ["blurry"] * len(PROMPTS)
        found = stock_images(stock, num_inference_steps=4, **common)
    finally:
        stock.scheduler = own_scheduler
    assert np.abs(found - own).max() <= 2
