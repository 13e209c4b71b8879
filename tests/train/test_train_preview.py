"""Previews: what they show and when they are drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from latent_t2i.model.generate import generate_images
from latent_t2i.model.grid import labelled_grid, read_settings
from latent_t2i.train import loop
from latent_t2i.train.config import PreviewConfig, TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preview import draw_images, make_preview, write
from latent_t2i.train.setup import Run, start
from tests.train.conftest import MakeConfig

PROMPTS = ("red", "a blue bird", "green")


@pytest.fixture
def previewed(make_config: MakeConfig) -> Any:
    """Makes the settings of a run with a preview every fourth step."""

    def make(**changes: Any) -> TrainConfig:
        preview = PreviewConfig(every_steps=4, prompts=PROMPTS, seed=5, num_steps=2)
        return make_config(preview=preview, **changes)

    return make


def test_previews_show_what_the_bundle_draws(previewed: Any) -> None:
    bundle = train(previewed())
    folder = bundle.parent / "previews"
    names = [f"step-{step:08d}.png" for step in (4, 8, 10)]
    assert sorted(path.name for path in folder.iterdir()) == names
    pipeline = StableDiffusionPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    drawn = generate_images(pipeline, PROMPTS, [5, 6, 7], guidance_scale=4.0, num_steps=2)
    expected = np.asarray(labelled_grid(drawn, PROMPTS), np.int16)
    found = np.asarray(Image.open(folder / names[-1]), np.int16)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1
    assert read_settings(folder / names[-1])["step"] == 10
    assert (folder / names[0]).read_bytes() != (folder / names[1]).read_bytes()


def test_drawing_restores_weights_and_random_state(previewed: Any, tmp_path: Path) -> None:
    run = start(previewed())
    with torch.no_grad():
        run.state.unet.conv_in.weight.add_(1.0)
    kept = run.state.unet.conv_in.weight.detach().clone()
    before = torch.get_rng_state()
    for name in ("one.png", "two.png"):
        write(tmp_path / name, draw_images(run), run)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run.state.unet.conv_in.weight, kept)
    assert run.state.unet.training
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["one.png", "two.png"]


def test_few_images_are_decoded_at_once(make_config: MakeConfig) -> None:
    prompts = tuple(map(str, range(6)))
    preview = PreviewConfig(every_steps=4, prompts=prompts, num_steps=1, guidance_scale=1.0)
    run, sizes = start(make_config(preview=preview)), []
    run.plan.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert len(draw_images(run)) == 6
    assert sizes == [4, 4]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_black_images_are_reported(previewed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(previewed())
    next(iter(run.state.ema.average.values())).fill_(torch.nan)
    make_preview(run)
    assert "preview of step 0: 3 of 3 images are entirely black" in capsys.readouterr().err


def test_a_finished_run_draws_no_more(previewed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def note(run: Run) -> None:
        steps.append(run.state.step)
        make_preview(run)

    monkeypatch.setattr(loop, "make_preview", note)
    config = previewed()
    train(config)
    train(config)
    assert steps == [4, 8, 10]
    train(replace(config, num_steps=11))
    assert steps == [4, 8, 10, 11]


def test_a_run_that_its_time_budget_ends_draws_its_last_step(previewed: Any) -> None:
    bundle = train(previewed(max_train_s=1e-6))
    assert [path.name for path in (bundle.parent / "previews").iterdir()] == ["step-00000001.png"]
