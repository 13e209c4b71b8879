"""Charts as inline SVG, in colours that are legible on light and dark backgrounds."""

import html
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # before pyplot is imported, so that no window system is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FormatStrFormatter,
    MaxNLocator,
    NullLocator,
)

from latent_t2i.evaluation.sweeps import smooth

COLOURS = ("#3b7dd8", "#d9722e", "#3a9a5b", "#a257c7", "#c9a227", "#2aa5a5", "#d2568c", "#8a8f98")
GREY = "#8a8f98"
OFFSETS = ((5, 5), (5, -13), (-20, 7), (-20, -14))  # of labels, so that near ones do not overlap
LEGEND_IN = 0.2  # height of a legend's line
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def read_history(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl.

    Raises ValueError with file and line for text that is not JSON and for a value of another type
    than training writes.
    """
    history = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {text[:60]!r}") from error
        _check_object(place, "the line", line)
        _check_line(place, line)
        history.append(line)
    return history


def _check_line(place: str, line: dict[str, Any]) -> None:
    _check_number(place, "step", line.get("step"))
    for name in ("validation", "time_breakdown"):
        _check_object(place, name, line.get(name, {}))
    quarters = line.get("validation", {}).get("loss_by_quarter", {})
    _check_object(place, "validation.loss_by_quarter", quarters)
    numbers = {name: line.get(name) for name in ("loss", "skipped", "images_per_s")}
    numbers["validation.loss"] = line.get("validation", {}).get("loss")
    numbers |= {f"validation.loss_by_quarter.{name}": value for name, value in quarters.items()}
    for name, value in numbers.items():
        if value is not None:  # null: a loss that is not finite, or no step without a skip
            _check_number(place, name, value)
    for name, value in line.get("time_breakdown", {}).items():
        _check_number(place, f"time_breakdown.{name}", value)


def _check_object(place: str, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {name} is {str(value)[:60]!r}, expected a JSON object")


def _check_number(place: str, name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) < sys.float_info.max):
        raise ValueError(f"{place}: {name} is {str(value)[:60]!r}, expected a finite number")


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    is_faint: bool = False
    """A thin line without an entry in the legend, such as raw values behind smoothed ones."""
    has_markers: bool = False
    is_dashed: bool = False


def loss_chart(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Plots the training loss, raw and smoothed, and the validation loss against the step.

    Returns None if no line has a loss.
    """
    training = [(line["step"], line["loss"]) for line in history if line.get("loss") is not None]
    validation = [
        (line["step"], line["validation"]["loss"])
        for line in history
        if line.get("validation", {}).get("loss") is not None
    ]
    series = []
    if training:
        steps, losses = zip(*training, strict=True)
        smoothed = list(zip(steps, smooth(losses), strict=True))
        series.append(Series(name="", points=training, colour=COLOURS[0], is_faint=True))
        series.append(Series(name="training", points=smoothed, colour=COLOURS[0]))
    if validation:
        series.append(Series(name="validation (EMA)", points=validation, colour=COLOURS[1]))
    return line_chart(series, "step", "loss", log_y=True, whole_x=True)


def quarters_chart(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Plots the validation loss of each quarter of the timesteps; None if no line has it."""
    lines = [line for line in history if line.get("validation", {}).get("loss_by_quarter")]
    names = dict.fromkeys(name for line in lines for name in line["validation"]["loss_by_quarter"])
    series = []
    for name, colour in zip(names, COLOURS, strict=False):
        points = [(line["step"], line["validation"]["loss_by_quarter"].get(name)) for line in lines]
        points = [point for point in points if point[1] is not None]
        if points:
            series.append(Series(name=_quarter_title(name), points=points, colour=colour))
    return line_chart(series, "step", "validation loss", log_y=True, whole_x=True)


def _quarter_title(name: str) -> str:
    """Returns `t1of4` as words; t1 has the least noise."""
    found = re.fullmatch(r"t(\d+)of(\d+)", name)
    if not found:
        return name
    note = {"1": ", least noise", found[2]: ", most noise"}.get(found[1], "")
    return f"quarter {found[1]} of {found[2]}{note}"


def history_chart(history: Sequence[Mapping[str, Any]], name: str, y_label: str) -> str | None:
    """Plots a number of metrics.jsonl, such as `images_per_s`, against the step."""
    points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    series = [Series(name="", points=points, colour=COLOURS[0])] if points else []
    return line_chart(series, "step", y_label, whole_x=True, from_zero=True)


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
    from_zero: bool = False,
    best: tuple[float, float] | None = None,
    level: tuple[str, float] | None = None,
    top: Mapping[float, str] | None = None,
    top_label: str = "",
) -> str | None:
    """Plots lines; returns None if there are none.

    Args:
        title: What the y axis shows, for the text alternative; default: `y_label`.
        log_y: Logarithmic if all values are positive.
        best: A point to mark with a ring.
        level: Name and value of a horizontal line, such as the ceiling.
        whole_x: Steps or images, with k and M for thousands and millions.
        top: Labels of the upper axis by x, such as hours beside images seen.
    """
    series = [line for line in series if line.points]
    if not series:
        return None

    def fill(axes: Axes) -> None:
        for line in series:
            _plot(axes, line)
        if level is not None:
            axes.axhline(level[1], color=GREY, linestyle=":", linewidth=1.5, label=level[0])
        if best is not None:
            axes.plot(*best, "o", ms=13, mfc="none", mec=COLOURS[2], mew=2, label="best")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _scale(axes, series, log_x=log_x, log_y=log_y, whole_x=whole_x)
        if from_zero:
            axes.set_ylim(bottom=0)
        if top:
            _top_axis(axes, top, top_label)
        _legend(axes, inside=bool(top))

    num_entries = sum(bool(line.name) for line in series) + (best is not None) + (level is not None)
    return _chart(fill, _about(series, x_label, title or y_label), 3.0 + LEGEND_IN * num_entries)


def _scale(
    axes: Axes, series: Sequence[Series], *, log_x: bool, log_y: bool, whole_x: bool
) -> None:
    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    if log_x and min(xs) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(thinned(sorted(set(xs)), 9)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if log_y and min(ys) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_ylim())))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())


def _top_axis(axes: Axes, top: Mapping[float, str], label: str) -> None:
    upper = axes.secondary_xaxis("top")
    ticks = thinned(sorted(top), 5)
    upper.set_xticks(ticks, [top[tick] for tick in ticks])
    upper.set_xlabel(label)


def _legend(axes: Axes, *, inside: bool = False) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    if inside:
        axes.legend(frameon=False, loc="best", fontsize=10)
    else:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10)


def _plot(axes: Axes, line: Series) -> None:
    xs, ys = zip(*line.points, strict=True)
    if line.is_faint:
        axes.plot(xs, ys, color=line.colour, alpha=0.35, linewidth=1)
        return
    # A line through one point is invisible.
    marker = "o" if line.has_markers or len(line.points) == 1 else None
    style = "--" if line.is_dashed else "-"
    label = line.name or None
    axes.plot(xs, ys, color=line.colour, linewidth=2, marker=marker, linestyle=style, label=label)


def front_chart(
    points: Sequence[tuple[str, float, float]], front: Sequence[int], x_label: str, y_label: str
) -> str:
    """Plots named points (name, x, y) and joins those of the Pareto front."""

    def fill(axes: Axes) -> None:
        for number, (name, x, y) in enumerate(points):
            colour = COLOURS[0] if number in front else GREY
            axes.plot([x], [y], "o", color=colour)
            offset = OFFSETS[number % len(OFFSETS)]
            axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=10)
        best = [points[number][1:] for number in front]
        if best:
            _plot(axes, Series(name="Pareto front", points=best, colour=COLOURS[0]))
        axes.margins(0.14)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(axes)

    names = ", ".join(points[number][0] for number in front)
    about = f"{y_label} against {x_label} for {len(points)} settings; on the Pareto front: {names}"
    return _chart(fill, about, 3.4)


def bar_chart(bars: Sequence[tuple[str, float]], x_label: str, y_label: str) -> str | None:
    """Plots named values as bars; returns None if there are none."""
    if not bars:
        return None
    names, values = zip(*bars, strict=True)

    def fill(axes: Axes) -> None:
        axes.bar(range(len(values)), values, color=COLOURS[0], width=0.85)
        axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0, ha="center")
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    top = names[values.index(max(values))]
    return _chart(fill, f"{y_label} by {x_label}; most in {top}", 2.8)


def thinned(values: Sequence[float], most: int) -> list[float]:
    """Returns at most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(number * step)] for number in range(most)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns about three to seven ticks for a logarithmic axis, few enough for their labels."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) < 8:
            break
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    return ticks[:: max(1, math.ceil(len(ticks) / 7))]


def _about(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Returns a chart's text alternative: its axes, and where each line starts and ends."""
    parts = []
    for line in series:
        if not line.is_faint:
            (x0, y0), (x1, y1) = line.points[0], line.points[-1]
            name = f"{line.name}: " if line.name else ""
            parts.append(f"{name}{y0:.3g} at {x0:g} to {y1:.3g} at {x1:g}")
    return f"{y_label} against {x_label}. {'; '.join(parts)}"


def _chart(fill: Callable[[Axes], None], about: str, height_in: float) -> str:
    # The salt makes the SVG reproducible, and its ids differ from those of the page's other charts.
    with plt.rc_context(STYLE | {"svg.hashsalt": about}):
        figure, axes = plt.subplots(figsize=(4.8, height_in), layout="constrained")
        fill(axes)
        engine = figure.get_layout_engine()
        assert engine is not None, "constrained"
        engine.execute(figure)
        figure.set_layout_engine("none")  # else savefig draws twice
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    return _inline(stream.getvalue(), about)


def _inline(svg: str, about: str) -> str:
    """Returns a file's SVG for use within a page: without size, metadata and unused ids."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    label = f'width="100%" role="img" aria-label="{html.escape(about)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: label, svg, count=1)
