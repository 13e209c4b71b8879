"""Interpolation: the sphere between vectors, key frames, strips and animations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_t2i.configs.cli import parse
from latent_t2i.model.grid import read_settings
from latent_t2i.sample import interpolation, sampler
from latent_t2i.sample.interpolation import slerp
from latent_t2i.sample.settings import InterpolateConfig
from tests.bundles import COMPUTED

PROMPTS = ("a red circle", "a blue star")
VECTORS = st.lists(st.floats(-100, 100), min_size=4, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Any:
    return sampler.load(bundle)


@pytest.fixture
def loaded(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the bundle once for all tests."""
    monkeypatch.setattr(sampler, "load", lambda *_, **__: pipeline)


def config(bundle: Path, **values: Any) -> InterpolateConfig:
    chosen: dict[str, Any] = {"prompts": PROMPTS, "num_steps": 2, "num_frames": 3} | values
    return InterpolateConfig(bundle=str(bundle), **chosen)


@settings(max_examples=60)
@given(first=VECTORS, last=VECTORS, fraction=st.floats(0, 1))
def test_the_way_starts_and_ends_at_its_keys_and_is_the_same_backwards(
    first: torch.Tensor, last: torch.Tensor, fraction: float
) -> None:
    def way(share: float) -> torch.Tensor:
        return slerp(first, last, share, dims=(-1,))

    size = max(first.norm().item(), last.norm().item(), 1e-3)
    assert (way(0) - first).norm() <= 1e-9 * size
    assert (way(1) - last).norm() <= 1e-9 * size
    backwards = slerp(last, first, 1 - fraction, dims=(-1,))
    assert (way(fraction) - backwards).norm() <= 1e-6 * size
    assert way(fraction).isfinite().all()


def test_vectors_of_equal_length_keep_it_and_turn_evenly() -> None:
    first, last = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for share in (0.25, 0.5, 2 / 3):
        angle = torch.tensor(share * torch.pi / 2)
        expected = torch.stack([angle.cos(), angle.sin()])
        assert torch.allclose(slerp(first, last, share, dims=(-1,)), expected, atol=1e-6)


def test_noise_between_two_seeds_has_the_variance_of_noise() -> None:
    first, last = (
        torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    middle = slerp(first, last, 0.5, dims=(-3, -2, -1))
    assert middle.std().item() == pytest.approx(1, abs=0.02)
    assert ((first + last) / 2).std().item() < 0.72  # a straight line's


def test_each_vector_turns_by_its_own_angle() -> None:
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    last = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # the second does not move
    middle = slerp(first, last, 0.5, dims=(-1,))
    assert torch.allclose(middle, torch.tensor([[0.5**0.5, 0.5**0.5], [2.0, 0.0]]))


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"scheduler": "ddpm", "seed": (1, 2)}, [(PROMPTS[0], 1), (PROMPTS[1], 2)]),
        ({"seed": (5,)}, [(PROMPTS[0], 5), (PROMPTS[1], 5)]),
        (
            {"prompts": PROMPTS[:1], "seed": (1, 2, 3), "guidance_scale": 1.0},
            [(PROMPTS[0], 1), (PROMPTS[0], 2), (PROMPTS[0], 3)],
        ),
    ],
)
def test_the_key_frames_are_the_images_of_their_prompts_and_seeds(
    bundle: Path, pipeline: Any, values: dict[str, Any], keys: list[tuple[str, int]]
) -> None:
    own = config(bundle, **values)
    frames = interpolation.draw_frames(pipeline, own)
    assert len(frames) == (len(keys) - 1) * 2 + 1
    prompts, seeds = zip(*keys, strict=True)
    expected = sampler.draw(
        pipeline,
        prompts,
        seeds,
        num_steps=2,
        guidance_scale=own.guidance_scale,
        scheduler=own.scheduler,
    )
    for frame, image in zip(frames[::2], expected, strict=True):
        assert np.abs(np.asarray(frame, int) - np.asarray(image, int)).max() <= 1
    assert (np.asarray(frames[1]) != np.asarray(frames[0])).any()
    assert (np.asarray(frames[1]) != np.asarray(frames[2])).any()


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("suffix", [".gif", ".apng"])
def test_an_animation_runs_forth_and_back_for_ever(
    bundle: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / "new" / f"way{suffix}"
    argv = ["--bundle", str(bundle), "--prompt", *PROMPTS, "--num-steps", "2", "--num-frames", "4"]
    argv += ["--frame-ms", "80", "--out", str(out)]
    assert interpolation.interpolate(parse(InterpolateConfig, None, argv, prog="x")) == out
    with Image.open(out) as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0
        frames = []
        for number in range(6):
            image.seek(number)
            assert image.info["duration"] == 80
            frames.append(np.asarray(image.convert("RGB"), int))
        assert np.abs(frames[1] - frames[5]).max() <= (64 if suffix == ".gif" else 0)
    if suffix == ".apng":
        assert read_settings(out)["prompts"] == list(PROMPTS)


@pytest.mark.parametrize("suffix", [".gif", ".apng"])
def test_an_interrupted_animation_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def interrupted(_: Image.Image, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half an animation")
        raise OSError("disk full")

    out = tmp_path / f"way{suffix}"
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(3)]
    interpolation.save_animation(images, out, frame_ms=80, settings={})
    earlier = out.read_bytes()
    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        interpolation.save_animation(images, out, frame_ms=80, settings={})
    assert out.read_bytes() == earlier


@pytest.mark.usefixtures("loaded")
def test_a_strip_names_key_frames_and_shares(bundle: Path, tmp_path: Path) -> None:
    own = config(bundle, seed=(1, 2), out=str(tmp_path / "strip.png"))
    assert interpolation._labels(own) == ["a red circle, seed 1", "50%", "a blue star, seed 2"]
    out = interpolation.interpolate(own)
    with Image.open(out) as strip:
        assert strip.width > 3 * 192
    found = read_settings(out)
    assert (found["seed"], found["num_frames"]) == ([1, 2], 3)
    assert found["scheduler"] == "dpmpp"
    assert found.keys() >= COMPUTED


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"prompts": ()}, "--prompt: expected at least 1"),
        ({"prompts": ("x",), "seed": (1,)}, "expected several prompts, several seeds"),
        ({"seed": (1, 2, 3)}, "found 2 prompts and 3 seeds"),
        ({"seed": (-1,)}, "--seed: expected"),
        ({"seed": ()}, "--seed: expected at least one"),
        ({"num_frames": 1}, "--num-frames: expected 2 or more"),
        ({"frame_ms": 0}, "--frame-ms: expected"),
        ({"out": "way.jpg"}, r"--out: expected a file name that ends in .png, .apng, .gif"),
        ({"num_steps": 0}, "--num-steps: expected"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        config(Path("x"), **values)
