"""Reads a picture back into background, objects and relations, and judges it against a caption.

The reading is by construction, not by a network: estimate the background from the border, cut out
connected objects, name each one's fill by the nearest palette colour, and compare its outline,
centred and scaled, with every shape drawn at the same size. An object is only given a shape if it
is close enough to one *and* clearly closer to it than to any other; otherwise its shape is None. A
reader without that rule flatters a model that draws blobs. The two limits were set so that at
least 98 % of objects survive the embedded VAE's round trip, and checked on blobs, noise and morphs
(tests/scenes, docs/results.md).
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
    Thing,
)

FOREGROUND_DISTANCE = 40.0
"""Smallest RGB distance from the background at which a pixel belongs to an object."""
FOREGROUND_SHARE = 0.4
"""Smallest share of the largest distance nearby: a soft edge must not join two objects."""
_NEARBY_PX = 9
COLOUR_DISTANCE = 50.0
"""Furthest an object's or background's colour may be from its name's."""
MIN_AREA_PX = 24.0
"""Smaller components are specks, not objects."""
MAX_MISFIT = 0.16
"""Largest area between outline and template, as a share of their union."""
MIN_MARGIN = 0.075
"""How much worse the next best shape must fit."""
_CROP = 32
_REACH = 1.75
"""A crop spans this many equal-area radii to each side."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object read from a picture; shape or colour is None where it resembles none."""

    shape: str | None
    colour: str | None
    size: str | None
    x_px: float
    y_px: float
    misfit: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All that was read from one picture, the largest object first."""

    background: str | None
    things: tuple[Found, ...]


def read(images: np.ndarray) -> list[Reading]:
    """Read uint8 RGB pictures.  # (B, H, W, 3)

    Other sizes than 64 pixels are resized first.

    Raises:
        ValueError: not a uint8 array of that shape.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"pictures are {images.dtype} of shape {images.shape}, expected uint8 (B, H, W, 3)"
        )
    if images.shape[1:3] != (CANVAS_PX, CANVAS_PX):
        images = np.stack([_resize(image) for image in images])
    grounds = [_background(image) for image in images]
    return [
        _read_one(image.astype(np.float64), ground)
        for image, ground in zip(images, grounds, strict=True)
    ]


def check(scene: Scene, reading: Reading, mentions: Iterable[str] = ()) -> dict[str, bool]:
    """Whether the picture fulfils what a caption of `scene` asks, attribute by attribute.

    Always: `count`, `shape`, `colour`, `shape_and_colour` for one object; `shapes`, `colours`,
    `shapes_and_colours`, `relation`, `shapes_colours_relation` for more. `size`, `place` and
    `background` when the caption mentions them. `all` is all of these. A picture with more or
    fewer objects than asked for fails on everything but the background.
    """
    told = set(mentions)
    verdict = {"count": len(reading.things) == len(scene.things)}
    order = _match(scene, reading) if verdict["count"] else None
    verdict |= _looks(scene, order)
    if "size" in told:
        verdict["size"] = order is not None and all(
            found.size == thing.size for thing, found in zip(scene.things, order, strict=True)
        )
    if "place" in told:
        verdict["place"] = order is not None and _place(order[0]) == scene.place
    if "background" in told:
        verdict["background"] = reading.background == scene.background
    verdict["all"] = all(verdict.values())
    return verdict


def _resize(image: np.ndarray) -> np.ndarray:
    size = (CANVAS_PX, CANVAS_PX)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _background(image: np.ndarray) -> np.ndarray:
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.median(edge, axis=0).astype(np.float64)


def _read_one(image: np.ndarray, ground: np.ndarray) -> Reading:
    distance = np.sqrt(np.square(image - ground).sum(-1))
    nearby = ndimage.maximum_filter(distance, _NEARBY_PX)
    foreground = distance > np.maximum(FOREGROUND_DISTANCE, FOREGROUND_SHARE * nearby)
    labels, _ = ndimage.label(foreground)
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    big = [int(n) for n, area in zip(numbers, areas, strict=True) if area >= MIN_AREA_PX]
    things = [_read_thing(image, ground, labels == number) for number in big]
    ranked = sorted(things, key=lambda pair: -pair[0])
    return Reading(
        background=_nearest(ground, BACKGROUNDS), things=tuple(found for _, found in ranked)
    )


def _nearest(rgb: np.ndarray, palette: dict[str, RGB]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(c))) for name, c in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= COLOUR_DISTANCE else None


def _read_thing(image: np.ndarray, ground: np.ndarray, region: np.ndarray) -> tuple[float, Found]:
    inner = ndimage.binary_erosion(region)
    fill = np.median(image[inner if inner.any() else region], axis=0)
    alpha = _coverage(image, ground, fill, region)
    area = float(alpha.sum())
    ys, xs = np.mgrid[: len(alpha), : len(alpha)] + 0.5
    x, y = float((alpha * xs).sum() / area), float((alpha * ys).sum() / area)
    shape, misfit, margin = _best_shape(_normalise(alpha, x, y, area), area)
    size = None
    if shape is not None:  # from the centre of mass to the centre of the bounding box
        radius = equal_radius(shape, area)
        size = "small" if radius < SIZE_LIMIT_PX else "large"
        y -= _unit_centroid_y(shape) * EXTENT[shape] * radius
    found = Found(shape=shape, colour=_nearest(fill, COLOURS), size=size, x_px=x, y_px=y,
                  misfit=misfit, margin=margin)  # fmt: skip
    return area, found


def _coverage(
    image: np.ndarray, ground: np.ndarray, fill: np.ndarray, region: np.ndarray
) -> np.ndarray:
    """How much of each pixel the object covers: its place between background and fill, 0 to 1."""
    near = ndimage.binary_dilation(region, structure=np.ones((3, 3)))
    direction = fill - ground
    share = (image - ground) @ direction / max(float(direction @ direction), 1.0)
    return np.clip(share, 0.0, 1.0) * near


def _normalise(alpha: np.ndarray, x_px: float, y_px: float, area_px: float) -> np.ndarray:
    """The object centred in a square of 1.75 equal-area radii to each side."""
    reach = _REACH * np.sqrt(area_px / np.pi)
    steps = (np.arange(_CROP) + 0.5) / _CROP * 2 - 1
    rows, columns = y_px - 0.5 + reach * steps, x_px - 0.5 + reach * steps
    points = np.meshgrid(rows, columns, indexing="ij")
    return np.asarray(ndimage.map_coordinates(alpha, points, order=1))


def _best_shape(crop: np.ndarray, area_px: float) -> tuple[str | None, float, float]:
    """The accepted shape or None, its misfit, and its lead over the next best."""
    stack = _templates(round(float(np.sqrt(area_px / np.pi)) * 2))  # (S, crop, crop)
    union = np.maximum(stack, crop).sum((1, 2))
    misfits = 1 - np.minimum(stack, crop).sum((1, 2)) / union
    order = np.argsort(misfits)
    misfit, margin = float(misfits[order[0]]), float(misfits[order[1]] - misfits[order[0]])
    accepted = misfit <= MAX_MISFIT and margin >= MIN_MARGIN
    return SHAPES[order[0]] if accepted else None, misfit, margin


def equal_radius(shape: str, area_px: float) -> float:
    """The radius at which a shape covers that area."""
    return float(np.sqrt(area_px / _unit_area(shape)) / EXTENT[shape])


@cache
def _unit_area(shape: str) -> float:
    points = np.array(UNIT_OUTLINES[shape])
    ahead = np.roll(points, -1, axis=0)
    return float(abs((points[:, 0] * ahead[:, 1] - ahead[:, 0] * points[:, 1]).sum()) / 2)


@cache
def _unit_centroid_y(shape: str) -> float:
    """How far below its box's centre a shape's centre of mass lies, the half height being 1."""
    points = np.array(UNIT_OUTLINES[shape])
    ahead = np.roll(points, -1, axis=0)
    cross = points[:, 0] * ahead[:, 1] - ahead[:, 0] * points[:, 1]
    return float(((points[:, 1] + ahead[:, 1]) * cross).sum() / (3 * cross.sum()))


@cache
def _templates(double_radius: int) -> np.ndarray:
    """Every shape at an equal-area radius of `double_radius` / 2 pixels, averaged over sub-pixel
    positions and put through the very same normalisation as what is read.  # (S, crop, crop)
    """
    radius = max(double_radius, 4) / 2
    return np.stack([_template(shape, radius) for shape in SHAPES])


def _template(shape: str, radius_px: float) -> np.ndarray:
    half_width = radius_px * np.sqrt(np.pi / _unit_area(shape))
    crops = []
    for dx, dy in ((0.0, 0.0), (0.25, 0.5), (0.5, 0.25), (0.75, 0.75)):
        points = [(32 + dx + half_width * x, 32 + dy + half_width * y)
                  for x, y in UNIT_OUTLINES[shape]]  # fmt: skip
        alpha = np.asarray(mask(points, CANVAS_PX), dtype=np.float64) / 255
        area = float(alpha.sum())
        ys, xs = np.mgrid[:CANVAS_PX, :CANVAS_PX] + 0.5
        x, y = float((alpha * xs).sum() / area), float((alpha * ys).sum() / area)
        crops.append(_normalise(alpha, x, y, area))
    return np.asarray(np.mean(crops, axis=0))


def _match(scene: Scene, reading: Reading) -> tuple[Found, ...]:
    """The found objects in the scene's order: the assignment with most shapes and colours right,
    then with the relation right."""

    def score(order: tuple[Found, ...]) -> tuple[int, bool]:
        pairs = list(zip(scene.things, order, strict=True))
        looks = sum(_same_shape(*pair) + _same_colour(*pair) for pair in pairs)
        return looks, _relations_hold(scene, order)

    return max(permutations(reading.things), key=score)


def _looks(scene: Scene, order: tuple[Found, ...] | None) -> dict[str, bool]:
    pairs = list(zip(scene.things, order, strict=True)) if order else []
    shapes = bool(pairs) and all(_same_shape(*pair) for pair in pairs)
    colours = bool(pairs) and all(_same_colour(*pair) for pair in pairs)
    if len(scene.things) == 1:
        return {"shape": shapes, "colour": colours, "shape_and_colour": shapes and colours}
    relation = order is not None and _relations_hold(scene, order)
    return {
        "shapes": shapes,
        "colours": colours,
        "shapes_and_colours": shapes and colours,
        "relation": relation,
        "shapes_colours_relation": shapes and colours and relation,
    }


def _same_shape(thing: Thing, found: Found) -> bool:
    return found.shape == thing.shape


def _same_colour(thing: Thing, found: Found) -> bool:
    return found.colour == thing.colour


def _relations_hold(scene: Scene, order: tuple[Found, ...]) -> bool:
    return all(_stands(order[a], relation, order[b]) for a, relation, b in scene.relations())


def _stands(first: Found, relation: str, second: Found) -> bool:
    """Whether `first` is on the named side of `second`.

    Of two objects the named axis is the longer one; of three a lone object stands diagonally above
    the pair, so half as much as the other axis is enough.
    """
    dx, dy = first.x_px - second.x_px, first.y_px - second.y_px
    side_x, side_y = AXIS[relation]
    along = dx * side_x + dy * side_y
    across = abs(dy if side_x else dx)
    return along > 0 and along >= 0.5 * across


def _place(found: Found) -> str:
    dx, dy = found.x_px - CANVAS_PX / 2, found.y_px - CANVAS_PX / 2
    if max(abs(dx), abs(dy)) < PLACE_OFFSET_PX:
        return "middle"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"
