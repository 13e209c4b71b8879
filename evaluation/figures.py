"""What the figures mean: title, direction, family and format of each, by its name.

The report and `evaluation.compare` show figures of all metrics through this table. A figure that it
does not list is still shown, under its own name.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Direction = Literal["higher", "lower"]
Family = Literal["quality", "alignment", "reconstruction", "other"]

FEW_IMAGES = 10_000
"""With fewer images the bias of FID exceeds many differences (Chong and Forsyth, 1911.07023)."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How a figure is shown and compared."""

    title: str
    meaning: str
    family: Family
    better: Direction | None = None
    is_share: bool = False
    """A share of 1, shown in percent."""
    needs_many: bool = False
    """Biased for fewer than FEW_IMAGES images."""


def _oracle(title: str, meaning: str) -> Figure:
    return Figure(title=title, meaning=meaning, family="alignment", better="higher", is_share=True)


def _quality(
    title: str, meaning: str, better: Direction, *, is_share: bool = False, needs_many: bool = False
) -> Figure:
    return Figure(
        title=title, meaning=meaning, family="quality", better=better, is_share=is_share,
        needs_many=needs_many,
    )  # fmt: skip


def _alignment(title: str, meaning: str, *, is_share: bool = False) -> Figure:
    return Figure(
        title=title, meaning=meaning, family="alignment", better="higher", is_share=is_share
    )


FIGURES = {
    r"oracle/single/shape_and_colour": _oracle(
        "One object",
        "Prompts with one object: exactly one object with the correct shape and colour",
    ),
    r"oracle/pair/colours": _oracle(
        "Two objects, colours", "Prompts with two objects: both colours correct"
    ),
    r"oracle/pair/shapes_colours_relation": _oracle(
        "Two objects, everything",
        "Prompts with two objects: shapes, colours and relation correct",
    ),
    r"oracle/held_out/shape_and_colour": _oracle(
        "Held out", "One object with a composition that no training caption contains"
    ),
    r"oracle/(\w+)/(\w+)": _oracle(
        "Oracle, {0}: {1}", "Share of the images with this attribute of their prompt correct"
    ),
    r"clip_score": _alignment("CLIP score", "100 times the cosine similarity of image and prompt"),
    r"r_precision": _alignment(
        "R-precision", "The image is closer to its own prompt than to the others", is_share=True
    ),
    r"caption_similarity/cider": _alignment(
        "CIDEr", "A captioner's description against the reference captions"
    ),
    r"caption_similarity/(.+)": _alignment(
        "Caption similarity: {0}", "A captioner's description against the reference captions"
    ),
    r"consistency/presence": _alignment(
        "Objects present", "A detector finds the objects that the prompt names", is_share=True
    ),
    r"consistency/(.+)": _alignment(
        "Consistency: {0}", "A detector's objects against the prompt's", is_share=True
    ),
    r"kid": _quality(
        "KID", "Distance of Inception features, unbiased: also for few images", "lower"
    ),
    r"cmmd": _quality("CMMD", "Distance of CLIP embeddings, also for few images", "lower"),
    r"(?:prdc/)?coverage": _quality(
        "Coverage", "Share of real images that have a generated one nearby", "higher", is_share=True
    ),
    r"fid": _quality("FID", "Fréchet distance of Inception features", "lower", needs_many=True),
    r"frechet_distance": _quality(
        "Fréchet distance", "Fréchet distance of the chosen features", "lower", needs_many=True
    ),
    r"mind": _quality("MIND", "Distance of the chosen features", "lower"),
    r"(?:prdc/)?precision": _quality(
        "Precision", "Share of generated images among the real ones", "higher", is_share=True
    ),
    r"(?:prdc/)?recall": _quality(
        "Recall", "Share of real images among the generated ones", "higher", is_share=True
    ),
    r"(?:prdc/)?density": _quality("Density", "Generated images per real neighbourhood", "higher"),
    r"inception_score": _quality(
        "Inception score", "Clear and varied classes of ImageNet; ignores the reference", "higher"
    ),
    r"lpips(?:/diversity)?": _quality(
        "LPIPS diversity", "Perceptual distance of images of one prompt", "higher"
    ),
    r"lpips/(.+)": Figure(
        title="LPIPS: {0}",
        meaning="Perceptual distance of an image and its reconstruction by the VAE",
        family="reconstruction",
        better="lower",
    ),
    r"memorisation/(.+)": Figure(
        title="Memorisation: {0}",
        meaning="Distance to the nearest training image, relative to that image's neighbours",
        family="other",
    ),
}
"""By pattern of the name; the first match counts. Groups of a pattern fill the title's braces."""

HEADLINES_OF_ALIGNMENT = (
    "oracle/single/shape_and_colour", "oracle/pair/colours", "oracle/pair/shapes_colours_relation",
    "oracle/held_out/shape_and_colour", "clip_score", "r_precision", "caption_similarity/cider",
    "consistency/presence",
)  # fmt: skip
HEADLINES_OF_QUALITY = (
    "fid", "frechet_distance", "kid", "cmmd", "coverage", "prdc/coverage", "mind",
    "inception_score", "lpips", "lpips/diversity",
)  # fmt: skip


@cache
def describe(name: str) -> Figure:
    """Returns what a figure's name means; a suffix such as `@g2` or `/real` is not part of it."""
    for pattern, figure in FIGURES.items():
        if found := re.fullmatch(pattern, name):
            groups = [group.replace("_", " ") for group in found.groups()]
            return Figure(
                title=figure.title.format(*groups),
                meaning=figure.meaning,
                family=figure.family,
                better=figure.better,
                is_share=figure.is_share,
                needs_many=figure.needs_many,
            )
    return Figure(title=name, meaning="", family="other")


def lead_order(names: list[str], num_images: int) -> list[str]:
    """Returns the main figures among `names`, in the order in which a report should show them.

    With fewer than FEW_IMAGES images those that are biased for few images come last.
    """
    quality = [name for name in HEADLINES_OF_QUALITY if name in names]
    if num_images < FEW_IMAGES:
        quality.sort(key=lambda name: describe(name).needs_many)  # stable
    return [*(name for name in HEADLINES_OF_ALIGNMENT if name in names), *quality]


def show(name: str, value: float | None, *, digits: int = 3) -> str:
    """Returns a value as text: shares in percent, other figures with `digits` digits."""
    if value is None or value != value:
        return "none"
    if describe(name).is_share:
        return f"{100 * value:.{max(0, digits - 3)}f}\u00a0%"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")
