"""Images that show no shape of any world, which the oracle must not recognise as one."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from latent_t2i.scenes.draw import UNIT_OUTLINES, draw, mask
from latent_t2i.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    SHAPES,
    SIZES_PX,
    WORLDS,
    make_scene,
)

ANGLES = np.linspace(0, 2 * np.pi, 180, endpoint=False)


def blobs(num: int, rng: np.random.Generator) -> np.ndarray:
    """Roundish objects with lobes, as an undertrained model draws them."""
    return np.stack([_paint(_blob_radius(rng), rng) for _ in range(num)])


def morphs(num: int, rng: np.random.Generator) -> np.ndarray:
    """Outlines halfway between two shapes."""
    images = []
    for _ in range(num):
        first, second = rng.choice(SHAPES, 2, replace=False)
        radius = rng.uniform(*SIZES_PX[str(rng.choice(list(SIZES_PX)))])
        images.append(_paint(radius * (_radial(first) + _radial(second)) / 2, rng))
    return np.stack(images)


def blurred(num: int, rng: np.random.Generator) -> np.ndarray:
    """Shapes under a Gaussian blur of 0.4 times their radius."""
    images = []
    for _ in range(num):
        scene = make_scene(WORLDS["full"], rng, "val", num_objects=1)
        blur = ImageFilter.GaussianBlur(0.4 * scene.objects[0].radius_px)
        images.append(np.asarray(draw(scene).filter(blur)))
    return np.stack(images)


def noise(num: int, rng: np.random.Generator) -> np.ndarray:
    """Coarse colour noise, as a decoder makes from random latents."""
    small = rng.integers(0, 256, (num, 12, 12, 3), dtype=np.uint8)
    size = (64, 64)
    return np.stack([np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC))
                     for s in small])  # fmt: skip


def _blob_radius(rng: np.random.Generator) -> np.ndarray:
    waves = [rng.uniform(0.08, 0.2) * np.cos(k * ANGLES + rng.uniform(0, 2 * np.pi))
             for k in (2, 3, 4, 5)]  # fmt: skip
    return np.asarray(rng.uniform(9.0, 15.0) * (1 + np.sum(waves, axis=0)))


def _radial(shape: str) -> np.ndarray:
    """Distance from the centre to the outline in each direction, at radius 1."""
    points = np.array(UNIT_OUTLINES[shape]) * EXTENT[shape]
    nexts = np.roll(points, -1, axis=0)
    edge = nexts - points
    rays = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    # Cramer's rule for point + t * edge = r * ray, for every ray and edge at once.
    det = edge[None, :, 1] * rays[:, None, 0] - edge[None, :, 0] * rays[:, None, 1]
    cross = points[:, 0] * edge[:, 1] - points[:, 1] * edge[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        r = cross[None] / det
        t = (points[None, :, 1] * rays[:, None, 0] - points[None, :, 0] * rays[:, None, 1]) / -det
    hit = (r > 0) & (t >= -1e-9) & (t <= 1 + 1e-9)
    return np.where(hit, r, 0.0).max(axis=1)


def _paint(radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, y = 32 + rng.uniform(-8, 8, 2)
    points = list(zip(x + radius * np.cos(ANGLES), y + radius * np.sin(ANGLES), strict=True))
    alpha = np.asarray(mask(points, 64), dtype=np.float64)[..., None] / 255
    fill = np.array(COLOURS[str(rng.choice(list(COLOURS)))])
    background = np.array(BACKGROUNDS[str(rng.choice(list(BACKGROUNDS)))])
    return np.asarray(np.round(alpha * fill + (1 - alpha) * background), dtype=np.uint8)
