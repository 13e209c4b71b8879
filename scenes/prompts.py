"""Evaluation prompts, each with the scene that it describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from latent_t2i.scenes.captions import captions
from latent_t2i.scenes.world import WORLDS, Scene, Split, make_scene

Kind = Literal["single", "pair", "held_out"]
KINDS: tuple[Kind, ...] = ("single", "pair", "held_out")
# Separates the prompts' random streams from those of every split, whatever the seed.
_PROMPT_SEED = 7_919


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt; the scene, and what the text mentions of it, are known for generated prompts."""

    text: str
    scene: Scene | None = None
    mentions: frozenset[str] = frozenset()


def make_prompts(world_name: str, kind: Kind, num: int, seed: int) -> list[Prompt]:
    """Returns prompts for one object, for two, or for a composition held out from training."""
    world = WORLDS[world_name]
    split: Split = "held_out" if kind == "held_out" else "val"
    prompts = []
    for index in range(num):
        rng = np.random.default_rng([_PROMPT_SEED, seed, KINDS.index(kind), index])
        scene = make_scene(world, rng, split, num_objects=2 if kind == "pair" else 1)
        caption = captions(scene, world, rng)[0]
        prompts.append(Prompt(text=caption.text, scene=scene, mentions=caption.mentions))
    return prompts
