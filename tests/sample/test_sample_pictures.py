"""`sample.run`: image files with their settings, the labelled grid, and errors."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.model.bundle import digest
from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.grid import labelled_grid, read_settings, save_png
from latent_t2i.model.paths import ROOT
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


@pytest.mark.parametrize(
    ("sizes", "factor"),
    [([(64, 128)] * 5, 1), ([(96, 48)] * 5, 2), ([(64, 64), (80, 48), (48, 80)], 2)],
)
def test_the_grid_shows_images_of_any_shape_whole(
    sizes: list[tuple[int, int]], factor: int
) -> None:
    colours = [(200, 30 * i, 60) for i in range(len(sizes))]
    images = [Image.new("RGB", *pair) for pair in zip(sizes, colours, strict=True)]
    grid = np.asarray(labelled_grid(images, ["a label of several lines below it"] * len(sizes)))
    for (width, height), colour in zip(sizes, colours, strict=True):
        ys, xs = np.nonzero((grid == colour).all(-1))
        assert len(ys) == width * height * factor**2
        assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (width * factor, height * factor)
        below = grid[ys.max() + 1 : ys.max() + 40, xs.min() : xs.max()]
        assert (below.max(-1) < 128).any()


def test_prompts_of_the_file_follow_those_of_the_flag(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("three\n\n  four \n", "utf-8")
    argv = ["--prompt", "one", "two", "--prompt-file", str(lines)]
    expected = ["one", "two", "three", "four"]
    assert pictures.read_prompts(parse(SampleConfig, "sample", argv)) == expected


def test_images_and_grid_name_their_bundle_and_replace_those_of_an_earlier_call(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.sample(config(bundle, tmp_path, images_per_prompt=2))
    foreign = tmp_path / "samples" / "0009.png"
    Image.new("RGB", (4, 4)).save(foreign)
    other = make_bundle(tmp_path / "other", ObjectiveConfig())
    grid = pictures.sample(config(other, tmp_path))
    assert "removed 2 images of an earlier call" in capsys.readouterr().out
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["0000.png", "0001.png", "0009.png"]
    for path in (grid, *files[:2]):
        settings = read_settings(path)
        assert (settings["bundle"], settings["bundle_sha256"]) == (str(other), digest(other))


def test_only_a_call_without_name_and_bundle_uses_the_shipped_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "output_root", lambda: tmp_path)
    assert pictures.choose_bundle(None, None).resolve() == ROOT / "scenes" / "bundle"
    assert "using the shipped scenes/bundle" in capsys.readouterr().out
    for argv in (["--name", "x"], ["--config", "demo", "--name", "x"]):
        with pytest.raises(ValueError, match=r"--bundle: .*runs/x/bundle does not exist; train"):
            pictures.sample(parse(SampleConfig, "sample", [*argv, "--prompt", "a red circle"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("", "--config configs/scenes.yaml --name samples --bundle scenes/bundle"),
        ("CONFIG=configs/demo.yaml", "--config configs/demo.yaml"),
    ],
)
def test_make_samples_uses_the_shipped_bundle_unless_config_is_given(
    config: str, flags: str
) -> None:
    make = ["make", "--no-print-directory", "--dry-run", "PYTHON=python", "samples"]
    command = [*make, *config.split()]
    environment = {k: v for k, v in os.environ.items() if k not in ("CONFIG", "MAKEFLAGS")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == f"python -m sample.run {flags}".split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-scale", "0.5"], "--guidance-scale: expected .*, found 0.5"),
        (["--guidance-scale", "nan"], "--guidance-scale: expected .*, found nan"),
        (["--guidance-scale", "inf"], "--guidance-scale: expected .*, found inf"),
        (["--num-steps", "0"], "--num-steps: expected .*, found 0"),
        (["--batch-size", "0"], "--batch-size: expected .*, found 0"),
        (["--images-per-prompt", "0"], "--images-per-prompt: expected .*, found 0"),
        (["--seed", "-1"], "--seed: expected .*, found -1"),
        (["--seed", str(2**63)], f"--seed: expected .*, found {2**63}"),
        (["--scheduler", "heun"], r"'heun' .*'ddim', 'dpmpp', 'unipc', 'euler', 'bundle'"),
    ],
)
def test_invalid_settings_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SampleConfig, "sample", flags)


def test_the_largest_seed_leaves_room_for_the_following_ones(bundle: Path, tmp_path: Path) -> None:
    pictures.sample(config(bundle, tmp_path, seed=2**63 - 1))
    assert read_settings(tmp_path / "samples" / "0001.png")["seed"] == 2**63


def test_missing_prompts_are_errors() -> None:
    with pytest.raises(ValueError, match="--prompt: no prompts"):
        pictures.read_prompts(SampleConfig())
    with pytest.raises(ValueError, match=r"--prompt-file: no file 'gone\.txt'"):
        pictures.read_prompts(SampleConfig(prompt_file="gone.txt"))


def test_a_prompt_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfea\x00")
    with pytest.raises(ValueError, match=r"--prompt-file: .*prompts\.txt is not UTF-8"):
        pictures.read_prompts(SampleConfig(prompt_file=str(path)))
    with pytest.raises(ValueError, match=r"--prompt-file: .* is not a regular file"):
        pictures.read_prompts(SampleConfig(prompt_file=str(tmp_path)))


def test_images_that_are_not_finite_are_an_error(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] *= float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"--bundle: the images are not finite in torch.float32"):
        pictures.sample(config(broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
