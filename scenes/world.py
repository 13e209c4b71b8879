"""What a scene may hold: shapes, colours, sizes, places, relations, and which of their
combinations are never seen in training.

Lengths are in pixels of a 64-pixel picture and scale with the picture. A scene has one, two or
three objects. One object has a place; two have a relation along one axis; three are one object
above or below a pair side by side. Objects never touch each other or the border, so that a drawn
picture can be read back without ambiguity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, count
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

# Half the extent of a shape's bounding box as a multiple of an object's radius, chosen so that
# shapes of one radius look about equally large.
EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.1, "cross": 1.05, "star": 1.15,
          "diamond": 1.15}  # fmt: skip
SHAPES = tuple(EXTENT)
SIZES_PX: dict[str, tuple[float, float]] = {"small": (9.25, 10.25), "large": (12.5, 15.5)}
SIZE_LIMIT_PX = 11.0
"""A radius below this is small, one above it large."""
PAIR_LARGE_PX = (11.75, 12.25)
"""Two large objects side by side must fit, so they are drawn from the low end."""

PLACES = ("left", "right", "top", "bottom", "middle")
PLACE_OFFSET_PX = 7.0
"""An object whose centre is further than this from the picture's centre is not in the middle."""
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
AXIS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first object stands, seen from the second, as (x, y) with y downwards."""

HELD_OUT_COMBINATIONS = frozenset(
    {
        ("circle", "purple"),
        ("square", "yellow"),
        ("triangle", "blue"),
        ("cross", "red"),
        ("star", "green"),
        ("diamond", "orange"),
    }
)
"""Shape and colour that never meet in a training scene."""
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "above", "triangle"),
        ("square", "left of", "cross"),
        ("star", "above", "diamond"),
    }
)
"""Shape, relation, shape (or the inverse told from the other side) never seen in training."""

Split = Literal["train", "val", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "val", "held_out")


@dataclass(frozen=True, kw_only=True)
class World:
    """What may be drawn. `counts` gives the relative frequency of 1, 2 and 3 objects."""

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
class Thing:
    """One object: centre and radius in pixels of a 64-pixel picture, y downwards."""

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

    One object has a `place`. Of two objects the first stands in `relation` to the second; of three
    the first stands in `relation` ("above" or "below") to the other two, the second of which is
    left of the third.
    """

    background: str
    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None

    def relations(self) -> Iterator[tuple[int, str, int]]:
        """Every (index, relation, index) that a caption may tell."""
        if self.relation is None:
            return
        for other in range(1, len(self.things)):
            yield 0, self.relation, other
        if len(self.things) == 3:
            yield 1, "left of", 2


def is_held_out(scene: Scene) -> bool:
    """Whether any of the scene's compositions is kept from training."""
    if any((thing.shape, thing.colour) in HELD_OUT_COMBINATIONS for thing in scene.things):
        return True
    shapes = [thing.shape for thing in scene.things]
    return any(
        (shapes[a], relation, shapes[b]) in HELD_OUT_RELATIONS
        or (shapes[b], INVERSE[relation], shapes[a]) in HELD_OUT_RELATIONS
        for a, relation, b in scene.relations()
    )


def make_scene(
    world: World, rng: np.random.Generator, split: Split, num_things: int | None = None
) -> Scene:
    """One scene of `split` at random; `num_things` fixes the number of objects.

    Scenes of train and val hold no held-out composition; every scene of held_out holds one.
    """
    while True:
        num = num_things or 1 + int(rng.choice(3, p=np.array(world.counts) / sum(world.counts)))
        scene = (_make_single, _make_pair, _make_triple)[num - 1](world, rng)
        if is_held_out(scene) == (split == "held_out"):
            return scene


def stream(world: World, split: Split, seed: int) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Endless scenes of a split with the generator that also words their captions.

    Each split has its own stream, and scene number i is the same however many are taken.
    """
    for index in count():
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        yield make_scene(world, rng, split), rng


def _look(world: World, rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(world.shapes)), str(rng.choice(world.colours))


def _thing(look: tuple[str, str], size: str, radius_px: float, x_px: float, y_px: float) -> Thing:
    shape, colour = look
    return Thing(shape=shape, colour=colour, size=size, x_px=round(x_px, 2), y_px=round(y_px, 2),
                 radius_px=round(radius_px, 2))  # fmt: skip


def _make_single(world: World, rng: np.random.Generator) -> Scene:
    look, size = _look(world, rng), str(rng.choice(world.sizes))
    radius = rng.uniform(*SIZES_PX[size])
    place = str(rng.choice(PLACES))
    sideways = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
    furthest = CANVAS_PX / 2 - MARGIN_PX - EXTENT[look[0]] * radius
    offset = rng.uniform(-3.0, 3.0, size=2)
    if place != "middle":
        along = rng.uniform(min(PLACE_OFFSET_PX + 3.0, furthest), min(furthest, 18.0))
        axis = np.array(sideways[place])
        offset = np.where(axis != 0, axis * along, offset)
    x, y = CANVAS_PX / 2 + offset
    thing = _thing(look, size, radius, float(x), float(y))
    return Scene(background=str(rng.choice(world.backgrounds)), things=(thing,), place=place)


def _make_pair(world: World, rng: np.random.Generator) -> Scene:
    looks = [_look(world, rng), _look(world, rng)]
    sizes = [str(rng.choice(world.sizes)) for _ in looks]
    radii = [rng.uniform(*(PAIR_LARGE_PX if size == "large" else SIZES_PX[size])) for size in sizes]
    extents = [EXTENT[look[0]] * radius for look, radius in zip(looks, radii, strict=True)]
    relation = str(rng.choice(RELATIONS))
    axis = np.array(AXIS[relation])
    # Along the axis: the slack that is left is shared out at random before, between and behind.
    slack = CANVAS_PX - 2 * MARGIN_PX - GAP_PX - 2 * sum(extents)
    before, between, _ = rng.dirichlet((2.0, 1.0, 2.0)) * slack
    near, far = (0, 1) if axis.sum() < 0 else (1, 0)
    along = [0.0, 0.0]
    along[near] = MARGIN_PX + before + extents[near]
    along[far] = along[near] + extents[near] + GAP_PX + between + extents[far]
    across = CANVAS_PX / 2 + rng.uniform(-4.0, 4.0, size=2)
    things = tuple(
        _thing(looks[i], sizes[i], radii[i], *_xy(axis, along[i], float(across[i])))
        for i in range(2)
    )
    return Scene(background=str(rng.choice(world.backgrounds)), things=things, relation=relation)


def _xy(axis: np.ndarray, along: float, across: float) -> tuple[float, float]:
    return (along, across) if axis[0] else (across, along)


def _make_triple(world: World, rng: np.random.Generator) -> Scene:
    relation = str(rng.choice(("above", "below")))
    rows = (17.0, 47.0) if relation == "above" else (47.0, 17.0)
    centres = [(32.0, rows[0]), (16.5, rows[1]), (47.5, rows[1])]
    things = []
    for x, y in centres:
        look, radius = _look(world, rng), rng.uniform(*SIZES_PX["small"])
        dx, dy = rng.uniform(-2.0, 2.0, size=2)
        things.append(_thing(look, "small", radius, x + float(dx), y + float(dy)))
    ground = str(rng.choice(world.backgrounds))
    return Scene(background=ground, things=tuple(things), relation=relation)


def touching(scene: Scene) -> bool:
    """Whether two bounding boxes of the scene overlap; drawn scenes never do."""
    return any(
        abs(a.x_px - b.x_px) < a.extent_px + b.extent_px
        and abs(a.y_px - b.y_px) < a.extent_px + b.extent_px
        for a, b in combinations(scene.things, 2)
    )
