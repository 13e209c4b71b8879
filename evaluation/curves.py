"""Charts as inline SVG, in colours that are legible on light and dark backgrounds."""

import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # before pyplot is imported, so that no window system is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter

COLOURS = ("#3b7dd8", "#d9722e", "#3a9a5b", "#a257c7")
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


def loss_chart(history: Sequence[Mapping[str, Any]]) -> str:
    """Plots the training loss, raw and smoothed, and the validation loss against the step."""
    finite = [line for line in history if line.get("loss") is not None]
    steps = [line["step"] for line in finite]
    losses = [line["loss"] for line in finite]
    measured = [line for line in history if line.get("validation", {}).get("loss") is not None]

    def fill(axes: Axes) -> None:
        axes.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=1)
        axes.plot(steps, smooth(losses), color=COLOURS[0], linewidth=2, label="training")
        if measured:
            at_steps = [line["step"] for line in measured]
            values = [line["validation"]["loss"] for line in measured]
            axes.plot(at_steps, values, color=COLOURS[1], linewidth=2, label="validation (EMA)")
            axes.legend(frameon=False, loc="upper right")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        if losses and min(losses) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))

    return _chart(fill)


def guidance_chart(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plots the share of correct images against the guidance scale, one line per attribute."""

    def fill(axes: Axes) -> None:
        for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
            scales, shares = zip(*sorted(points), strict=True)
            axes.plot(scales, [100 * s for s in shares], marker="o", color=colour, label=name)
        axes.set_xlabel("guidance scale")
        axes.set_ylabel("% correct")
        axes.set_ylim(0, 103)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return _chart(fill)


def _chart(fill: Any) -> str:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
        fill(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = stream.getvalue()
    size = r'width="[\d.]+pt" height="[\d.]+pt"'
    return re.sub(size, 'width="100%"', svg[svg.index("<svg") :], count=1)
