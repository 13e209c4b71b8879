"""The three resize modes of Inception; tests/evaluation/references compares the packages' own."""

import numpy as np
import pytest
import torch

from latent_t2i.evaluation import resize
from latent_t2i.evaluation.config import ResizeMode

MODES: tuple[ResizeMode, ...] = ("legacy", "clean", "pytorch")


def checkerboard(side: int) -> np.ndarray:
    board = np.indices((side, side)).sum(0) % 2 * 255
    return np.repeat(board[None, :, :, None], 3, 3).astype(np.uint8)


def test_nothing_happens_at_299_px() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    expected = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()
    for resized in (resize.legacy, resize.clean, resize.half_pixel):
        assert torch.equal(resized(images, 299), expected)


def test_only_clean_averages_pixels_when_shrinking() -> None:
    board = checkerboard(40)
    assert resize.clean(board, 10).std() < 20
    assert resize.legacy(board, 10).std() == 0  # every fourth pixel, all of one colour
    assert set(resize.legacy(board, 10).unique().tolist()) == {0.0}
    assert set(resize.half_pixel(board, 20).unique().tolist()) == {127.5}


def test_where_legacy_and_half_pixel_sample() -> None:
    ramp = np.repeat(np.arange(4, dtype=np.uint8)[None, None, :, None] * 60, 3, 3)
    ramp = np.repeat(ramp, 4, 1)
    legacy = resize.legacy(ramp, 8)[0, 0, 0]
    assert legacy.tolist() == [0, 30, 60, 90, 120, 150, 180, 180]
    half = resize.half_pixel(ramp, 8)[0, 0, 0]
    assert half.tolist() == [0, 15, 45, 75, 105, 135, 165, 180]


def test_clean_stays_within_the_range_of_pixels() -> None:
    sharp = np.zeros((1, 20, 20, 3), np.uint8)
    sharp[:, 10:] = 255
    resized = resize.clean(sharp, 61)
    assert (resized.min(), resized.max()) == (0, 255)


@pytest.mark.parametrize("mode", MODES)
def test_scale_for_inception(mode: ResizeMode) -> None:
    images = np.zeros((2, 30, 40, 3), np.uint8)
    images[1] = 255
    found = resize.prepare(images, mode)
    assert found.shape == (2, 3, 299, 299)
    assert found.dtype == torch.float32
    high = 1.0 if mode == "pytorch" else 127 / 128
    assert torch.allclose(found[0], torch.tensor(-1.0))
    assert torch.allclose(found[1], torch.tensor(high), rtol=1e-6)


def test_modes_differ() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    found = [resize.prepare(images, mode) for mode in MODES]
    assert not torch.allclose(found[0], found[1], atol=0.1)
    assert not torch.allclose(found[0], found[2], atol=0.1)
    assert not torch.allclose(found[1], found[2], atol=0.1)
