"""`sample.run`: image files with their settings, the labelled grid, and errors."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.model.grid import labelled_grid, read_settings, save_png
from latent_t2i.sample import pictures, sampler
from latent_t2i.sample.config import SampleConfig
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def config(bundle: Path, out: Path, **settings: object) -> SampleConfig:
    chosen = {"prompts": ("a red circle", "ein rotes Häuschen 赤"), "num_steps": 3} | settings
    return SampleConfig(bundle=str(bundle), out=str(out), **chosen)


def test_the_settings_in_a_png_reproduce_the_image(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = pictures.sample(config(bundle, tmp_path, images_per_prompt=2, seed=40))
    assert str(grid) in capsys.readouterr().out
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    settings = read_settings(files[3])
    assert settings["prompt"] == "ein rotes Häuschen 赤"
    assert settings["seed"] == 43
    (again,) = sampler.draw(
        sampler.load(bundle),
        [settings["prompt"]],
        [settings["seed"]],
        guidance_scale=settings["guidance_scale"],
        num_steps=settings["num_steps"],
        scheduler=settings["scheduler"],
    )
    saved = np.asarray(Image.open(files[3]), dtype=int)
    assert np.abs(saved - np.asarray(again, dtype=int)).max() <= 1


def test_a_png_without_settings_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"plain\.png: no latent-t2i text chunk"):
        read_settings(path)
    save_png(Image.new("RGB", (4, 4)), path, {"prompt": "x", "seed": 1})
    assert read_settings(path) == {"prompt": "x", "seed": 1}


def test_the_grid_shows_every_image_with_its_label() -> None:
    colours = [(200, 30 * i, 60) for i in range(6)]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    labels = ["short", "a label so long that it has to be broken into lines " * 4] * 3
    grid = np.asarray(labelled_grid(images, labels, num_columns=3))
    side, step = 192, 192 + 12
    label_px = (grid.shape[0] - 12) // 2 - step
    assert grid.shape[1] == 3 * step + 12
    for number, colour in enumerate(colours):
        x, y = 12 + number % 3 * step, 12 + number // 3 * (step + label_px)
        assert (grid[y : y + side, x : x + side] == colour).all()
        label = grid[y + side : y + side + label_px, x : x + side]
        assert (label.max(-1) < 128).any()


def test_prompts_of_the_file_follow_those_of_the_flag(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("three\n\n  four \n", "utf-8")
    argv = ["--prompt", "one", "two", "--prompt-file", str(lines)]
    expected = ["one", "two", "three", "four"]
    assert pictures.read_prompts(parse(SampleConfig, "sample", argv)) == expected


@pytest.mark.parametrize("shipped", [True, False])
def test_a_run_without_a_bundle_uses_the_shipped_one(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    shipped: bool,
) -> None:
    monkeypatch.setattr(pictures, "SHIPPED_BUNDLE", str(bundle) if shipped else "not/shipped")
    monkeypatch.setattr(pictures, "output_root", lambda: tmp_path)
    if shipped:
        assert pictures.choose_bundle(None, "x") == bundle
        assert "using the shipped" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match=r"--bundle: .*runs/x/bundle does not exist; train"):
            pictures.choose_bundle(None, "x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-scale", "0.5"], "--guidance-scale: expected at least 1, found 0.5"),
        (["--num-steps", "0"], "--num-steps: expected at least 1, found 0"),
        (["--seed", "-1"], "--seed: expected at least 0, found -1"),
        (["--scheduler", "heun"], "scheduler"),
    ],
)
def test_invalid_settings_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SampleConfig, "sample", flags)


def test_missing_prompts_are_errors() -> None:
    with pytest.raises(ValueError, match="--prompt: no prompts"):
        pictures.read_prompts(SampleConfig())
    with pytest.raises(ValueError, match=r"--prompt-file: no file 'gone\.txt'"):
        pictures.read_prompts(SampleConfig(prompt_file="gone.txt"))
