"""Scenes of coloured shapes: what they can contain, and which compositions are held out.

A scene has one, two or three objects. One object has a place; two have a relation along one axis;
three are one object above or below a pair. Objects never touch each other or the border, so the
oracle can recover a scene from its image. Lengths are in pixels of a 64-pixel image; other image
sizes scale them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np

CANVAS_PX = 64
MARGIN_PX = 1.0
GAP_PX = 4.0

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (243, 130, 20),
    "yellow": (250, 210, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 215),
    "purple": (135, 55, 175),
    "pink": (245, 135, 185),
    "cyan": (60, 200, 215),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (246, 246, 246),
    "gray": (132, 136, 142),
    "black": (22, 22, 26),
    "brown": (96, 66, 44),
}

# Half a bounding box's width as a multiple of the object's radius; the values make shapes of equal
# radius look about equally large.
EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.1, "cross": 1.05, "star": 1.15,
          "diamond": 1.15}  # fmt: skip
SHAPES = tuple(EXTENT)
SIZES_PX: dict[str, tuple[float, float]] = {"small": (9.25, 10.25), "large": (12.5, 15.5)}
SIZE_LIMIT_PX = 11.0
"""The radius that separates small from large."""
PAIR_LARGE_PX = (11.75, 12.25)
"""The radii of large objects in a pair: larger ones would not fit side by side."""

PLACES = ("left", "right", "top", "bottom", "middle")
PLACE_OFFSET_PX = 7.0
"""The distance from the image's centre at which an object is no longer in the middle."""
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
AXIS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""The direction from the second object to the first as (x, y), y pointing down."""

# fmt: off
HELD_OUT_COMBINATIONS = frozenset({
    ("circle", "purple"), ("square", "yellow"), ("triangle", "blue"), ("cross", "red"),
    ("star", "green"), ("diamond", "orange"),
})
"""Pairs of shape and colour that no training scene contains."""
HELD_OUT_RELATIONS = frozenset({
    ("circle", "above", "triangle"), ("square", "left of", "cross"), ("star", "above", "diamond"),
})
"""Relations between shapes that no training scene contains, in either direction."""
# fmt: on

Split = Literal["train", "val", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "val", "held_out")


@dataclass(frozen=True, kw_only=True)
class World:
    """A scene distribution; `counts` are the relative frequencies of 1, 2 and 3 objects."""

    name: str
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    sizes: tuple[str, ...]
    counts: tuple[float, float, float]


WORLDS = {
    "easy": World(
        name="easy",
        shapes=SHAPES[:4],
        colours=tuple(COLOURS)[:6],
        backgrounds=tuple(BACKGROUNDS)[:3],
        sizes=("large",),
        counts=(0.5, 0.5, 0.0),
    ),
    "full": World(
        name="full",
        shapes=SHAPES,
        colours=tuple(COLOURS),
        backgrounds=tuple(BACKGROUNDS),
        sizes=("small", "large"),
        counts=(0.5, 0.4, 0.1),
    ),
}


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object: its centre and radius in pixels of a 64-pixel image, y pointing down."""

    shape: str
    colour: str
    size: str
    x_px: float
    y_px: float
    radius_px: float

    @property
    def extent_px(self) -> float:
        """Half the width of the bounding box."""
        return EXTENT[self.shape] * self.radius_px


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects on a background.

    A single object has a `place`. With two objects, `relation` is that of the first to the second.
    With three, it is that of the first to the other two ("above" or "below"), and the second is
    left of the third.
    """

    background: str
    objects: tuple[SceneObject, ...]
    place: str | None = None
    relation: str | None = None

    def relations(self) -> Iterator[tuple[int, str, int]]:
        """Yields every true (index, relation, index), each pair in one direction."""
        if self.relation is None:
            return
        for other in range(1, len(self.objects)):
            yield 0, self.relation, other
        if len(self.objects) == 3:
            yield 1, "left of", 2


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a composition that is held out from training."""
    if any((item.shape, item.colour) in HELD_OUT_COMBINATIONS for item in scene.objects):
        return True
    shapes = [item.shape for item in scene.objects]
    return any(
        (shapes[a], relation, shapes[b]) in HELD_OUT_RELATIONS
        or (shapes[b], INVERSE[relation], shapes[a]) in HELD_OUT_RELATIONS
        for a, relation, b in scene.relations()
    )


def make_scene(
    world: World, rng: np.random.Generator, split: Split, num_objects: int | None = None
) -> Scene:
    """Samples a scene; `num_objects` overrides the random number of objects.

    Scenes of train and val contain no held-out composition; every scene of held_out contains one.
    """
    while True:
        num = num_objects or 1 + int(rng.choice(3, p=np.array(world.counts) / sum(world.counts)))
        scene = (_make_single, _make_pair, _make_triple)[num - 1](world, rng)
        if is_held_out(scene) == (split == "held_out"):
            return scene


def stream(world: World, split: Split, seed: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Yields endless scenes of a split, each with the random generator for its captions.

    Scene i depends only on the world, the split, the seed and i.
    """
    for index in count():
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        yield make_scene(world, rng, split), rng


def _appearance(world: World, rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(world.shapes)), str(rng.choice(world.colours))


def _object(
    appearance: tuple[str, str], size: str, radius_px: float, x_px: float, y_px: float
) -> SceneObject:
    shape, colour = appearance
    x_px, y_px, radius_px = round(x_px, 2), round(y_px, 2), round(radius_px, 2)
    return SceneObject(
        shape=shape, colour=colour, size=size, x_px=x_px, y_px=y_px, radius_px=radius_px
    )


def _make_single(world: World, rng: np.random.Generator) -> Scene:
    appearance, size = _appearance(world, rng), str(rng.choice(world.sizes))
    radius = rng.uniform(*SIZES_PX[size])
    place = str(rng.choice(PLACES))
    directions = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
    furthest = CANVAS_PX / 2 - MARGIN_PX - EXTENT[appearance[0]] * radius
    offset = rng.uniform(-3.0, 3.0, size=2)
    if place != "middle":
        along = rng.uniform(min(PLACE_OFFSET_PX + 3.0, furthest), min(furthest, 18.0))
        axis = np.array(directions[place])
        offset = np.where(axis != 0, axis * along, offset)
    x, y = CANVAS_PX / 2 + offset
    item = _object(appearance, size, radius, float(x), float(y))
    return Scene(background=str(rng.choice(world.backgrounds)), objects=(item,), place=place)


def _make_pair(world: World, rng: np.random.Generator) -> Scene:
    looks = [_appearance(world, rng), _appearance(world, rng)]
    sizes = [str(rng.choice(world.sizes)) for _ in looks]
    radii = [rng.uniform(*(PAIR_LARGE_PX if size == "large" else SIZES_PX[size])) for size in sizes]
    extents = [EXTENT[look[0]] * radius for look, radius in zip(looks, radii, strict=True)]
    relation = str(rng.choice(RELATIONS))
    axis = np.array(AXIS[relation])
    # The free space along the axis is split at random into before, between and after the objects.
    slack = CANVAS_PX - 2 * MARGIN_PX - GAP_PX - 2 * sum(extents)
    before, between, _ = rng.dirichlet((2.0, 1.0, 2.0)) * slack
    near, far = (0, 1) if axis.sum() < 0 else (1, 0)
    along = [0.0, 0.0]
    along[near] = MARGIN_PX + before + extents[near]
    along[far] = along[near] + extents[near] + GAP_PX + between + extents[far]
    across = CANVAS_PX / 2 + rng.uniform(-4.0, 4.0, size=2)
    objects = []
    for i in range(2):
        x, y = (along[i], float(across[i])) if axis[0] else (float(across[i]), along[i])
        objects.append(_object(looks[i], sizes[i], radii[i], x, y))
    background = str(rng.choice(world.backgrounds))
    return Scene(background=background, objects=tuple(objects), relation=relation)


def _make_triple(world: World, rng: np.random.Generator) -> Scene:
    relation = str(rng.choice(("above", "below")))
    rows = (17.0, 47.0) if relation == "above" else (47.0, 17.0)
    centres = [(32.0, rows[0]), (16.5, rows[1]), (47.5, rows[1])]
    objects = []
    for x, y in centres:
        appearance, radius = _appearance(world, rng), rng.uniform(*SIZES_PX["small"])
        dx, dy = rng.uniform(-2.0, 2.0, size=2)
        objects.append(_object(appearance, "small", radius, x + float(dx), y + float(dy)))
    background = str(rng.choice(world.backgrounds))
    return Scene(background=background, objects=tuple(objects), relation=relation)
