"""Text in int8: the scale fits the sample, the recorded error is true, odd values are handled."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from latent_t2i.model import encoders as networks
from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.encode import Encoders, encode_captions
from latent_t2i.pipeline.quantise import Quantiser, find_scale
from latent_t2i.pipeline.stage import load_encoders
from latent_t2i.scenes.captions import captions
from latent_t2i.scenes.world import WORLDS, make_scene
from latent_t2i.shards.writer import FoundScale
from tests import tiny
from tests.stage_one import make_config

CAPTIONS = [f"picture {index} of {word}" for index in range(9) for word in ("dogs", "a cat")]


def make_encoders(clip: str = "", max_tokens: int = 16) -> Encoders:
    settings = {"text_encoder": clip or tiny.encoders().clip, "max_tokens": max_tokens}
    source = SourceConfig(images="i", captions="c")
    config = make_config(source, Path("out"), batch_size=2, **settings)
    return load_encoders(config, torch.device("cpu"))


def encode(encoders: Encoders, captions: Sequence[str]) -> NDArray[np.float16]:
    return encode_captions(encoders, tokenized(encoders, captions))["text"]


def tokenized(encoders: Encoders, captions: Sequence[str]) -> dict[str, list[int]]:
    return dict(zip(captions, encoders.text.tokenize(captions), strict=True))


def scale_of(
    encoders: Encoders,
    captions: Sequence[str] = CAPTIONS,
    progress: Callable[[int], object] = lambda num: None,
) -> FoundScale:
    return find_scale(tokenized(encoders, captions), encoders, progress=progress)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return make_encoders()


@pytest.fixture
def change_text(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Lets a test change the text encoder's hidden states in place."""
    original = networks.encode_text

    def arrange(change: Callable[[torch.Tensor], None]) -> None:
        def changed(encoder: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
            hidden = original(encoder, ids)
            change(hidden)
            return hidden

        monkeypatch.setattr(networks, "encode_text", changed)

    return arrange


def relative_error(text: NDArray[np.float16], scale: NDArray[np.float32]) -> float:
    """Returns the error of text (N, T, D) stored with any scale that broadcasts to it."""
    exact = text.astype(np.float64)
    steps = np.clip(np.rint(exact / scale), -127, 127)
    return float(np.linalg.norm(steps * scale - exact) / np.linalg.norm(exact))


def error_by_scale(text: NDArray[np.float16], *, of: slice = slice(None)) -> list[float]:
    """Returns the errors with one scale per channel, per token, and for all, on channels `of`."""
    largest = np.abs(text.astype(np.float64))
    scales = [largest.max(axis, keepdims=True) / 127 for axis in ((0, 1), (2,), (0, 1, 2))]
    wide = [np.broadcast_to(scale, text.shape) for scale in scales]
    return [relative_error(text[..., of], scale[..., of]) for scale in wide]


def test_values_are_rounded_and_values_beyond_the_range_are_clipped_and_counted() -> None:
    quantise = Quantiser(np.array([0.5, 2], np.float32))
    text = np.array([[0.74, -0.76], [63.5, 1000], [-70, -254]], np.float16)
    found = quantise(text)
    assert found.dtype == np.int8
    assert found.tolist() == [[1, 0], [127, 127], [-127, -127]]
    assert (quantise.num_values, quantise.num_saturated) == (6, 2)
    assert quantise.share_saturated == pytest.approx(1 / 3)
    assert Quantiser(np.ones(2, np.float32)).share_saturated == 0


@given(seed=st.integers(0, 999), spread=st.floats(0, 12))
def test_the_error_is_at_most_half_a_step_and_symmetric(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    text = (rng.normal(size=(3, 5, 8)) * np.exp(rng.normal(size=8) * spread)).clip(-6e4, 6e4)
    text = text.astype(np.float16)
    largest = np.abs(text).max((0, 1)).astype(np.float32)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    quantise = Quantiser(scale)
    restored = quantise(text) * scale
    assert (np.abs(restored - text.astype(np.float32)) <= scale * 0.5001).all()
    assert quantise.num_saturated == 0
    np.testing.assert_array_equal(quantise(-text), -quantise(text))


def test_the_scale_and_the_error_are_those_of_the_sample(encoders: Encoders) -> None:
    steps: list[int] = []
    found = scale_of(encoders, progress=steps.append)
    text = encode(encoders, CAPTIONS)
    largest = np.abs(text.astype(np.float32)).max((0, 1))
    np.testing.assert_allclose(found.scale, largest / 127, rtol=2e-3)  # another batch
    assert found.scale.dtype == np.float32
    assert found.relative_error == pytest.approx(relative_error(text, found.scale), rel=1e-3)
    assert 0 < found.relative_error < 0.01
    assert (found.num_captions, sum(steps), max(steps)) == (18, 2 * 18, 8)
    again = scale_of(encoders)
    assert (again.scale == found.scale).all() and again[1:] == found[1:]


def test_channels_of_zeros_stay_zeros(encoders: Encoders, change_text: Callable) -> None:
    before = scale_of(encoders)
    change_text(lambda hidden: hidden[..., 3:6].zero_())
    found = scale_of(encoders)
    assert found.scale[3:6].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(
        np.delete(found.scale, slice(3, 6)), np.delete(before.scale, slice(3, 6))
    )
    text = encode(encoders, CAPTIONS)
    restored = Quantiser(found.scale)(text) * found.scale
    assert not restored[..., 3:6].any()
    assert found.relative_error == pytest.approx(relative_error(text, found.scale), rel=1e-3)


def test_text_of_zeros_only_has_no_error(encoders: Encoders, change_text: Callable) -> None:
    change_text(torch.Tensor.zero_)
    found = scale_of(encoders)
    assert (found.relative_error, found.num_captions) == (0, 18)
    assert (found.scale == 1).all()


def test_captions_whose_text_is_not_finite_are_ignored(
    encoders: Encoders, change_text: Callable
) -> None:
    def spoil(hidden: torch.Tensor) -> None:
        hidden[0, 2, 7] = 1e6  # more than float16 holds, in the first of each batch of eight

    good = [caption for index, caption in enumerate(CAPTIONS) if index % 8]
    expected = scale_of(encoders, good)
    change_text(spoil)
    found = scale_of(encoders)
    assert found.num_captions == len(good) == 15
    np.testing.assert_allclose(found.scale, expected.scale, rtol=2e-3)
    with pytest.raises(ValueError, match="text is not finite in float16 in any of 1 captions"):
        scale_of(encoders, CAPTIONS[:1])


def test_outlier_channels_do_not_coarsen_the_others() -> None:
    text = np.random.default_rng(0).normal(size=(200, 16, 64))
    text[..., :2] *= 50
    by_channel, by_token, by_one = error_by_scale(text.astype(np.float16), of=slice(2, None))
    assert by_channel < 0.01
    assert by_token > 0.1
    assert by_one > 0.3


def test_the_error_of_the_embedded_clip_is_below_one_percent() -> None:
    """docs/format.md states this figure."""
    world = WORLDS["full"]
    rng = np.random.default_rng(0)
    sample = [
        caption.text
        for _ in range(60)
        for caption in captions(make_scene(world, rng, "train"), world, rng)
    ]
    encoders = make_encoders("scenes/encoders/clip", max_tokens=32)
    found = scale_of(encoders, sample)
    assert 0.005 < found.relative_error < 0.01
    text = encode(encoders, sample)
    by_channel, by_token, by_one = error_by_scale(text)
    assert by_channel == pytest.approx(found.relative_error, rel=0.01)
    assert by_token < by_channel < by_one  # it has no outlier channels, unlike larger ones
