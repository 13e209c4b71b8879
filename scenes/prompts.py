"""Prompts with the scene that each asks for, for judging a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from latent_t2i.scenes.captions import captions
from latent_t2i.scenes.world import WORLDS, Scene, Split, make_scene

Kind = Literal["single", "pair", "held_out"]
KINDS: tuple[Kind, ...] = ("single", "pair", "held_out")
_PROMPT_SEED = 7_919
"""Keeps prompts apart from the scenes of every split, whatever the seed."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption, its scene, and the attributes beyond shape and colour that it tells."""

    text: str
    scene: Scene
    mentions: frozenset[str]


def make(world_name: str, kind: Kind, num: int, seed: int) -> list[Prompt]:
    """`num` prompts: one object, two objects, or one object of a composition kept from training."""
    world = WORLDS[world_name]
    split: Split = "held_out" if kind == "held_out" else "val"
    prompts = []
    for index in range(num):
        rng = np.random.default_rng([_PROMPT_SEED, seed, KINDS.index(kind), index])
        scene = make_scene(world, rng, split, num_things=2 if kind == "pair" else 1)
        caption = captions(scene, world, rng)[0]
        prompts.append(Prompt(text=caption.text, scene=scene, mentions=caption.mentions))
    return prompts
