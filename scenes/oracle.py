"""The oracle: detects the objects of an image and checks them against a prompt.

Detection uses no neural network. The background is the border's colour, objects are connected
components, colours are the nearest of the palette, and shapes are matched with templates. The main
trade-off is in MAX_MISFIT and MIN_MARGIN: a shape is accepted only if it fits well, and clearly
better than all others, so blobs do not pass. With these limits at least 98 % of the objects keep
their shape after the embedded VAE's round trip (tests/scenes).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image
from scipy import ndimage

from latent_t2i.scenes.draw import UNIT_OUTLINES, mask
from latent_t2i.scenes.world import (
    AXIS,
    BACKGROUNDS,
    CANVAS_PX,
    COLOURS,
    EXTENT,
    PLACE_OFFSET_PX,
    RGB,
    SHAPES,
    SIZE_LIMIT_PX,
    Scene,
)

FOREGROUND_DISTANCE = 40.0
"""Minimum RGB distance of an object's pixel from the background."""
FOREGROUND_SHARE = 0.4
"""The same as a share of the largest distance nearby, so that soft edges do not join objects."""
_NEARBY_PX = 9
COLOUR_DISTANCE = 50.0
"""Maximum RGB distance from a palette colour."""
MIN_AREA_PX = 24.0
"""Smaller components are ignored."""
MAX_MISFIT = 0.16
"""Maximum misfit: one minus the intersection over union of object and template."""
MIN_MARGIN = 0.075
"""Minimum difference to the misfit of the second best template."""
_CROP = 32
_REACH = 1.75
"""Half the side of a crop, in equal-area radii."""


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """An object of an image; shape or colour is None if it matches none."""

    shape: str | None
    colour: str | None
    size: str | None
    x_px: float
    y_px: float
    misfit: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class DetectedScene:
    """The detections of one image, the largest object first."""

    background: str | None
    objects: tuple[DetectedObject, ...]


def detect(images: np.ndarray) -> list[DetectedScene]:
    """Detects the objects of uint8 RGB images (B, H, W, 3), which are resized to 64 pixels.

    Raises ValueError for another dtype or shape.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 (B, H, W, 3)"
        )
    if images.shape[1:3] != (CANVAS_PX, CANVAS_PX):
        images = np.stack([_resize(image) for image in images])
    return [_detect_one(image) for image in images]


def check(scene: Scene, detected: DetectedScene, mentions: Iterable[str] = ()) -> dict[str, bool]:
    """Checks an image's detections against `scene`, attribute by attribute.

    For one object: `count`, `shape`, `colour`, `shape_and_colour`. For more: `count`, `shapes`,
    `colours`, `shapes_and_colours`, `relation`, `shapes_colours_relation`. In both cases `size`,
    `place` and `background` if they are in `mentions`, and `all`. If the number of objects is
    wrong, everything except the background is False.
    """
    mentioned = set(mentions)
    checks = {"count": len(detected.objects) == len(scene.objects)}
    order = _match(scene, detected) if checks["count"] else None
    checks |= _check_objects(scene, order)
    if "size" in mentioned:
        checks["size"] = order is not None and all(
            found.size == item.size for item, found in zip(scene.objects, order, strict=True)
        )
    if "place" in mentioned:
        checks["place"] = order is not None and _place(order[0]) == scene.place
    if "background" in mentioned:
        checks["background"] = detected.background == scene.background
    checks["all"] = all(checks.values())
    return checks


def _resize(image: np.ndarray) -> np.ndarray:
    size = (CANVAS_PX, CANVAS_PX)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _detect_one(pixels: np.ndarray) -> DetectedScene:
    image = pixels.astype(np.float64)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    distance = np.sqrt(np.square(image - background).sum(-1))
    nearby = ndimage.maximum_filter(distance, _NEARBY_PX)
    foreground = distance > np.maximum(FOREGROUND_DISTANCE, FOREGROUND_SHARE * nearby)
    labels, _ = ndimage.label(foreground)
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    big = [int(n) for n, area in zip(numbers, areas, strict=True) if area >= MIN_AREA_PX]
    found = [_detect_object(image, background, labels == number) for number in big]
    found.sort(key=lambda pair: -pair[0])
    return DetectedScene(
        background=_nearest(background, BACKGROUNDS), objects=tuple(item for _, item in found)
    )


def _nearest(rgb: np.ndarray, palette: dict[str, RGB]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(c))) for name, c in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= COLOUR_DISTANCE else None


def _detect_object(
    image: np.ndarray, background: np.ndarray, region: np.ndarray
) -> tuple[float, DetectedObject]:
    """Returns an object's area and attributes."""
    inner = ndimage.binary_erosion(region)  # without the antialiased edge
    fill = np.median(image[inner if inner.any() else region], axis=0)
    alpha = _coverage(image, background, fill, region)
    area, x, y = _moments(alpha)
    shape, misfit, margin = _best_shape(_normalise(alpha, x, y, area), area)
    size = None
    if shape is not None:
        unit_area, unit_centroid_y = _unit_moments(shape)
        radius = float(np.sqrt(area / unit_area) / EXTENT[shape])
        size = "small" if radius < SIZE_LIMIT_PX else "large"
        # From the centre of mass to the centre of the bounding box, which a scene stores.
        y -= unit_centroid_y * EXTENT[shape] * radius
    found = DetectedObject(shape=shape, colour=_nearest(fill, COLOURS), size=size, x_px=x, y_px=y,
                  misfit=misfit, margin=margin)  # fmt: skip
    return area, found


def _coverage(
    image: np.ndarray, background: np.ndarray, fill: np.ndarray, region: np.ndarray
) -> np.ndarray:
    """Returns the share of each pixel that the object covers, 0 to 1."""
    near = ndimage.binary_dilation(region, structure=np.ones((3, 3)))
    direction = fill - background
    share = (image - background) @ direction / max(float(direction @ direction), 1.0)
    return np.clip(share, 0.0, 1.0) * near


def _moments(alpha: np.ndarray) -> tuple[float, float, float]:
    """Returns the area and the centre of mass, x and y."""
    area = float(alpha.sum())
    ys, xs = np.mgrid[: len(alpha), : len(alpha)] + 0.5
    return area, float((alpha * xs).sum() / area), float((alpha * ys).sum() / area)


def _normalise(alpha: np.ndarray, x_px: float, y_px: float, area_px: float) -> np.ndarray:
    """Resamples the object into a crop around its centre, scaled by its area."""
    reach = _REACH * np.sqrt(area_px / np.pi)
    steps = (np.arange(_CROP) + 0.5) / _CROP * 2 - 1
    rows, columns = y_px - 0.5 + reach * steps, x_px - 0.5 + reach * steps
    points = np.meshgrid(rows, columns, indexing="ij")
    return np.asarray(ndimage.map_coordinates(alpha, points, order=1))


def _best_shape(crop: np.ndarray, area_px: float) -> tuple[str | None, float, float]:
    """Returns the accepted shape or None, its misfit, and the margin to the next best."""
    stack = _templates(round(float(np.sqrt(area_px / np.pi)) * 2))  # (S, crop, crop)
    union = np.maximum(stack, crop).sum((1, 2))
    misfits = 1 - np.minimum(stack, crop).sum((1, 2)) / union
    order = np.argsort(misfits)
    misfit, margin = float(misfits[order[0]]), float(misfits[order[1]] - misfits[order[0]])
    accepted = misfit <= MAX_MISFIT and margin >= MIN_MARGIN
    return SHAPES[order[0]] if accepted else None, misfit, margin


@cache
def _unit_moments(shape: str) -> tuple[float, float]:
    """Returns the area and the y of the centre of mass of a shape's unit outline."""
    points = np.array(UNIT_OUTLINES[shape])
    ahead = np.roll(points, -1, axis=0)
    cross = points[:, 0] * ahead[:, 1] - ahead[:, 0] * points[:, 1]
    centroid_y = ((points[:, 1] + ahead[:, 1]) * cross).sum() / (3 * cross.sum())
    return float(abs(cross.sum()) / 2), float(centroid_y)


@cache
def _templates(double_radius: int) -> np.ndarray:
    """Returns every shape at equal-area radius `double_radius` / 2.  # (S, crop, crop)"""
    radius = max(double_radius, 4) / 2
    return np.stack([_template(shape, radius) for shape in SHAPES])


def _template(shape: str, radius_px: float) -> np.ndarray:
    half_width = radius_px * np.sqrt(np.pi / _unit_moments(shape)[0])
    crops = []
    # An average over sub-pixel positions, normalised in the same way as a detected object.
    for dx, dy in ((0.0, 0.0), (0.25, 0.5), (0.5, 0.25), (0.75, 0.75)):
        points = [(32 + dx + half_width * x, 32 + dy + half_width * y)
                  for x, y in UNIT_OUTLINES[shape]]  # fmt: skip
        alpha = np.asarray(mask(points, CANVAS_PX), dtype=np.float64) / 255
        area, x, y = _moments(alpha)
        crops.append(_normalise(alpha, x, y, area))
    return np.asarray(np.mean(crops, axis=0))


def _match(scene: Scene, detected: DetectedScene) -> tuple[DetectedObject, ...]:
    """Returns the detected objects in the scene's order.

    The order has the most shapes and colours right, and among those the relation if possible.
    """

    def score(order: tuple[DetectedObject, ...]) -> tuple[int, bool]:
        pairs = zip(scene.objects, order, strict=True)
        num_right = sum((a.shape == b.shape) + (a.colour == b.colour) for a, b in pairs)
        return num_right, _relations_hold(scene, order)

    return max(permutations(detected.objects), key=score)


def _check_objects(scene: Scene, order: tuple[DetectedObject, ...] | None) -> dict[str, bool]:
    pairs = list(zip(scene.objects, order, strict=True)) if order else []
    shapes = bool(pairs) and all(a.shape == b.shape for a, b in pairs)
    colours = bool(pairs) and all(a.colour == b.colour for a, b in pairs)
    if len(scene.objects) == 1:
        return {"shape": shapes, "colour": colours, "shape_and_colour": shapes and colours}
    relation = order is not None and _relations_hold(scene, order)
    return {
        "shapes": shapes,
        "colours": colours,
        "shapes_and_colours": shapes and colours,
        "relation": relation,
        "shapes_colours_relation": shapes and colours and relation,
    }


def _relations_hold(scene: Scene, order: tuple[DetectedObject, ...]) -> bool:
    return all(_relation_holds(order[a], name, order[b]) for a, name, b in scene.relations())


def _relation_holds(first: DetectedObject, relation: str, second: DetectedObject) -> bool:
    dx, dy = first.x_px - second.x_px, first.y_px - second.y_px
    side_x, side_y = AXIS[relation]
    along = dx * side_x + dy * side_y
    across = abs(dy if side_x else dx)
    # With three objects the single one is diagonally above or below each of the pair.
    return along > 0 and along >= 0.5 * across


def _place(found: DetectedObject) -> str:
    dx, dy = found.x_px - CANVAS_PX / 2, found.y_px - CANVAS_PX / 2
    if max(abs(dx), abs(dy)) < PLACE_OFFSET_PX:
        return "middle"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"
