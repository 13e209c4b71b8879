"""Charts as inline SVG, in colours that are legible on light and dark backgrounds."""

import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # before pyplot is imported, so that no window system is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

COLOURS = ("#3b7dd8", "#d9722e", "#3a9a5b", "#a257c7", "#c9a227", "#2aa5a5", "#d2568c", "#8a8f98")
GREY = "#8a8f98"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "latent-t2i",  # makes the SVG reproducible
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
        for name in ("validation", "time_breakdown"):
            _check_object(place, name, line.get(name, {}))
        _check_number(place, "step", line.get("step"))
        for name, value in line.get("time_breakdown", {}).items():
            _check_number(place, f"time_breakdown.{name}", value)
        losses = {"loss": line, "validation.loss": line.get("validation", {})}
        for name, owner in losses.items():
            if owner.get("loss") is not None:  # null: every step of the interval was skipped
                _check_number(place, name, owner["loss"])
        history.append(line)
    return history


def _check_object(place: str, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {name} is {str(value)[:60]!r}, expected a JSON object")


def _check_number(place: str, name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) < sys.float_info.max):
        raise ValueError(f"{place}: {name} is {str(value)[:60]!r}, expected a finite number")


def smooth(values: Sequence[float], weight: float = 0.5) -> list[float]:
    """Returns the exponential moving average, bias-corrected as in Adam (1412.6980, section 3)."""
    smoothed, total = [], 0.0
    for number, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        smoothed.append(total / (1 - weight**number))
    return smoothed


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
    if not training and not validation:
        return None

    def fill(axes: Axes) -> None:
        if training:
            steps, losses = zip(*training, strict=True)
            axes.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=1)
            _plot(axes, steps, smooth(losses), color=COLOURS[0], label="training")
        if validation:
            _plot(axes, *zip(*validation, strict=True), color=COLOURS[1], label="validation (EMA)")
            axes.legend(frameon=False, loc="upper right")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_ylabel("loss")
        values = [loss for _, loss in (*training, *validation)]
        if min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_ylim())))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(NullLocator())

    return _chart(fill)


def _plot(axes: Axes, steps: Sequence[float], values: Sequence[float], **style: Any) -> None:
    marker = "o" if len(steps) == 1 else None  # a line through one point is invisible
    axes.plot(steps, values, linewidth=2, marker=marker, **style)


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


def guidance_chart(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plots the share of correct images against the guidance scale, one line per attribute."""

    def fill(axes: Axes) -> None:
        for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
            scales, shares = zip(*sorted(points), strict=True)
            axes.plot(scales, [100 * s for s in shares], marker="o", color=colour, label=name)
        axes.set_xlabel("guidance scale")
        axes.set_ylabel("% correct")
        axes.set_ylim(0, 103)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))

    return _chart(fill, height_in=3.9)


def _chart(fill: Callable[[Axes], None], height_in: float = 3.0) -> str:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, height_in), layout="constrained")
        fill(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = stream.getvalue()
    size = r'width="[\d.]+pt" height="[\d.]+pt"'
    return re.sub(size, 'width="100%"', svg[svg.index("<svg") :], count=1)
