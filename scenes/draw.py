"""Scenes to pictures, with Pillow, drawn four times too large and averaged down (antialiasing)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from latent_t2i.scenes.world import BACKGROUNDS, CANVAS_PX, COLOURS, Scene, Thing

SUPERSAMPLE = 4


def draw(scene: Scene, image_size_px: int = CANVAS_PX) -> Image.Image:
    """The scene as an RGB picture of `image_size_px` squared."""
    scale = image_size_px * SUPERSAMPLE / CANVAS_PX
    side = image_size_px * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        pen.polygon([(x * scale, y * scale) for x, y in outline(thing)], fill=COLOURS[thing.colour])
    return canvas.resize((image_size_px, image_size_px), Image.Resampling.BOX)


def mask(points: Sequence[tuple[float, float]], size_px: int) -> Image.Image:
    """A polygon's coverage as a grey picture of `size_px` squared, 0 to 255."""
    side = size_px * SUPERSAMPLE
    canvas = Image.new("L", (side, side), 0)
    scaled = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]
    ImageDraw.Draw(canvas).polygon(scaled, fill=255)
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The object's outline as a polygon in pixels of a 64-pixel picture."""
    return [
        (thing.x_px + thing.extent_px * x, thing.y_px + thing.extent_px * y)
        for x, y in UNIT_OUTLINES[thing.shape]
    ]


def _regular(corners: int, start_deg: float, radii: Sequence[float] = (1.0,)) -> list:
    angles = [math.radians(start_deg + 360.0 * i / corners) for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


_ARM = 0.36
# fmt: off
UNIT_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(72, 0.0),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -0.92), (1, 0.88), (-1, 0.88)],
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM),
              (-_ARM, -_ARM)],
    "star": _regular(10, -90.0, (1.0, 0.48)),
    "diamond": [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)],
}
# fmt: on
"""Each shape in the box from -1 to 1, y downwards."""
