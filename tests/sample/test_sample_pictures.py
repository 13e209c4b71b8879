"""`sample.run`: image files with their settings, the labelled grid, and errors."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.model.bundle import digest
from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.grid import labelled_grid, read_settings, save_png
from latent_t2i.model.paths import ROOT
from latent_t2i.sample import pictures, sampler
from latent_t2i.sample.config import SampleConfig
from latent_t2i.sample.prompts import read_prompts
from tests.bundles import make_bundle


def config(bundle: Path, out: Path, **settings: object) -> SampleConfig:
    chosen = {"prompts": ("a red circle", "ein rotes Häuschen 赤"), "num_steps": 3} | settings
    return SampleConfig(bundle=str(bundle), out=str(out), **chosen)


def test_the_settings_in_a_png_reproduce_the_image(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = pictures.sample(config(bundle, tmp_path, num_images=2, seed=40))
    assert str(grid) in capsys.readouterr().out
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == [f"{number:06d}.png" for number in range(4)]
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
    computed = ("versions", "device", "batch_size", "channels_last", "compile")
    assert {settings[name] for name in computed[2:]} == {4, False}
    assert settings["device"] == "cpu, 1 threads"
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line.pop("file") for line in lines] == [path.name for path in files]
    assert lines[3] == {name: settings[name] for name in settings if name not in computed}
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
    found = read_prompts(parse(SampleConfig, "sample", argv))
    assert [prompt.text for prompt in found] == expected


def test_a_changed_setting_is_refused_unless_overwrite(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.sample(config(bundle, tmp_path, num_images=2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").iterdir()}
    pictures.sample(config(bundle, tmp_path, num_images=2, batch_size=1))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").iterdir()}
    with pytest.raises(
        ValueError, match=r"000000\.png: .* num_steps 3, this one has 2; .*--overwr"
    ):
        pictures.sample(config(bundle, tmp_path, num_steps=2, num_images=2))
    with pytest.raises(ValueError, match=r"drew 2 more than the 2 pictures .* 000002\.png"):
        pictures.sample(config(bundle, tmp_path, prompts=("a red circle",), num_images=2))
    other = make_bundle(tmp_path / "other", ObjectiveConfig())
    with pytest.raises(ValueError, match=f"bundle_sha256 '{digest(bundle)}', .*'{digest(other)}'"):
        pictures.sample(config(other, tmp_path, num_images=2))
    foreign = tmp_path / "samples" / "0000009.png"
    Image.new("RGB", (4, 4)).save(foreign)
    grid = pictures.sample(config(other, tmp_path, overwrite=True))
    assert "deleted 4 pictures of an earlier call" in capsys.readouterr().out
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["000000.png", "0000009.png", "000001.png"]
    for path in (grid, files[0], files[2]):
        settings = read_settings(path)
        assert (settings["bundle"], settings["bundle_sha256"]) == (str(other), digest(other))


def test_a_picture_that_no_call_drew_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "samples" / "000001.png")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"000001\.png: no latent-t2i text chunk"):
            pictures.sample(config(bundle, tmp_path, overwrite=overwrite))


def test_a_grid_that_no_call_drew_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "samples.png")
    with pytest.raises(ValueError, match=r"--out: .*samples\.png .* is not a picture"):
        pictures.sample(config(bundle, tmp_path))


def test_like_repeats_a_picture_bit_for_bit(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"num_images": 2, "scheduler": "euler-ancestral", "guidance_interval": (0.1, 5.0)}
    pictures.sample(config(bundle, tmp_path / "one", **chosen, negative_prompt="x", batch_size=1))
    earlier = tmp_path / "one" / "samples" / "000003.png"
    pictures.sample(SampleConfig(like=str(earlier), out=str(tmp_path / "two")))
    assert (tmp_path / "two" / "samples" / "000000.png").read_bytes() == earlier.read_bytes()
    other = make_bundle(tmp_path / "other", seed=1)
    capsys.readouterr()
    pictures.sample(SampleConfig(like=str(earlier), out=str(tmp_path / "three"), bundle=str(other)))
    assert "--like: its bundle_sha256 is" in capsys.readouterr().out
    assert (tmp_path / "three" / "samples" / "000000.png").read_bytes() != earlier.read_bytes()


def test_like_repeats_a_picture_of_a_batch_bit_for_bit(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"prompts": tuple("abcdefg"), "scheduler": "euler-ancestral", "batch_size": 5}
    pictures.sample(config(bundle, tmp_path / "one", **chosen))
    for number in (1, 4, 6):  # the last one's batch was filled up
        earlier = tmp_path / "one" / "samples" / f"{number:06d}.png"
        out = tmp_path / str(number)
        pictures.sample(SampleConfig(like=str(earlier), out=str(out)))
        assert (out / "samples" / "000000.png").read_bytes() == earlier.read_bytes()
    assert "by rounding" not in capsys.readouterr().out
    pictures.sample(SampleConfig(like=str(earlier), out=str(tmp_path / "n"), batch_size=2))
    assert "batch_size 5 there, 2 here: the picture may differ" in capsys.readouterr().out
    assert read_settings(tmp_path / "n" / "samples" / "000000.png")["batch_size"] == 1


def test_like_accepts_the_path_of_a_changed_bundle_if_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = make_bundle(tmp_path / "bundle")
    pictures.sample(config(changed, tmp_path / "out", num_steps=1))
    (changed / "bundle.json").write_text("{}")
    earlier = str(tmp_path / "out" / "samples" / "000000.png")
    pictures.sample(SampleConfig(like=earlier, bundle=str(changed), out=str(tmp_path / "new")))
    assert "the picture will differ" in capsys.readouterr().out


def test_like_replaces_the_batch_size_of_a_preset(tmp_path: Path) -> None:
    preset = tmp_path / "own.yaml"
    preset.write_text("sample: {batch_size: 7}", "utf-8")
    argv = ["--config", str(preset), "--like", "a.png"]
    assert parse(SampleConfig, "sample", argv).batch_size is None
    assert parse(SampleConfig, "sample", [*argv, "--batch-size", "3"]).batch_size == 3


def test_like_needs_a_picture_and_its_bundle(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--like: no file 'gone\.png'"):
        pictures.sample(SampleConfig(like="gone.png"))
    with pytest.raises(ValueError, match=r"--seed: found 1 beside --like"):
        SampleConfig(like="a.png", seed=1)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(plain)
    with pytest.raises(ValueError, match=r"--like: .*plain\.png: no latent-t2i text chunk"):
        pictures.sample(SampleConfig(like=str(plain)))
    changed = make_bundle(tmp_path / "bundle")
    pictures.sample(config(changed, tmp_path / "out", num_steps=1))
    (changed / "bundle.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--like: its bundle_sha256 is .*; choose .* --bundle"):
        earlier = tmp_path / "out" / "samples" / "000000.png"
        pictures.sample(SampleConfig(like=str(earlier), out=str(tmp_path / "new")))


@pytest.mark.parametrize("setting", [{"strength": 0.6}, {"init_image": "photo.png"}])
def test_like_refuses_an_edited_picture(tmp_path: Path, setting: dict[str, object]) -> None:
    path = tmp_path / "edit.png"
    save_png(Image.new("RGB", (4, 4)), path, {"prompt": "x", "seed": 1} | setting)
    with pytest.raises(ValueError, match=r"--like: .*edit\.png was drawn from another image"):
        pictures.sample(SampleConfig(like=str(path), out=str(tmp_path / "out")))


def test_another_size_than_trained_prints_a_note(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.sample(config(bundle, tmp_path, size=(96, 40), num_steps=1))
    assert (
        "--size: 96 x 40 pixels, but the bundle was trained with 64 x 64" in capsys.readouterr().out
    )
    with Image.open(tmp_path / "samples" / "000000.png") as image:
        assert image.size == (96, 40)
    with pytest.raises(ValueError, match=r"--size: expected multiples of 8 .* found 100 x 64"):
        pictures.sample(config(bundle, tmp_path / "no", size=(100, 64)))


def test_the_grid_shows_a_bounded_number_of_images(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pictures, "MAX_GRID_IMAGES", 3)
    grid = pictures.sample(config(bundle, tmp_path, num_images=4, num_steps=1))
    assert "samples.png shows the first 3 of 8 images" in capsys.readouterr().out
    assert len(read_settings(grid)["prompts"]) == 3


def test_the_last_process_writes_the_grid_and_all_draw_what_one_draws(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = {"num_images": 3, "batch_size": 2, "num_steps": 2, "scheduler": "ddpm"}
    pictures.sample(config(bundle, tmp_path / "one", **chosen))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "two" / "samples.png").exists()
        monkeypatch.setenv("RANK", rank)
        pictures.sample(config(bundle, tmp_path / "two", **chosen))
    assert "process 2 of 2 has drawn its share of 6 images" in capsys.readouterr().out
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 8
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_a_stock_folder_without_bundle_json_is_enough(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = tmp_path / "stock"
    StableDiffusionPipeline.from_pretrained(bundle).save_pretrained(stock)
    pictures.sample(config(stock, tmp_path / "out"))
    pictures.sample(config(bundle, tmp_path / "bundle"))
    one, other = (
        np.asarray(Image.open(tmp_path / name / "samples" / "000001.png"), int)
        for name in ("out", "bundle")
    )
    assert np.array_equal(one, other)


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
    assert done.stdout.split() == f"python -m sample.run {flags} --overwrite".split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-scale", "0.5"], "--guidance-scale: expected .*, found 0.5"),
        (["--guidance-scale", "nan"], "--guidance-scale: expected .*, found nan"),
        (["--guidance-scale", "inf"], "--guidance-scale: expected .*, found inf"),
        (["--num-steps", "0"], "--num-steps: expected .*, found 0"),
        (["--batch-size", "0"], "--batch-size: expected .*, found 0"),
        (["--num-images", "0"], "--num-images: expected .*, found 0"),
        (["--seed", "-1"], "--seed: expected .*, found -1"),
        (["--seed", str(2**63)], f"--seed: expected .*, found {2**63}"),
        (["--scheduler", "dpm"], r"'dpm' .*'bundle', 'ddim', .*, 'unipc'"),
        (["--guidance-interval", "0.5"], "--guidance-interval: expected 2 values, found 1"),
        (["--guidance-interval", "2", "1"], "--guidance-interval: HIGH: expected more than 2.0"),
        (["--guidance-interval", "-1", "1"], "--guidance-interval: LOW: expected 0 or more"),
        (["--guidance-rescale", "1.5"], "--guidance-rescale: expected 0 to 1, found 1.5"),
        (["--guidance-scale", "1", "--guidance-rescale", "0.7"], "no effect with --guidance-scale"),
        (["--guidance-scale", "1", "--negative-prompt", "x"], "--negative-prompt: has no effect"),
        (["--guide", "b", "--negative-prompt", "x"], "--negative-prompt: has no effect with --gui"),
        (["--size", "64"], "--size: expected 2 values, found 1"),
        (["--num-prompts", "3"], "--num-prompts, --prompt-seed: need COCO captions"),
        (["--like", "a.png", "--seed", "0"], "--like and --seed: expected one of them"),
        (["--like", "a.png", "--num-steps", "25"], "--like and --num-steps: expected one"),
    ],
)
def test_invalid_settings_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SampleConfig, "sample", flags)


def test_the_largest_seed_leaves_room_for_the_following_ones(bundle: Path, tmp_path: Path) -> None:
    pictures.sample(config(bundle, tmp_path, seed=2**63 - 1))
    assert read_settings(tmp_path / "samples" / "000001.png")["seed"] == 2**63


def test_missing_prompts_are_errors() -> None:
    with pytest.raises(ValueError, match="--prompt: no prompts"):
        read_prompts(SampleConfig())
    with pytest.raises(ValueError, match=r"--prompt-file: no file 'gone\.txt'"):
        read_prompts(SampleConfig(prompt_file="gone.txt"))


def test_a_prompt_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfea\x00")
    with pytest.raises(ValueError, match=r"--prompt-file: .*prompts\.txt is not UTF-8"):
        read_prompts(SampleConfig(prompt_file=str(path)))
    with pytest.raises(ValueError, match=r"--prompt-file: .* is not a regular file"):
        read_prompts(SampleConfig(prompt_file=str(tmp_path)))


def test_images_that_are_not_finite_are_an_error(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] *= float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"--bundle: the images are not finite in torch.float32"):
        pictures.sample(config(broken, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "euler-ancestral", "guidance_scale": 4.0}, "EulerAncestral.* 3 and .* 4: "),
        ({"scheduler": "dpmpp", "guidance_scale": 1e39}, "DPMSolverMulti.* 3 and .* 1e[+]39: "),
    ],
)
def test_a_sampler_that_fails_is_named(settings: dict[str, Any], message: str) -> None:
    pipeline = sampler.load(ROOT / "scenes" / "bundle")
    with pytest.raises(ValueError, match=rf"in torch.float32; .* {message}try other steps"):
        sampler.draw(pipeline, ["a circle"], [0], num_steps=3, **settings)
