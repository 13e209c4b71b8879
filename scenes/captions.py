"""Five captions for a scene from a small grammar, as COCO gives each picture five.

Every caption names each object's shape and colour, and the relation when there are two or three;
size, place and background are told by some captions and not by others, as people do. A caption
carries the set of attributes that it mentions, so that a picture is only judged by what was asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_t2i.scenes.world import INVERSE, WORLDS, Scene, Thing, World

NUM_CAPTIONS = 5

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
PLACE_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "middle": ("in the middle", "in the center"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

Template = tuple[str, frozenset[str]]
SINGLE: tuple[Template, ...] = (
    ("{a} on a {background} background", frozenset({"background"})),
    ("a picture of {a} {place}", frozenset({"place"})),
    ("there is {a} {place}, the background is {background}", frozenset({"background", "place"})),
    ("{a} {place}", frozenset({"place"})),
    ("a {background} background with {a} {place}", frozenset({"background", "place"})),
)
PAIR: tuple[Template, ...] = (
    ("{a} {relation} {b}", frozenset()),
    ("{a} {relation} {b} on a {background} background", frozenset({"background"})),
    ("{b} {inverse} {a}", frozenset()),
    ("there is {b} with {a} {relation} it", frozenset()),
    ("a {background} background with {a} {relation} {b}", frozenset({"background"})),
)
TRIPLE: tuple[Template, ...] = (
    ("{a} {relation} {b} and {c}", frozenset()),
    ("{b} and {c} {inverse} {a}", frozenset()),
    ("{a} {relation} {b} and {c} on a {background} background", frozenset({"background"})),
    ("there is {b} next to {c} with {a} {relation} them", frozenset()),
    ("a {background} background with {b} and {c} {inverse} {a}", frozenset({"background"})),
)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and the attributes beyond shape and colour that it tells."""

    text: str
    mentions: frozenset[str]


def captions(scene: Scene, world: World, rng: np.random.Generator) -> list[Caption]:
    """Five paraphrases, one of each template, in random order."""
    templates = (SINGLE, PAIR, TRIPLE)[len(scene.things) - 1]
    return [caption(scene, world, int(i), rng) for i in rng.permutation(len(templates))]


def caption(scene: Scene, world: World, template: int, rng: np.random.Generator) -> Caption:
    """The scene in the words of one template; the same generator state picks the same synonyms."""
    text, mentions = (SINGLE, PAIR, TRIPLE)[len(scene.things) - 1][template]
    with_size = len(world.sizes) > 1 and len(scene.things) < 3 and rng.random() < 0.6
    names = [_name(thing, with_size, rng) for thing in scene.things]
    told = set(mentions) | ({"size"} if with_size else set())
    fields = dict(zip("abc", names, strict=False), background=scene.background)
    if scene.place is not None:
        fields["place"] = _pick(PLACE_WORDS[scene.place], rng)
    if scene.relation is not None:
        fields["relation"] = _pick(RELATION_WORDS[scene.relation], rng)
        fields["inverse"] = _pick(RELATION_WORDS[INVERSE[scene.relation]], rng)
        told.add("relation")
    return Caption(text=text.format(**fields), mentions=frozenset(told))


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [text.replace(",", " , ") for group in (SINGLE, PAIR, TRIPLE) for text, _ in group]
    for table in (SIZE_WORDS, PLACE_WORDS, RELATION_WORDS):
        texts += [words for synonyms in table.values() for words in synonyms]
    full = WORLDS["full"]
    texts += [*full.shapes, *full.colours, *full.backgrounds, "a", "an"]
    words = {word for text in texts for word in text.split() if "{" not in word}
    return sorted(words)


def _name(thing: Thing, with_size: bool, rng: np.random.Generator) -> str:
    words = [_pick(SIZE_WORDS[thing.size], rng)] if with_size else []
    words += [thing.colour, thing.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
