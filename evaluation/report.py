"""The report: one self-contained HTML file with metrics, images and charts."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.curves import COLOURS, guidance_chart, loss_chart
from latent_t2i.evaluation.drawing import Samples
from latent_t2i.evaluation.metrics import Checks

NUM_SHOWN = 12
NUM_ROWS = 4

HEADLINES = {
    "oracle/single/shape_and_colour": (
        "One object",
        "Prompts with one object: exactly one object with the correct shape and colour",
    ),
    "oracle/pair/colours": (
        "Two objects, colours",
        "Prompts with two objects: both colours correct",
    ),
    "oracle/pair/shapes_colours_relation": (
        "Two objects, everything",
        "Prompts with two objects: shapes, colours and relation correct",
    ),
    "oracle/held_out/shape_and_colour": (
        "Held out",
        "One object with a composition that no training caption contains",
    ),
}
CURVES = {
    "one object: shape and colour": "oracle/single/shape_and_colour",
    "two objects: colours": "oracle/pair/colours",
    "two objects: shapes, colours, relation": "oracle/pair/shapes_colours_relation",
    "held out: shape and colour": "oracle/held_out/shape_and_colour",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """An image of the report with its prompt and the attributes that the oracle checked."""

    source: str
    width: int
    height: int
    label: str
    right: Sequence[str]
    wrong: Sequence[str]


def render_report(
    *,
    config: EvaluationConfig,
    metrics: Mapping[str, Any],
    samples: Sequence[Samples],
    checks: Sequence[Sequence[Checks]],
    info: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] | None,
) -> str:
    """Returns the report's HTML."""
    environment = Environment(
        loader=PackageLoader("latent_t2i.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    pairs = zip(samples, checks, strict=True)
    main = [pair for pair in pairs if pair[0].guidance_scale == config.guidance_scale]
    return environment.get_template("report.html.j2").render(
        name=config.name,
        info=info,
        config=config,
        metrics=metrics,
        headlines=headlines(metrics, {group.kind: len(group.prompts) for group, _ in main}),
        groups=[
            (group.kind, [_card(group, found, i) for i in range(min(NUM_SHOWN, len(group.images)))])
            for group, found in main
        ],
        has_history=history is not None,
        loss_svg=Markup(loss_chart(history or []) or ""),
        guidance_svg=_guidance(metrics, config),
        rows=guidance_rows(samples, checks),
        time_breakdown=_time_breakdown(history or []),
        settings=_flat({"train": info["config"], "evaluation": asdict(config)}),
    )


def headlines(metrics: Mapping[str, Any], counts: Mapping[str, int]) -> list[dict[str, str]]:
    """Returns title, value and note of the main metrics; notes give the 95 % interval."""
    found = []
    for key, (title, meaning) in HEADLINES.items():
        if key in metrics:
            low, high = wilson(metrics[key], counts[key.split("/")[1]])
            note = f"{meaning}. 95\u00a0% interval: {100 * low:.0f} to {100 * high:.0f}\u00a0%"
            value = f"{100 * metrics[key]:.0f}\u00a0%"
            found.append({"title": title, "value": value, "note": note})
    ceiling = metrics.get("clip_score/drawn")
    note = "100 times the cosine similarity of image and prompt."
    if ceiling is not None:
        note += f" Exact renderings of the prompts score {ceiling:.1f}."
    value = f"{metrics['clip_score']:.1f}"
    return [*found, {"title": "CLIP score", "value": value, "note": note}]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's interval (1927) of a share of `count` trials; 95 % for z = 1.96."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def guidance_rows(
    samples: Sequence[Samples], checks: Sequence[Sequence[Checks]]
) -> list[tuple[str, list[tuple[str, Card]]]]:
    """Returns a few prompts with their images, same seed, at each guidance scale.

    With checks, the prompts are those on which the number of passed ones differs most. Returns
    nothing for a single guidance scale.
    """
    kinds = {group.kind for group in samples}
    kind = "pair" if "pair" in kinds else samples[0].kind  # single objects leave little to improve
    groups = sorted(
        (pair for pair in zip(samples, checks, strict=True) if pair[0].kind == kind),
        key=lambda pair: pair[0].guidance_scale,
    )
    if len(groups) == 1:
        return []

    def spread(number: int) -> int:
        passed = [sum(group_checks[number].values()) for _, group_checks in groups if group_checks]
        return max(passed) - min(passed) if passed else 0

    count = min(len(group.prompts) for group, _ in groups)
    chosen = sorted(range(count), key=lambda number: (-spread(number), number))[:NUM_ROWS]
    return [
        (
            groups[0][0].prompts[number].text,
            [(f"{group.guidance_scale:g}", _card(group, found, number)) for group, found in groups],
        )
        for number in chosen
    ]


def _card(group: Samples, checks: Sequence[Checks], number: int) -> Card:
    image, found = group.images[number], checks[number] if checks else {}
    # Combined attributes, such as shape_and_colour, repeat single ones.
    names = [name for name in found if name not in ("all", "count") and "_" not in name]
    return Card(
        source=data_url(image),
        width=image.width,
        height=image.height,
        label=group.prompts[number].text,
        right=[name for name in names if found[name]],
        wrong=[name for name in names if not found[name]],
    )


def data_url(image: Image.Image) -> str:
    """Returns the image as a PNG data URL."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _guidance(metrics: Mapping[str, Any], config: EvaluationConfig) -> Markup | None:
    scales = sorted({config.guidance_scale, *config.guidance_scales})
    series = {}
    for title, key in CURVES.items():
        keys = {s: key if s == config.guidance_scale else f"{key}@g{s:g}" for s in scales}
        points = [(scale, metrics[name]) for scale, name in keys.items() if name in metrics]
        if points:
            series[title] = points
    return Markup(guidance_chart(series)) if series else None


def _time_breakdown(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Returns phase, mean share of training time and colour, the largest share first."""
    lines = [line["time_breakdown"] for line in history if "time_breakdown" in line]
    names = {name for line in lines for name in line}
    means = {name: sum(line.get(name, 0.0) for line in lines) / len(lines) for name in names}
    ranked = sorted(means.items(), key=lambda item: -item[1])
    return [(*item, COLOURS[number % len(COLOURS)]) for number, item in enumerate(ranked)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
