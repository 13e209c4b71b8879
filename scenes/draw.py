"""Renders scenes with Pillow, at four times the resolution and averaged down for antialiasing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from latent_t2i.scenes.world import BACKGROUNDS, CANVAS_PX, COLOURS, Scene, SceneObject

SUPERSAMPLE = 4


def draw(scene: Scene, image_size_px: int = CANVAS_PX) -> Image.Image:
    """Renders the scene as a square RGB image."""
    side = image_size_px * SUPERSAMPLE
    scale = side / CANVAS_PX
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        pen.polygon([(x * scale, y * scale) for x, y in outline(item)], fill=COLOURS[item.colour])
    return canvas.resize((image_size_px, image_size_px), Image.Resampling.BOX)


def mask(points: Sequence[tuple[float, float]], size_px: int) -> Image.Image:
    """Renders a polygon's coverage, 0 to 255, as a square greyscale image."""
    side = size_px * SUPERSAMPLE
    canvas = Image.new("L", (side, side), 0)
    scaled = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]
    ImageDraw.Draw(canvas).polygon(scaled, fill=255)
    return canvas.resize((size_px, size_px), Image.Resampling.BOX)


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """Returns the object's outline as a polygon, in pixels of a 64-pixel image."""
    return [
        (item.x_px + item.extent_px * x, item.y_px + item.extent_px * y)
        for x, y in UNIT_OUTLINES[item.shape]
    ]


def _polygon(
    corners: int, start_deg: float, radii: Sequence[float] = (1.0,)
) -> list[tuple[float, float]]:
    """Returns corners at equal angles, their distances from the centre cycling through `radii`."""
    angles = [math.radians(start_deg + 360.0 * i / corners) for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


_ARM = 0.36
# fmt: off
UNIT_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _polygon(72, 0.0),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -0.92), (1, 0.88), (-1, 0.88)],
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM),
              (-_ARM, -_ARM)],
    "star": _polygon(10, -90.0, (1.0, 0.48)),
    "diamond": [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)],
}
# fmt: on
"""Each shape within -1 to 1, y pointing down."""
