"""The report: one self-contained HTML file with figures, pictures and charts.

`render_report` takes the content of evaluation.json; nothing is computed from images here, so the
report can be written again without drawing any.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latent_t2i.evaluation import gallery
from latent_t2i.evaluation.compare import differences, read_per_image
from latent_t2i.evaluation.curves import (
    COLOURS,
    Series,
    bar_chart,
    history_chart,
    line_chart,
    loss_chart,
    quarters_chart,
)
from latent_t2i.evaluation.data_card import data_card, locations_of
from latent_t2i.evaluation.figures import (
    FEW_IMAGES,
    contamination_gap,
    describe,
    lead_order,
    main_figures,
    show,
)
from latent_t2i.evaluation.sweep_charts import convergence, guidance, settings_tables

FLOORS = {"shuffled": "shuffled captions", "reconstruction": "VAE's reconstructions",
          "real": "real images"}  # fmt: skip
"""Rows of floors and ceilings, and how the report calls them."""
MAX_CATEGORIES = 40
NUM_PAIRS = 8


def render_report(
    results: Mapping[str, Any],
    out: Path,
    *,
    history: Sequence[Mapping[str, Any]] | None,
    info: Mapping[str, Any] | None,
    others: Sequence[tuple[str, Mapping[str, Any]]] = (),
    train_shards: Sequence[str] = (),
) -> str:
    """Returns the report's HTML.

    Args:
        results: The content of evaluation.json.
        out: The folder that contains it, per_image.jsonl and the pictures.
        history: The lines of the training's metrics.jsonl; None if there is none.
        info: The bundle's bundle.json; None for a folder of images.
        others: Name (or output folder) and results of runs to show beside this one.
        train_shards: Folders of the training shards, for the data card.
    """
    environment = Environment(
        loader=PackageLoader("latent_t2i.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        _context(results, out, history, info, others, train_shards)
    )


def _context(
    results: Mapping[str, Any],
    out: Path,
    history: Sequence[Mapping[str, Any]] | None,
    info: Mapping[str, Any] | None,
    others: Sequence[tuple[str, Mapping[str, Any]]],
    train_shards: Sequence[str],
) -> dict[str, Any]:
    """Returns what the template shows; the arguments are those of `render_report`."""
    images = gallery.entries(read_per_image(out), out)
    lines = history or []
    found = {
        "name": results.get("name", out.name),
        "info": info,
        "results": results,
        "metrics": results.get("metrics", {}),
        "skipped": results.get("skipped", {}),
        "missing_rows": _missing_rows(results),
        "num_samples": _num(results),
        "contamination": {"count": 0, "num_images_compared": 0}
        | (results.get("contamination") or {}),
        "contamination_gap": contamination_gap(results),
        "few": _num(results) < FEW_IMAGES,
        "few_images": FEW_IMAGES,
        "headlines": headlines(results),
        "table": figure_table(results, others),
        "runs": side_by_side(results, images, others),
        "chosen": gallery.choose(images),
        "num_images": len(images),
        "has_checks": any(image.checks for image in images),
        "guidance": guidance(results, out, images),
        "settings_tables": settings_tables(results, out, images),
        "convergence": convergence(results),
        "has_history": history is not None,
        "charts_of_training": _training_charts(lines),
        "time_breakdown": _time_breakdown(lines),
        "num_skipped": next((line["skipped"] for line in lines[::-1] if "skipped" in line), 0),
        "categories": categories(results),
        "descriptions": _details(results, "caption_similarity").get("examples", ()),
        "details": _scalars(results.get("details", {})),
        "memorisation": memorisation(results, out),
        "data": _data(info, train_shards),
        "settings": _flat((info or {}).get("config", {})),
    }
    return {**found, "sections": _sections(found)}


def _sections(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns anchor and title of the sections that the page has."""
    sweeps = [(sweep["key"], sweep["title"]) for sweep in found["settings_tables"]]
    titles = [
        ("figures", "All figures"), ("runs", "Side by side"), ("pictures", "Pictures"),
        ("guidance", "Guidance"), *sweeps, ("convergence", "Convergence"), ("training", "Training"),
        ("categories", "Objects by category"), ("descriptions", "Descriptions"),
        ("memorisation", "Memorisation"), ("data", "Training data"),
    ]  # fmt: skip
    optional = ("runs", "guidance", "convergence", "categories", "descriptions", "memorisation")
    return [(key, title) for key, title in titles if key not in optional or found[key]]


def _details(results: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """Returns a metric's details of the samples."""
    found: Mapping[str, Any] = results.get("details", {}).get(metric, {}).get("samples", {})
    return found


def _num(results: Mapping[str, Any], row: str = "samples") -> int:
    return int(results.get("num_images", {}).get(row, 0))


def headlines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the main figures with interval or spread, floor and ceiling, in the order to show."""
    values, num = main_figures(results), _num(results)
    found = []
    for name in lead_order(values, num):
        figure = describe(name)
        found.append(
            {
                "title": figure.title,
                "value": show(name, values[name]),
                "meaning": figure.meaning,
                "better": figure.better,
                "range": uncertainty(results, name),
                "limits": _limits(results, name),
                "is_grey": figure.needs_many and num < FEW_IMAGES,
                "warning": results.get("warnings", {}).get(name.partition("/")[0], ""),
                "num": f"{num:,}",
            }
        )
    return found


def _missing_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the floors and ceilings that are missing: their row and metrics, and the reason."""
    return [
        (f"{FLOORS.get(row['row'], row['row'])}: {', '.join(row['metrics'])}", row["reason"])
        for row in results.get("missing_rows", ())
    ]


def _limits(results: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    """Returns floors and ceilings of a figure."""
    rows = results["rows"]
    found = {title: rows.get(row, {}).get(name) for row, title in FLOORS.items()}
    found["human captions"] = rows["samples"].get(f"{name}/human")
    return [
        {"name": title, "value": show(name, value)}
        for title, value in found.items()
        if value is not None
    ]


def uncertainty(results: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Returns the range of a figure and its kind; both are empty without one.

    It is the 95 % interval of a figure with a value per image, else mean and deviation over
    disjoint sets of images.
    """
    if name in results.get("intervals", {}):
        low, high = results["intervals"][name]
        return f"{show(name, low)} to {show(name, high)}", "95\u00a0% interval"
    if name in results.get("spread", {}):
        spread = results["spread"][name]
        text = f"{show(name, spread['mean'])} ± {show(name, spread['std'], digits=2)}"
        return text, f"{len(spread['values'])} disjoint sets"
    return "", ""


def figure_table(
    results: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Returns all figures with interval or spread, floors, ceilings, and other runs' values."""
    rows, values = results["rows"], main_figures(results)
    limits = {row: title for row, title in FLOORS.items() if rows.get(row)}
    names = dict.fromkeys([*values, *(n for row in limits for n in rows[row] if n != "lpips")])
    main = lead_order(names, _num(results))
    columns = [*(rows[row] for row in limits), *(main_figures(other) for _, other in others)]
    return {
        "columns": [*limits.values(), *(short_name(name) for name, _ in others)],
        "rows": [
            {
                "name": name,
                "title": describe(name).title,
                "better": describe(name).better,
                "value": show(name, values[name], digits=4) if name in values else "",
                "range": uncertainty(results, name),
                "cells": [
                    show(name, column[name], digits=4) if name in column else ""
                    for column in columns
                ],
            }
            for name in [*main, *(name for name in names if name not in main)]
        ],
    }


def short_name(name: str) -> str:
    """Returns the last part of a run's folder, without the file's name."""
    path = Path(name)
    return path.parent.name if path.suffix == ".json" else path.name or name


def side_by_side(
    results: Mapping[str, Any],
    images: Sequence[gallery.Entry],
    others: Sequence[tuple[str, Mapping[str, Any]]],
) -> dict[str, Any] | None:
    """Returns the other runs: how their protocols differ, and pictures of the same prompts."""
    if not others:
        return None
    mine = {image.position: image.path for image in images}
    prompts = {image.position: image.prompt for image in images}
    columns = {"this run": mine}
    for name, _ in others:
        path = Path(name)
        found = gallery.entries(read_per_image(name), path if path.is_dir() else path.parent)
        columns[short_name(name)] = {
            image.position: image.path
            for image in found
            if prompts.get(image.position) == image.prompt
        }
    return {
        "differences": {short_name(name): differences([results, run]) for name, run in others},
        "strips": gallery.strips(images, columns),
    }


def _training_charts(history: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Returns the charts of the training, by title, those without a value left out."""
    charts = {
        "Loss": loss_chart(history),
        "Validation loss by timestep": quarters_chart(history),
        "Throughput": history_chart(history, "images_per_s", "images per second"),
        "Gradient norm": history_chart(history, "grad_norm", "gradient norm before clipping"),
    }
    if any(line.get("skipped") for line in history):
        charts["Skipped steps"] = history_chart(history, "skipped", "skipped steps in all")
    return {title: Markup(svg) for title, svg in charts.items() if svg is not None}


def _time_breakdown(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Returns phase, mean share of training time and colour, the largest share first."""
    lines = [line["time_breakdown"] for line in history if "time_breakdown" in line]
    names = {name for line in lines for name in line}
    means = {name: sum(line.get(name, 0.0) for line in lines) / len(lines) for name in names}
    ranked = sorted(means.items(), key=lambda item: -item[1])
    return [(*item, COLOURS[number % len(COLOURS)]) for number, item in enumerate(ranked)]


def categories(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the table of semantic consistency by category, the most frequent ones first.

    Each row has the number of prompts that name the category, and the shares of images in which it
    is present and rightly counted, for samples and for real images.
    """
    details = results.get("details", {}).get("consistency", {})
    found = _details(results, "consistency").get("categories")
    if not found:
        return None
    real = details.get("real", {}).get("categories", {})
    rows = [
        (name, f"{values['num']:.0f}", [
            _percent(row.get(key))
            for key in ("presence", "count")
            for row in (values, real.get(name, {}))
        ])
        for name, values in sorted(found.items(), key=lambda item: -item[1]["num"])
    ]  # fmt: skip
    columns = ("present", "present, real", "counted", "counted, real")
    return {
        "columns": columns,
        "rows": rows[:MAX_CATEGORIES],
        "num_more": max(0, len(rows) - MAX_CATEGORIES),
        "threshold": details["samples"].get("threshold", {}),
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}\u00a0%"


def memorisation(results: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """Returns the closest pairs of a sample and a training image, and the ratios by group."""
    details = _details(results, "memorisation")
    if not details:
        return None
    cards = []
    for pair in details["pairs"]:
        if pair.get("file") and (out / pair["file"]).is_file():
            label = f"{pair['prompt'] or 'image'} | training image {pair['train_key']}"
            if pair.get("train_caption"):
                label += f": {pair['train_caption']}"
            note = f"ratio {pair['ratio']:.3g}"
            cards.append(gallery.picture(out / pair["file"], label, note=note))
    groups = details.get("groups", {})
    return {
        "pairs": cards[:NUM_PAIRS],
        "chart": Markup(_ratio_chart(groups, details.get("edges", ())) or ""),
        "groups": {name.replace("_", " "): group for name, group in groups.items()},
        "num_images": details.get("num_train_images"),
        "num_records": details.get("num_train_records"),
    }


def _ratio_chart(groups: Mapping[str, Any], edges: Sequence[float]) -> str | None:
    """Plots the distribution of the ratios in each group, the held-out images dashed."""
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    series = []
    for (name, group), colour in zip(groups.items(), COLOURS, strict=False):
        total = max(1, sum(group["histogram"]))
        shares = [100 * count / total for count in group["histogram"]]
        points = list(zip(middles, shares, strict=True))
        is_dashed = name == "held_out"
        series.append(
            Series(name=name.replace("_", " "), points=points, colour=colour, is_dashed=is_dashed)
        )
    return line_chart(series, "ratio", "% of the images")


def _data(info: Mapping[str, Any] | None, train_shards: Sequence[str]) -> dict[str, Any]:
    config = (info or {}).get("config", {})
    found = data_card(train_shards or locations_of(config))
    if "lengths" in found:
        chart = bar_chart(found["lengths"], "tokens per caption", "captions in the sample")
        found["chart"] = Markup(chart or "")
    return found


def _scalars(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the numbers and texts of the metrics' details, without lists and long tables."""
    flat = _flat(values)
    return [
        (name, value)
        for name, value in flat
        if isinstance(value, str | int | float) and ".categories." not in name
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
