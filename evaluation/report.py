"""The report: one HTML file with everything in it, that says what its figures mean.

All figures come from metrics.json, metrics.jsonl and bundle.json; the template holds words only.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.curves import guidance_chart, loss_chart
from latent_t2i.evaluation.drawing import Samples
from latent_t2i.evaluation.metrics import Checks

NUM_SHOWN = 12
NUM_STRIPS = 4

HEADLINES = {
    "oracle/single/shape_and_colour": (
        "One object",
        "Prompts with one object: the picture shows exactly one, of the right shape and colour",
    ),
    "oracle/pair/colours": ("Two objects, colours", "Prompts with two objects: both colours right"),
    "oracle/pair/shapes_colours_relation": (
        "Two objects, all of it",
        "Both shapes, both colours, and which stands where",
    ),
    "oracle/held_out/shape_and_colour": (
        "Never seen together",
        "One object whose shape and colour never met in training",
    ),
}
LINES = {
    "one object: shape and colour": "oracle/single/shape_and_colour",
    "two objects: colours": "oracle/pair/colours",
    "two objects: shapes, colours, relation": "oracle/pair/shapes_colours_relation",
    "never seen together: shape and colour": "oracle/held_out/shape_and_colour",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One picture of the report."""

    source: str
    label: str
    right: Sequence[str] = ()
    wrong: Sequence[str] = ()


def write_report(
    path: Path,
    *,
    config: EvaluationConfig,
    metrics: Mapping[str, Any],
    drawn: Sequence[Samples],
    verdicts: Sequence[Sequence[Checks]],
    info: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] | None,
) -> None:
    """Renders the report into `path`."""
    environment = Environment(
        loader=PackageLoader("latent_t2i.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    main = [
        (part, judged)
        for part, judged in zip(drawn, verdicts, strict=True)
        if part.guidance_scale == config.guidance_scale
    ]
    text = environment.get_template("report.html.j2").render(
        name=config.name,
        info=info,
        config=config,
        metrics=metrics,
        headlines=headlines(metrics, {part.kind: len(part.prompts) for part, _ in main}),
        groups=[(part.kind, cards(part, judged)) for part, judged in main],
        loss_svg=Markup(loss_chart(history)) if history else None,
        guidance_svg=_guidance(metrics, config),
        strips=strips(drawn, verdicts),
        time_breakdown=_time_breakdown(history) if history else [],
        settings=_flat({"train": info["config"], "evaluation": asdict(config)}),
    )
    path.write_text(text, "utf-8")


def headlines(metrics: Mapping[str, Any], counts: Mapping[str, int]) -> list[dict[str, str]]:
    """The main figures with what they mean and how far chance may have moved them."""
    found = []
    for key, (title, meaning) in HEADLINES.items():
        if key in metrics:
            low, high = wilson(metrics[key], counts[key.split("/")[1]])
            note = f"{meaning}. 95 % interval: {100 * low:.0f} to {100 * high:.0f} %"
            found.append({"title": title, "value": f"{100 * metrics[key]:.0f} %", "note": note})
    drawn = metrics.get("clip_score/drawn")
    ceiling = f" Pictures drawn as the prompts ask score {drawn:.1f}." if drawn else ""
    note = f"100 times the cosine of picture and prompt in the CLIP named below.{ceiling}"
    value = f"{metrics['clip_score']:.1f}"
    return [*found, {"title": "CLIP score", "value": value, "note": note}]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `count` trials (Wilson 1927), 95 % for z = 1.96."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def cards(part: Samples, judged: Sequence[Checks]) -> list[Card]:
    """The first pictures of a kind with the oracle's verdict."""
    return [
        _card(part, number, judged[number] if judged else {})
        for number in range(min(NUM_SHOWN, len(part.pictures)))
    ]


def strips(
    drawn: Sequence[Samples], verdicts: Sequence[Sequence[Checks]]
) -> list[tuple[str, list[tuple[str, Card]]]]:
    """The same prompt and seed at each guidance scale: of two objects, where there is room left.

    Prompts are those on which the scales disagree, as the oracle counts what is right, then others.
    """
    kinds = {part.kind for part in drawn}
    kind = "pair" if "pair" in kinds else drawn[0].kind
    parts = sorted(
        ((p, v) for p, v in zip(drawn, verdicts, strict=True) if p.kind == kind),
        key=lambda pair: pair[0].guidance_scale,
    )
    count = min(len(part.prompts) for part, _ in parts)

    def spread(number: int) -> int:
        scores = [sum(judged[number].values()) for _, judged in parts if judged]
        return max(scores) - min(scores) if scores else 0

    chosen = sorted(range(count), key=lambda number: (-spread(number), number))[:NUM_STRIPS]
    return [
        (
            parts[0][0].prompts[number].text,
            [
                (f"{part.guidance_scale:g}", _card(part, number, judged[number] if judged else {}))
                for part, judged in parts
            ],
        )
        for number in chosen
    ]


def _card(part: Samples, number: int, verdict: Checks) -> Card:
    names = [name for name in verdict if name not in ("all", "count") and "_" not in name]
    return Card(
        source=data_url(part.pictures[number]),
        label=part.prompts[number].text,
        right=[name for name in names if verdict[name]],
        wrong=[name for name in names if not verdict[name]],
    )


def data_url(image: Image.Image) -> str:
    """A picture as a PNG inside the page."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _guidance(metrics: Mapping[str, Any], config: EvaluationConfig) -> Markup | None:
    scales = sorted({config.guidance_scale, *config.guidance_scales})
    series = {}
    for title, key in LINES.items():
        points = []
        for scale in scales:
            suffix = "" if scale == config.guidance_scale else f"@g{scale:g}"
            if f"{key}{suffix}" in metrics:
                points.append((scale, metrics[f"{key}{suffix}"]))
        if points:
            series[title] = points
    return Markup(guidance_chart(series)) if series else None


def _time_breakdown(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Shares of training time by phase, averaged over the logged intervals, the largest first."""
    lines = [line["time_breakdown"] for line in history if "time_breakdown" in line]
    names = {name for line in lines for name in line}
    means = {name: sum(line.get(name, 0.0) for line in lines) / len(lines) for name in names}
    return sorted(means.items(), key=lambda item: -item[1])


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
