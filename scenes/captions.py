"""Captions for a scene from a small grammar: five per image, as in COCO.

Every caption names each object's shape and colour, and the relation between objects. Only some
mention size, place or background. `Caption.mentions` lists these, so that the oracle checks an
image only for attributes in its caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_t2i.scenes.world import INVERSE, WORLDS, Scene, SceneObject, World

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
TEMPLATES = (SINGLE, PAIR, TRIPLE)
"""By number of objects minus one; each template comes with the attributes that it mentions."""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and the attributes that it mentions besides shape and colour."""

    text: str
    mentions: frozenset[str]


def captions(scene: Scene, world: World, rng: np.random.Generator) -> list[Caption]:
    """Returns five paraphrases, one per template, in random order."""
    num_templates = len(TEMPLATES[len(scene.objects) - 1])
    return [caption(scene, world, int(i), rng) for i in rng.permutation(num_templates)]


def caption(scene: Scene, world: World, template: int, rng: np.random.Generator) -> Caption:
    """Describes the scene with one template; the generator's state decides the synonyms."""
    text, attributes = TEMPLATES[len(scene.objects) - 1][template]
    mentions = set(attributes)
    # Sizes are optional in captions, and all three objects of a triple are small.
    with_size = len(world.sizes) > 1 and len(scene.objects) < 3 and rng.random() < 0.6
    names = [_noun_phrase(item, with_size, rng) for item in scene.objects]
    fields = dict(zip("abc", names, strict=False), background=scene.background)
    if with_size:
        mentions.add("size")
    if scene.place is not None:
        fields["place"] = _choose(PLACE_WORDS[scene.place], rng)
    if scene.relation is not None:
        fields["relation"] = _choose(RELATION_WORDS[scene.relation], rng)
        fields["inverse"] = _choose(RELATION_WORDS[INVERSE[scene.relation]], rng)
        mentions.add("relation")
    return Caption(text=text.format(**fields), mentions=frozenset(mentions))


def vocabulary() -> list[str]:
    """Returns every word that a caption can contain, sorted."""
    texts = [text.replace(",", " , ") for group in TEMPLATES for text, _ in group]
    for table in (SIZE_WORDS, PLACE_WORDS, RELATION_WORDS):
        texts += [words for synonyms in table.values() for words in synonyms]
    full = WORLDS["full"]
    texts += [*full.shapes, *full.colours, *full.backgrounds, "a", "an"]
    words = {word for text in texts for word in text.split() if "{" not in word}
    return sorted(words)


def _noun_phrase(item: SceneObject, with_size: bool, rng: np.random.Generator) -> str:
    words = [_choose(SIZE_WORDS[item.size], rng)] if with_size else []
    words += [item.colour, item.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _choose(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
