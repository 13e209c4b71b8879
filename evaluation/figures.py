"""What the figures mean: title, direction, family and format of each, by its name.

The report and `evaluation.compare` show figures of all metrics through this table. A figure that it
does not list is still shown, under its own name.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

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
        "R-precision", "The image is closer to its own prompt than to 99 others", is_share=True
    ),
    r"r_precision/of_(\d+)": _alignment(
        "R-precision among {0}",
        "The image is closer to its own prompt than to the others",
        is_share=True,
    ),
    r"caption_similarity/cider": _alignment(
        "CIDEr", "A captioner's description of the image against the reference captions"
    ),
    r"caption_similarity/([^/]+)": _alignment(
        "Caption similarity: {0}", "A captioner's description against the reference captions"
    ),
    r"caption_similarity/([^/]+)/human": _alignment(
        "Human captions: {0}", "One caption of the image against its other captions"
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
    r"coverage": _quality(
        "Coverage", "Share of real images that have a generated one nearby", "higher", is_share=True
    ),
    r"fid": _quality("FID", "Fréchet distance of Inception features", "lower", needs_many=True),
    r"frechet_distance": _quality(
        "Fréchet distance", "Fréchet distance of the chosen features", "lower", needs_many=True
    ),
    r"mind": _quality("MIND", "Distance of the chosen features", "lower"),
    r"precision": _quality(
        "Precision", "Share of generated images among the real ones", "higher", is_share=True
    ),
    r"recall": _quality(
        "Recall", "Share of real images among the generated ones", "higher", is_share=True
    ),
    r"density": _quality("Density", "Generated images per real neighbourhood", "higher"),
    r"inception_score": _quality(
        "Inception score", "Clear and varied classes of ImageNet; ignores the reference", "higher"
    ),
    r"lpips/diverse": _quality(
        "LPIPS diversity", "Perceptual distance between images of one prompt", "higher"
    ),
    r"lpips/reconstruction": Figure(
        title="LPIPS of the VAE",
        meaning="Perceptual distance of real images and their reconstructions by the VAE",
        family="reconstruction",
        better="lower",
    ),
    r"memorisation/ratio": Figure(
        title="Memorisation: ratio",
        meaning="Distance to the nearest training image over that image's to its neighbours",
        family="other",
    ),
    r"memorisation/closer": Figure(
        title="Memorisation: closer",
        meaning="Share of held-out images that are farther from the training images: half is best",
        family="other",
        is_share=True,
    ),
    r"memorisation/tail": Figure(
        title="Memorisation: tail",
        meaning="Share of images with a lower ratio than 99 % of the held-out images",
        family="other",
        better="lower",
        is_share=True,
    ),
}
"""By pattern of the name; the first match counts. Groups of a pattern fill the title's braces."""

HEADLINES_OF_ALIGNMENT = (
    "oracle/single/shape_and_colour", "oracle/pair/colours", "oracle/pair/shapes_colours_relation",
    "oracle/held_out/shape_and_colour", "clip_score", "r_precision", "caption_similarity/cider",
    "caption_similarity/cosine", "consistency/presence", "consistency/all",
)  # fmt: skip
HEADLINES_OF_QUALITY = (
    "fid", "frechet_distance", "kid", "cmmd", "coverage", "mind", "inception_score",
    "lpips/diverse", "lpips/reconstruction",
)  # fmt: skip


@cache
def describe(name: str) -> Figure:
    """Returns what a figure's name means; one that is not listed is its own title."""
    for pattern, figure in FIGURES.items():
        if found := re.fullmatch(pattern, name):
            groups = [group.replace("_", " ") for group in found.groups()]
            return replace(figure, title=figure.title.format(*groups))
    return Figure(title=name, meaning="", family="other")


def contamination_gap(results: Mapping[str, Any]) -> str | None:
    """Returns what is unknown of training images among an evaluation's; None if nothing is."""
    found = results.get("contamination")
    if not found:
        return "not recorded"
    if "reason" not in found or found["reason"] is None or found["status"] == "not needed":
        return None
    return f"{found['status']}: {found['reason']}"


def main_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of the model: those of the samples, and LPIPS, which has other rows."""
    rows = results["rows"]
    lpips = {
        f"lpips/{row}": rows.get(row, {}).get("lpips") for row in ("diverse", "reconstruction")
    }
    return rows["samples"] | {name: value for name, value in lpips.items() if value is not None}


def lead_order(names: Collection[str], num_images: int) -> list[str]:
    """Returns the main figures among `names`, in the order in which a report should show them.

    With fewer than FEW_IMAGES images those that are biased for few images come last.
    """
    quality = [name for name in HEADLINES_OF_QUALITY if name in names]
    if num_images < FEW_IMAGES:
        quality.sort(key=lambda name: describe(name).needs_many)  # stable
    ranked = [name for name in names if name.startswith("r_precision/of_")]
    alignment = [name for name in HEADLINES_OF_ALIGNMENT if name in names]
    return [*alignment, *ranked, *quality]


def show(name: str, value: float | None, *, digits: int = 3) -> str:
    """Returns a value as text: shares in percent, other figures with `digits` digits."""
    if value is None or value != value:
        return "none"
    if describe(name).is_share:
        return f"{100 * value:.{max(0, digits - 3)}f}\u00a0%"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")
