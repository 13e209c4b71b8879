"""Text in int8: the scale fits the sample, the noted error is true, odd values do no harm."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latent_t2i.model import encoders as networks
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.encode import Encoders, encode_captions, load_encoders
from latent_t2i.pipeline.quantise import Quantiser, find_scale
from latent_t2i.scenes.captions import captions
from latent_t2i.scenes.world import WORLDS, make_scene
from tests import tiny

CAPTIONS = [f"picture {index} of {word}" for index in range(9) for word in ("dogs", "a cat")]


def make_encoders(clip: str = "", max_tokens: int = 16) -> Encoders:
    folders = tiny.encoders()
    return load_encoders(
        PipelineConfig(
            name="n",
            vae=folders.vae,
            text_encoder=clip or folders.clip,
            source=SourceConfig(images="i", captions="c"),
            max_tokens=max_tokens,
            batch_size=2,
        ),
        torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return make_encoders()


@pytest.fixture
def change_text(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Changes in place what the text encoder gives."""
    original = networks.encode_text

    def arrange(change: Callable[[torch.Tensor], None]) -> None:
        def changed(encoder: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
            hidden = original(encoder, ids)
            change(hidden)
            return hidden

        monkeypatch.setattr(networks, "encode_text", changed)

    return arrange


def silent(num: int) -> None:
    """Tells nobody of progress."""


def relative_error(text: NDArray[np.float16], scale: NDArray[np.float32]) -> float:
    """Of text (N, T, D) stored with any scale that broadcasts to it."""
    exact = text.astype(np.float64)
    steps = np.clip(np.rint(exact / scale), -127, 127)
    return float(np.linalg.norm(steps * scale - exact) / np.linalg.norm(exact))


def error_by_scale(text: NDArray[np.float16], *, of: slice = slice(None)) -> list[float]:
    """With a scale per channel, a scale per token, and one for all; of some channels only."""
    largest = np.abs(text.astype(np.float64))
    scales = [largest.max(axis, keepdims=True) / 127 for axis in ((0, 1), (2,), (0, 1, 2))]
    wide = [np.broadcast_to(scale, text.shape) for scale in scales]
    return [relative_error(text[..., of], scale[..., of]) for scale in wide]


def test_values_are_rounded_and_what_is_beyond_is_cut_and_counted() -> None:
    quantise = Quantiser(np.array([0.5, 2], np.float32))
    text = np.array([[0.74, -0.76], [63.5, 1000], [-70, -254]], np.float16)
    found = quantise(text)
    assert found.dtype == np.int8
    assert found.tolist() == [[1, 0], [127, 127], [-127, -127]]
    assert (quantise.num_values, quantise.num_saturated) == (6, 2)
    assert quantise.share_saturated == pytest.approx(1 / 3)
    assert Quantiser(np.ones(2, np.float32)).share_saturated == 0


@settings(deadline=None)
@given(seed=st.integers(0, 999), spread=st.floats(0, 12))
def test_the_error_is_at_most_half_a_step_and_signs_do_not_matter(seed: int, spread: float) -> None:
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


def test_the_scale_is_the_sample_s_and_the_error_is_what_it_makes(encoders: Encoders) -> None:
    told: list[int] = []
    found = find_scale(CAPTIONS, encoders, progress=told.append)
    text, _, _ = encode_captions(encoders, CAPTIONS)
    largest = np.abs(text.astype(np.float32)).max((0, 1))
    np.testing.assert_allclose(found.scale, largest / 127, rtol=2e-3)  # another batch
    assert found.scale.dtype == np.float32
    assert found.relative_error == pytest.approx(relative_error(text, found.scale), rel=1e-3)
    assert 0 < found.relative_error < 0.01
    assert (found.num_captions, sum(told), max(told)) == (18, 2 * 18, 8)
    again = find_scale(CAPTIONS, encoders, progress=silent)
    assert (again.scale == found.scale).all() and again[1:] == found[1:]


def test_channels_of_zeros_come_back_as_zeros(encoders: Encoders, change_text: Callable) -> None:
    before = find_scale(CAPTIONS, encoders, progress=silent)
    change_text(lambda hidden: hidden[..., 3:6].zero_())
    found = find_scale(CAPTIONS, encoders, progress=silent)
    assert found.scale[3:6].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(
        np.delete(found.scale, slice(3, 6)), np.delete(before.scale, slice(3, 6))
    )
    text, _, _ = encode_captions(encoders, CAPTIONS)
    restored = Quantiser(found.scale)(text) * found.scale
    assert not restored[..., 3:6].any()
    assert found.relative_error == pytest.approx(relative_error(text, found.scale), rel=1e-3)


def test_text_of_nothing_but_zeros_has_no_error(encoders: Encoders, change_text: Callable) -> None:
    change_text(torch.Tensor.zero_)
    found = find_scale(CAPTIONS, encoders, progress=silent)
    assert (found.relative_error, found.num_captions) == (0, 18)
    assert (found.scale == 1).all()


def test_captions_that_are_not_finite_do_not_count(
    encoders: Encoders, change_text: Callable
) -> None:
    def spoil(hidden: torch.Tensor) -> None:
        hidden[0, 2, 7] = 1e6  # more than float16 holds, in the first of each batch of eight

    good = [caption for index, caption in enumerate(CAPTIONS) if index % 8]
    expected = find_scale(good, encoders, progress=silent)
    change_text(spoil)
    found = find_scale(CAPTIONS, encoders, progress=silent)
    assert found.num_captions == len(good) == 15
    np.testing.assert_allclose(found.scale, expected.scale, rtol=2e-3)
    with pytest.raises(ValueError, match="text is not finite in float16 in any of 1 captions"):
        find_scale(CAPTIONS[:1], encoders, progress=silent)


def test_outlier_channels_take_no_steps_from_the_others() -> None:
    text = np.random.default_rng(0).normal(size=(200, 16, 64))
    text[..., :2] *= 50
    by_channel, by_token, by_one = error_by_scale(text.astype(np.float16), of=slice(2, None))
    assert by_channel < 0.01
    assert by_token > 0.1
    assert by_one > 0.3


def test_the_embedded_clip_loses_less_than_a_hundredth() -> None:
    """As docs/format.md says."""
    world = WORLDS["full"]
    rng = np.random.default_rng(0)
    sample = [
        caption.text
        for _ in range(60)
        for caption in captions(make_scene(world, rng, "train"), world, rng)
    ]
    encoders = make_encoders("scenes/encoders/clip", max_tokens=32)
    found = find_scale(sample, encoders, progress=silent)
    assert 0.005 < found.relative_error < 0.01
    text, _, _ = encode_captions(encoders, sample)
    by_channel, by_token, by_one = error_by_scale(text)
    assert by_channel == pytest.approx(found.relative_error, rel=0.01)
    assert by_token < by_channel < by_one  # it has no outlier channels, unlike larger ones
