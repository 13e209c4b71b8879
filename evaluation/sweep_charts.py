"""The report's sections of sweeps and checkpoints: charts, tables and strips of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from latent_t2i.evaluation import gallery
from latent_t2i.evaluation.curves import COLOURS, Series, front_chart, line_chart
from latent_t2i.evaluation.figures import describe, lead_order, show
from latent_t2i.evaluation.sweeps import best, pareto_front, rank_correlation

SHARES = "Correct images"
"""Title of the chart that shows the oracle's shares together."""
PARETO_ALIGNMENT = (
    "oracle/pair/shapes_colours_relation", "oracle/single/shape_and_colour", "clip_score",
    "r_precision", "caption_similarity/cider", "consistency/presence",
)  # fmt: skip
MAX_CHARTS = 6
"""Of the samplers and of the checkpoints, whose tables show all main figures."""
SWEEPS = {
    "guidance_interval": ("Guidance interval", "interval of sigma"),
    "guide": ("Autoguidance", "weaker bundle"),
    "sampler": ("Samplers", "scheduler and steps"),
}


def guidance(
    results: Mapping[str, Any], out: Path, images: Sequence[gallery.Entry]
) -> dict[str, Any] | None:
    """Returns charts of each figure against the guidance scale, the Pareto front, and pictures."""
    sweep = _entries(results, "guidance_scale")
    if len(sweep) < 2:
        return None
    sweep = sorted(sweep, key=lambda entry: float(entry["value"]))
    points = [(f"{entry['value']:g}", entry["figures"]) for entry in sweep]
    for number, entry in enumerate(_entries(results, "guide"), start=1):
        points.append((f"guide {number}", entry["figures"]))
    for label, entry in _labelled(results, "guidance_interval"):
        points.append((label.replace(" to ", "\u2013"), entry["figures"]))
    by_scale = [(float(entry["value"]), entry["figures"]) for entry in sweep]
    files = _files(sweep, out, [f"guidance {entry['value']:g}" for entry in sweep])
    return {
        "num": _counts(sweep),
        "charts": _charts(by_scale, "guidance scale", results["rows"].get("real", {}), _num(sweep)),
        "front": front(points, _num(sweep)),
        "strips": gallery.strips(images, files),
    }


def settings_tables(
    results: Mapping[str, Any], out: Path, images: Sequence[gallery.Entry]
) -> list[dict[str, Any]]:
    """Returns the other sweeps: a table of the main figures, pictures, and a chart for samplers."""
    found = []
    for kind, (title, setting) in SWEEPS.items():
        labelled = _labelled(results, kind)
        if not labelled:
            continue
        sweep = [entry for _, entry in labelled]
        names = _main_names([entry["figures"] for entry in sweep], _num(sweep))
        columns = {name: [entry["figures"].get(name) for entry in sweep] for name in names}
        marks = {name: _best(name, values) for name, values in columns.items()}
        found.append(
            {
                "key": kind.replace("_", "-"),
                "title": title,
                "setting": setting,
                "num": _counts(sweep),
                "columns": [describe(name).title for name in names],
                "rows": [
                    (
                        label,
                        [
                            (show(name, columns[name][number]), marks[name] == number)
                            for name in names
                        ],
                    )
                    for number, (label, _) in enumerate(labelled)
                ],
                "charts": _sampler_charts(sweep) if kind == "sampler" else {},
                "strips": gallery.strips(
                    images, _files(sweep, out, [label for label, _ in labelled])
                ),
            }
        )
    return found


def convergence(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns each figure against images seen and hours, with its best checkpoint.

    The table has the rank correlation (Spearman) of the validation loss with each figure. It is
    positive if a lower loss goes with a better figure.
    """
    sweep = sorted(_entries(results, "checkpoints"), key=lambda entry: int(entry["step"]))
    if len(sweep) < 2:
        return None
    axis = "step" if any(e.get("images_seen") is None for e in sweep) else "images_seen"
    hours = {e[axis]: f"{e['hours']:.3g}" for e in sweep if e.get("hours") is not None}
    losses = [entry.get("validation_loss") for entry in sweep]
    charts: dict[str, Markup] = {}
    rows = []
    for name in _main_names([entry["figures"] for entry in sweep], _num(sweep)):
        values = [entry["figures"].get(name) for entry in sweep]
        number = _best(name, values)
        points = [(e[axis], v) for e, v in zip(sweep, values, strict=True) if v is not None]
        rows.append(_convergence_row(name, sweep, values, number, losses))
        if len(charts) == MAX_CHARTS:
            continue
        ring = None if number is None else (sweep[number][axis], values[number])
        chart = line_chart(
            [_series(name, points)], axis.replace("_", " "), _axis(name),
            title=describe(name).title, best=_scaled(name, ring), top=hours,
            top_label="hours of training", whole_x=True,
        )  # fmt: skip
        charts[describe(name).title] = Markup(chart)
    return {
        "charts": charts,
        "rows": rows,
        "num": _counts(sweep),
        "has_losses": any(loss is not None for loss in losses),
    }


def _convergence_row(
    name: str,
    sweep: Sequence[Mapping[str, Any]],
    values: Sequence[float | None],
    number: int | None,
    losses: Sequence[float | None],
) -> dict[str, str]:
    """Returns the table's row of a figure: its best checkpoint, and the rank correlation."""
    entry = {} if number is None else sweep[number]
    correlation = rank_correlation(losses, values)
    if correlation is not None and describe(name).better == "higher":
        correlation = -correlation
    hours = entry.get("hours")
    return {
        "title": describe(name).title,
        "step": f"{entry['step']:,}" if entry else "none",
        "images": f"{entry['images_seen']:,}" if entry.get("images_seen") else "unknown",
        "hours": "unknown" if hours is None else f"{hours:.3g}",
        "value": "none" if number is None else show(name, values[number]),
        "correlation": "unknown" if correlation is None else f"{correlation:+.2f}",
    }


def front(
    points: Sequence[tuple[str, Mapping[str, float]]], num_images: int
) -> dict[str, Any] | None:
    """Returns the chart of alignment against quality with its Pareto front.

    The figures are the leading ones that all settings have; None if one kind is missing.
    """
    shared = [name for name in points[0][1] if all(name in figures for _, figures in points)]
    quality = [
        name for name in lead_order(shared, num_images) if describe(name).family == "quality"
    ]
    alignment = [name for name in PARETO_ALIGNMENT if name in shared]
    if not quality or not alignment:
        return None
    x, y = quality[0], alignment[0]
    placed = [(label, _percent(x, f[x]), _percent(y, f[y])) for label, f in points]
    better = (describe(x).better or "lower", describe(y).better or "higher")
    numbers = pareto_front([point[1:] for point in placed], better)
    chart = front_chart(placed, numbers, _label(x), _label(y))
    return {"chart": Markup(chart), "names": [placed[number][0] for number in numbers]}


def _charts(
    points: Sequence[tuple[float, Mapping[str, float]]],
    x_label: str,
    ceiling: Mapping[str, float],
    num_images: int,
) -> dict[str, Markup]:
    """Returns a chart for each main figure, by title; the oracle's shares are in one."""
    names = _main_names([figures for _, figures in points], num_images)
    together = [name for name in names if name.startswith("oracle/")]
    charts = {}
    if together:
        series = [
            _series(name, [(x, f[name]) for x, f in points if name in f], colour, legend=True)
            for name, colour in zip(together, COLOURS, strict=False)
        ]
        charts[SHARES] = line_chart(series, x_label, "% correct", log_x=True)
    for name in (name for name in names if name not in together):
        found = [(x, figures[name]) for x, figures in points if figures.get(name) is not None]
        number = _best(name, [value for _, value in found])
        level = ("real images", _percent(name, ceiling[name])) if name in ceiling else None
        charts[describe(name).title] = line_chart(
            [_series(name, found)], x_label, _axis(name), title=describe(name).title, log_x=True,
            level=level, best=_scaled(name, None if number is None else found[number]),
        )  # fmt: skip
    return {title: Markup(chart) for title, chart in charts.items() if chart is not None}


def _sampler_charts(sweep: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Returns a chart of each main figure against the steps, with a line per scheduler."""
    schedulers = list(dict.fromkeys(entry["scheduler"] for entry in sweep))
    charts = {}
    for name in _main_names([entry["figures"] for entry in sweep], _num(sweep))[:MAX_CHARTS]:
        lines = []
        for scheduler, colour in zip(schedulers, COLOURS, strict=False):
            points = sorted(
                (entry["num_steps"], entry["figures"][name])
                for entry in sweep
                if entry["scheduler"] == scheduler and entry["figures"].get(name) is not None
            )
            lines.append(_series(name, points, colour, legend=True, title=scheduler))
        chart = line_chart(lines, "steps", _axis(name), title=describe(name).title, log_x=True)
        if chart is not None and len({entry["num_steps"] for entry in sweep}) > 1:
            charts[describe(name).title] = Markup(chart)
    return charts


def _entries(results: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return list(results.get("sweeps", {}).get(kind) or ())


def _labelled(results: Mapping[str, Any], kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the entries of a sweep, each with its setting as text."""
    found = []
    for entry in _entries(results, kind):
        if kind == "sampler":
            label = f"{entry['scheduler']}, {entry['num_steps']} steps"
        elif kind == "guidance_interval":
            value = entry["value"]
            label = "all steps" if value is None else f"{value[0]:g} to {value[1]:g}"
        else:
            label = "no guide" if entry["value"] is None else str(entry["value"])
        found.append((label, entry))
    return found


def _files(
    sweep: Sequence[Mapping[str, Any]], out: Path, labels: Sequence[str]
) -> dict[str, dict[int, Path]]:
    """Returns the pictures of each entry of a sweep, by label and position."""
    found = {}
    for entry, label in zip(sweep, labels, strict=True):
        files = {int(n): out / name for n, name in (entry.get("files") or {}).items()}
        found[label] = {position: path for position, path in files.items() if path.is_file()}
    return found


def _main_names(sweep: Sequence[Mapping[str, float]], num_images: int) -> list[str]:
    """Returns the main figures that any entry has."""
    names = dict.fromkeys(name for figures in sweep for name in figures)
    return lead_order(list(names), num_images)


def _num(sweep: Sequence[Mapping[str, Any]]) -> int:
    return min(int(entry.get("num_images") or 0) for entry in sweep)


def _counts(sweep: Sequence[Mapping[str, Any]]) -> str:
    """Returns the number of images of a sweep's settings, which may differ."""
    counts = sorted({int(entry.get("num_images") or 0) for entry in sweep})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _best(name: str, values: Sequence[float | None]) -> int | None:
    better = describe(name).better
    return None if better is None else best(values, better)


def _series(
    name: str,
    points: Sequence[tuple[float, float]],
    colour: str = COLOURS[0],
    *,
    legend: bool = False,
    title: str | None = None,
) -> Series:
    scaled = [(x, _percent(name, y)) for x, y in points]
    shown = (title or describe(name).title) if legend else ""
    return Series(name=shown, points=scaled, colour=colour, has_markers=True)


def _percent(name: str, value: float) -> float:
    return 100 * value if describe(name).is_share else value


def _scaled(name: str, point: tuple[float, Any] | None) -> tuple[float, float] | None:
    return None if point is None else (point[0], _percent(name, point[1]))


def _axis(name: str) -> str:
    """Returns the axis label of a figure whose title stands above the chart."""
    figure = describe(name)
    parts = ["%"] if figure.is_share else []
    return ", ".join([*parts, f"{figure.better} is better"] if figure.better else parts)


def _label(name: str) -> str:
    """Returns the axis label of a figure with its title."""
    arrow = {"higher": " \u2191", "lower": " \u2193", None: ""}[describe(name).better]
    return f"{describe(name).title}{', %' if describe(name).is_share else ''}{arrow}"
