"""The report: one self-contained HTML file with figures, pictures and charts.

`render_report` takes the content of evaluation.json; nothing is computed from images here, so the
report can be written again without drawing any.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latent_t2i.evaluation import gallery
from latent_t2i.evaluation.curves import (
    COLOURS,
    bar_chart,
    history_chart,
    loss_chart,
    quarters_chart,
)
from latent_t2i.evaluation.data_card import data_card
from latent_t2i.evaluation.figures import (
    FEW_IMAGES,
    HEADLINES_OF_ALIGNMENT,
    HEADLINES_OF_QUALITY,
    describe,
    lead_order,
    show,
)
from latent_t2i.evaluation.results import read_per_image
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
    train_shards: str | None = None,
) -> str:
    """Returns the report's HTML.

    Args:
        results: The content of evaluation.json.
        out: The folder that contains it, per_image.jsonl and the pictures.
        history: The lines of the training's metrics.jsonl; None if there is none.
        info: The bundle's bundle.json; None for a folder of images.
        others: Name (or output folder) and results of runs to show beside this one.
        train_shards: Folder of the training shards, for the data card.
    """
    environment = Environment(
        loader=PackageLoader("latent_t2i.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    images = gallery.entries(read_per_image(out), out)
    lines = history or []
    return environment.get_template("report.html.j2").render(
        name=results.get("name", out.name),
        info=info,
        results=results,
        headlines=headlines(results),
        table=figure_table(results, others),
        runs=side_by_side(results, out, others),
        chosen=gallery.choose(images),
        num_images=len(images),
        guidance=guidance(results, out, images),
        settings_tables=settings_tables(results, out, images),
        convergence=convergence(results),
        has_history=history is not None,
        charts=_training_charts(lines),
        time_breakdown=_time_breakdown(lines),
        num_skipped=next((line["skipped"] for line in lines[::-1] if "skipped" in line), 0),
        categories=categories(results),
        memorisation=memorisation(results, out),
        data=_data(info, train_shards),
        settings=_flat({} if info is None else {"train": info.get("config", {})}),
        show=show,
        describe=describe,
        few=_num(results) < FEW_IMAGES,
    )


def _num(results: Mapping[str, Any], row: str = "samples") -> int:
    return int(results.get("num_images", {}).get(row, 0))


def headlines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the main figures with interval or spread, floor and ceiling, in the order to show."""
    rows, num = results["rows"], _num(results)
    found = []
    for name in lead_order(list(rows["samples"]), num):
        figure = describe(name)
        limits = [
            {"name": title, "value": show(name, rows[row][name])}
            for row, title in FLOORS.items()
            if name in rows.get(row, {})
        ]
        found.append(
            {
                "title": figure.title,
                "value": show(name, rows["samples"][name]),
                "meaning": figure.meaning,
                "better": figure.better,
                "range": uncertainty(results, name),
                "limits": limits,
                "is_grey": figure.needs_many and num < FEW_IMAGES,
                "num": f"{num:,}",
            }
        )
    return found


def uncertainty(results: Mapping[str, Any], name: str) -> str:
    """Returns a figure's 95 % interval, or mean and deviation over disjoint seed sets; "" without.

    A figure has at most one of them: set metrics have no value per image to resample.
    """
    if name in results.get("intervals", {}):
        low, high = results["intervals"][name]
        return f"95\u00a0% interval {show(name, low)} to {show(name, high)}"
    if name in results.get("spread", {}):
        spread = results["spread"][name]
        num = len(spread["values"])
        return (
            f"{num} disjoint sets: {show(name, spread['mean'])} ± {show(name, spread['std'])}"
        )
    return ""


def figure_table(
    results: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Returns all figures: value, interval or spread, floors and ceilings, and other runs' values."""
    rows = results["rows"]
    limits = {row: title for row, title in FLOORS.items() if rows.get(row)}
    names = dict.fromkeys([*rows["samples"], *(n for row in limits for n in rows[row])])
    main = lead_order(list(names), _num(results))
    return {
        "columns": [*limits.values(), *(short_name(name) for name, _ in others)],
        "rows": [
            {
                "name": name,
                "title": describe(name).title,
                "better": describe(name).better,
                "value": show(name, rows["samples"].get(name), digits=4),
                "range": uncertainty(results, name),
                "cells": [
                    show(name, values.get(name), digits=4) if name in values else ""
                    for values in (
                        *(rows[row] for row in limits),
                        *(other["rows"]["samples"] for _, other in others),
                    )
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
    results: Mapping[str, Any], out: Path, others: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any] | None:
    """Returns the other runs: how their protocols differ, and pictures of the same prompts."""
    if not others:
        return None
    from latent_t2i.evaluation.compare import differences

    labelled = [(str(out), results), *others]
    folders = {short_name(name): _samples_folder(name, run) for name, run in labelled}
    mine = gallery.entries(read_per_image(out), out)
    return {
        "differences": {
            short_name(name): differences([results, other]) for name, other in others
        },
        "strips": gallery.strips(mine, {k: v for k, v in folders.items() if v is not None}),
    }


def _samples_folder(name: str, results: Mapping[str, Any]) -> Path | None:
    path = Path(name)
    out = path.parent if path.suffix == ".json" else path
    folder = results.get("pictures", {}).get("samples")
    return out / folder if folder and (out / folder).is_dir() else None


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
    """Returns the table of semantic consistency by category, the most frequent ones first."""
    found = results.get("details", {}).get("consistency", {}).get("categories", {})
    if not found:
        return None
    ranked = sorted(found.items(), key=lambda item: -item[1].get("num", 0))
    return {
        "columns": list(dict.fromkeys(name for _, values in ranked for name in values)),
        "rows": ranked[:MAX_CATEGORIES],
        "num_more": max(0, len(ranked) - MAX_CATEGORIES),
    }


def memorisation(results: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """Returns the closest pairs of a sample and a training image."""
    details = results.get("details", {}).get("memorisation")
    if not details:
        return None
    pairs = []
    for pair in details.get("pairs", ())[:NUM_PAIRS]:
        ratio = f"ratio {pair['ratio']:.3g}"
        cards = [
            gallery.picture(out / pair[side], label, note=ratio)
            for side, label in (("sample", "sample"), ("training", f"training: {pair['key']}"))
            if pair.get(side) and (out / pair[side]).is_file()
        ]
        pairs.append(cards)
    return {"pairs": pairs}


def _data(info: Mapping[str, Any] | None, train_shards: str | None) -> dict[str, Any]:
    config = (info or {}).get("config", {})
    found = data_card(train_shards or config.get("shards"))
    if "lengths" in found:
        chart = bar_chart(found["lengths"], "tokens per caption", "captions in the sample")
        found["chart"] = Markup(chart or "")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
