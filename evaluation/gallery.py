"""The report's pictures: small copies as data URLs, chosen by their values or at random.

Pictures larger than MAX_PX are reduced and stored as JPEG, so that the report of a model at 512 px
stays a file of a few megabytes; smaller ones are stored as they are.
"""

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

MAX_PX = 256
LOSSLESS_PX = 128
JPEG_QUALITY = 88
NUM_CHOSEN = 8
NUM_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture of the report."""

    source: str
    width: int
    height: int
    label: str
    """Its caption and text alternative."""
    note: str = ""
    right: Sequence[str] = ()
    wrong: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An image of per_image.jsonl."""

    position: int
    path: Path
    prompt: str
    group: str
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def checks(self) -> dict[str, bool]:
        """The oracle's checks of single attributes, by attribute."""
        found = {
            name.rpartition("/")[2]: value == 1
            for name, value in self.values.items()
            if name.startswith("oracle/")
        }
        # Combined attributes, such as shape_and_colour, repeat single ones.
        return {n: v for n, v in found.items() if n not in ("all", "count") and "_" not in n}

    @property
    def score(self) -> tuple[float, float] | None:
        """The share of passed checks and then the CLIP score; None without either."""
        checks, clip = self.checks, self.values.get("clip_score")
        if not checks and clip is None:
            return None
        return sum(checks.values()) / len(checks) if checks else 0.0, clip or 0.0


def entries(lines: Sequence[Mapping[str, Any]], out: Path) -> list[Entry]:
    """Returns the images of per_image.jsonl whose file exists below the output folder."""
    found = []
    for line in lines:
        values = {name: value for name, value in line["values"].items() if value is not None}
        path = out / str(line.get("file", ""))
        if path.is_file():
            prompt, group = str(line.get("prompt", "")), str(line.get("group", ""))
            position = int(line["position"])
            found.append(
                Entry(position=position, path=path, prompt=prompt, group=group, values=values)
            )
    return found


def choose(images: Sequence[Entry], num: int = NUM_CHOSEN) -> dict[str, list[Card]]:
    """Returns the best, some random and the worst images; only random ones without a score.

    The random ones are the same for the same number of images.
    """
    ranked = [image for image in images if image.score is not None]
    ranked.sort(key=lambda image: image.score or (0.0, 0.0), reverse=True)
    drawn = random.Random(0).sample(range(len(images)), min(num, len(images)))
    chosen = {"Random": [images[number] for number in sorted(drawn)]}
    if len(ranked) >= 2:
        worst = ranked[: -num - 1 : -1]
        chosen = {"Best": ranked[:num], **chosen, "Worst": worst}
    return {title: [make_card(image) for image in group] for title, group in chosen.items()}


def make_card(image: Entry, label: str | None = None) -> Card:
    """Returns an image with its prompt, its checks and its CLIP score."""
    clip = image.values.get("clip_score")
    checks = image.checks
    return picture(
        image.path,
        image.prompt if label is None else label,
        note="" if clip is None else f"CLIP score {clip:.1f}",
        right=[name for name, passed in checks.items() if passed],
        wrong=[name for name, passed in checks.items() if not passed],
    )


def picture(
    path: Path, label: str, *, note: str = "", right: Sequence[str] = (), wrong: Sequence[str] = ()
) -> Card:
    """Returns an image file as a card; raises ValueError if it is not an image."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error
    image.thumbnail((MAX_PX, MAX_PX), Image.Resampling.LANCZOS)
    return Card(
        source=data_url(image),
        width=image.width,
        height=image.height,
        label=label,
        note=note,
        right=right,
        wrong=wrong,
    )


def data_url(image: Image.Image) -> str:
    """Returns the image as a data URL: PNG for small ones, else JPEG."""
    kind = "png" if max(image.size) <= LOSSLESS_PX else "jpeg"
    stream = io.BytesIO()
    settings = {"quality": JPEG_QUALITY} if kind == "jpeg" else {}
    image.save(stream, kind.upper(), **settings)
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()


def strips(
    images: Sequence[Entry], columns: Mapping[str, Mapping[int, Path]], num: int = NUM_ROWS
) -> list[tuple[str, list[Card]]]:
    """Returns a few prompts, each with its picture in every column: the same prompt and seed.

    `columns` are the files of each setting or run, by label and position. The prompts are the first
    that all columns have, of the group whose prompts are longest on average, because short ones
    leave little to improve.
    """
    columns = {label: files for label, files in columns.items() if files}
    if len(columns) < 2:
        return []
    shared = [
        image for image in images if all(image.position in files for files in columns.values())
    ]
    lengths: dict[str, list[int]] = {}
    for image in shared:
        lengths.setdefault(image.group, []).append(len(image.prompt))
    shared.sort(key=lambda image: -fmean(lengths[image.group]))  # stable
    return [
        (
            image.prompt,
            [picture(files[image.position], label) for label, files in columns.items()],
        )
        for image in shared[:num]
    ]
