"""Compares evaluations that have the same protocol: `python -m evaluation.compare A B ...`.

Each argument is the output folder of evaluation.run, or its evaluation.json. Runs whose protocols
differ are refused, with every field that differs, because such figures say nothing about the
models; --force prints them anyway, marked. The figures are those of all images: never the minimum,
or another choice, of repeated evaluations.

    python -m evaluation.compare runs/demo runs/longer

Differences of metrics with a value per image come with a 95 % interval: a paired bootstrap over the
prompts. For the other metrics, such as FID, the spread over disjoint sets of images is printed.
"""

import argparse
import json
import string
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from latent_t2i.evaluation.figures import (
    contamination_gap,
    describe,
    lead_order,
    main_figures,
    show,
)
from latent_t2i.evaluation.intervals import interval
from latent_t2i.model.checks import read_json_object

RESULTS_FILE = "evaluation.json"
PER_IMAGE_FILE = "per_image.jsonl"
OBJECTS = ("rows", "num_images", "intervals", "spread", "warnings")
COLUMNS = 80
NAME_WIDTH = 30
CELL_WIDTH = 12
RUNS_PER_TABLE = (COLUMNS - NAME_WIDTH) // CELL_WIDTH
ABSENT = "(absent)"
OF_THE_MODEL = {f"metrics/memorisation/{name}" for name in ("train_sha256", "num_train_images")}
"""Fields of the record that describe the model's training set: models of different data compare."""
MARK = " ≠"


def read_results(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the name, and the evaluation.json of an output folder or the file itself.

    Raises ValueError if it is missing or lacks what a comparison needs.
    """
    path = Path(name)
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist; expected the output folder of evaluation.run, or its "
            f"{RESULTS_FILE}"
        )
    results = read_json_object(file, {"protocol": dict, "protocol_id": str, "rows": dict})
    for part in OBJECTS:
        if not isinstance(results.setdefault(part, {}), dict):
            raise ValueError(f"{file}: {part}: expected an object, found {results[part]!r:.60}")
    samples = results["rows"].get("samples")
    if not isinstance(samples, dict) or not all(map(_is_value, samples.values())):
        raise ValueError(f"{file}: rows.samples: expected numbers by figure, found {samples!r:.60}")
    return name, results


def read_per_image(name: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of an evaluation's per_image.jsonl by position; none if it is absent.

    `name` is as in `read_results`. Raises ValueError, with the line, for one that is not of the
    form {"position": int, "prompt": str, "values": {figure: number}}.
    """
    path = _folder(name) / PER_IMAGE_FILE
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        lines = [_parse_line(f"{path}, line {n}", text) for n, text in enumerate(file, start=1)]
    return sorted(lines, key=lambda line: int(line["position"]))


def _folder(name: str | Path) -> Path:
    path = Path(name)
    return path if path.is_dir() else path.parent


def _parse_line(place: str, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {text[:60]!r}") from error
    if (
        not isinstance(line, dict)
        or type(line.get("position")) is not int
        or not isinstance(line.get("values"), dict)
        or not all(map(_is_value, line["values"].values()))
    ):
        raise ValueError(
            f"{place}: expected an object with an integer position and numbers as values, found "
            f"{text[:60]!r}"
        )
    return line


def _is_value(value: object) -> bool:
    """Returns whether a figure is a number, or null where it is not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def differences(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns the protocol fields that differ, each with every run's value.

    The networks of a metric count only among the runs that computed it: a figure that is missing in
    one run makes the others no less comparable.
    """
    protocols = [run["protocol"] for run in runs]
    found = {}
    names = dict.fromkeys(name for protocol in protocols for name in protocol)
    for field in (name for name in names if name not in OF_THE_MODEL):
        sharing = [protocol for protocol in protocols if _computed(field, protocol)]
        values = [_text(protocol.get(field, ABSENT)) for protocol in sharing]
        if len(set(values)) > 1:
            found[field] = [_text(protocol.get(field, ABSENT)) for protocol in protocols]
    return found


def _computed(field: str, protocol: Mapping[str, Any]) -> bool:
    """Returns whether the protocol has the metric of a field such as `metrics/fid/weights`."""
    kind, _, rest = field.partition("/")
    prefix = f"metrics/{rest.partition('/')[0]}/"
    return kind != "metrics" or any(name.startswith(prefix) for name in protocol)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def compare(names: Sequence[str], *, force: bool = False) -> Iterator[str]:
    """Yields the lines of the comparison, at most 80 columns wide.

    Raises ValueError if the protocols differ, unless `force` is set.
    """
    runs = [read_results(name)[1] for name in names]
    different = differences(runs)
    if different and not force:
        fields = "; ".join(f"{f}: {' against '.join(v)}" for f, v in different.items())
        raise ValueError(
            f"the protocols differ in {len(different)} fields, so the figures cannot be compared: "
            f"{fields}. Evaluate with equal settings, or add --force to print them anyway"
        )
    letters = _letters(len(names))
    for letter, name, run in zip(letters, names, runs, strict=True):
        yield from _describe_run(letter, name, run)
    if different:
        yield ""
        yield from _wrap(f"The protocols differ, so figures marked{MARK} cannot be compared:", "")
        for field, values in different.items():
            pairs = (f"{letter} {value}" for letter, value in zip(letters, values, strict=True))
            yield from _wrap(f"{field}: {', '.join(pairs)}", "  ")
    yield from _table(letters, runs, MARK if different else "")
    yield from _describe_differences(letters, names, runs, MARK if different else "")


def _letters(num: int) -> list[str]:
    letters = string.ascii_uppercase
    return [letters[i] if num <= len(letters) else f"R{i + 1}" for i in range(num)]


def _describe_run(letter: str, name: str, run: Mapping[str, Any]) -> list[str]:
    num = run["num_images"].get("samples", "an unknown number of")
    text = f"{letter}  {name}: {num} images, protocol {run['protocol_id']}"
    contaminated = (run.get("contamination") or {}).get("count", 0)
    if contaminated:
        text += f"; CONTAMINATED: {contaminated} images are in the training set"
    gap = contamination_gap(run)
    if gap is not None:
        text += f"; contamination {gap}"
    lines = _wrap(text, "   ")
    names: dict[str, list[str]] = {}
    for metric, warning in run.get("warnings", {}).items():
        names.setdefault(warning, []).append(metric)
    for warning, metrics in names.items():
        lines += _wrap(f"   warning, {' and '.join(metrics)}: {warning}", "   ")
    return lines


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent="", subsequent_indent=indent or "  ", break_on_hyphens=False
    )


def _table(letters: Sequence[str], runs: Sequence[Mapping[str, Any]], mark: str) -> Iterator[str]:
    """Yields the figures of all runs, a few runs at a time, with interval or spread below."""
    for start in range(0, len(runs), RUNS_PER_TABLE):
        part = slice(start, start + RUNS_PER_TABLE)
        yield ""
        yield f"{'figure':<{NAME_WIDTH}}" + "".join(f"{x:>{CELL_WIDTH}}" for x in letters[part])
        for name in _figures(runs):
            cells = [show(name, main_figures(run).get(name), digits=4) for run in runs[part]]
            yield from _line(f"{name}{mark}", cells)
            ranges = [_range(run, name) for run in runs[part]]
            if any(ranges):
                yield from _line("  95 % interval, or deviation", ranges)


def _figures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the figures of any run, the main ones first."""
    names = list(dict.fromkeys(name for run in runs for name in main_figures(run)))
    main = lead_order(names, min(int(run["num_images"].get("samples", 0)) for run in runs))
    return [*main, *(name for name in names if name not in main)]


def _range(run: Mapping[str, Any], name: str) -> str:
    if name in run["intervals"]:
        low, high = (show(name, bound).removesuffix("\u00a0%") for bound in run["intervals"][name])
        return f"{low}..{high}"
    return f"± {show(name, run['spread'][name]['std'])}" if name in run["spread"] else ""


def _line(name: str, cells: Sequence[str]) -> list[str]:
    text = "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells)
    if len(name) < NAME_WIDTH:
        return [f"{name:<{NAME_WIDTH}}{text}".rstrip()]
    return [*_wrap(name, "  "), f"{'':<{NAME_WIDTH}}{text}".rstrip()]


def _describe_differences(
    letters: Sequence[str], names: Sequence[str], runs: Sequence[Mapping[str, Any]], mark: str
) -> Iterator[str]:
    """Yields the differences of each run from the first."""
    first = read_per_image(names[0])
    for letter, name, run in zip(letters[1:], names[1:], runs[1:], strict=True):
        paired = paired_differences(first, read_per_image(name))
        yield ""
        yield f"{letter} - {letters[0]}"
        for figure in _figures([runs[0], run]):
            yield from _line_of_difference(figure, runs[0], run, paired.get(figure, {}), mark)


def _line_of_difference(
    name: str,
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    paired: Mapping[tuple[int, str], float],
    mark: str,
) -> list[str]:
    first, second = (main_figures(run).get(name) for run in (one, other))
    if first is None or second is None:
        return _wrap(f"{name}: not in both runs", "    ")
    unit, factor = ("\u00a0%", 100) if describe(name).is_share else ("", 1)
    text = f"{name}{mark}: {factor * (second - first):+.4g}{unit}"
    if paired:
        low, high = interval(list(paired.values()), [prompt for _, prompt in paired])
        verdict = "clear" if low > 0 or high < 0 else "within chance"
        text += f", 95 % interval {factor * low:+.3g} to {factor * high:+.3g}: {verdict}"
    elif name in one["spread"] and name in other["spread"]:
        spreads = [run["spread"][name] for run in (one, other)]
        stds = [f"{factor * spread['std']:.3g}" for spread in spreads]
        num = len(spreads[0]["values"])
        text += f", deviations over {num} disjoint sets {stds[0]} and {stds[1]}"
    else:
        text += ", without an interval"
    return _wrap(text, "    ")


def paired_differences(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]
) -> dict[str, dict[tuple[int, str], float]]:
    """Returns each figure's differences, other - one, by position and prompt.

    They are of the images whose position and prompt both runs have.
    """
    before, after = _by_figure(one), _by_figure(other)
    return {
        name: {key: after[name][key] - values[key] for key in sorted(after[name].keys() & values)}
        for name, values in before.items()
        if name in after
    }


def _by_figure(
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, dict[tuple[int, str], float]]:
    """Returns the values of each figure by position and prompt."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for line in lines:
        for name, value in line["values"].items():
            if value is not None and isfinite(value):
                key = (line["position"], str(line.get("prompt", "")))
                found.setdefault(name, {})[key] = value
    return found


def main(prog: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "output folders of evaluation.run, or evaluation.json files"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=about)
    about = "print the figures of different protocols, with marks"
    parser.add_argument("--force", action="store_true", help=about)
    arguments = parser.parse_args()
    if len(arguments.runs) < 2:
        parser.error(f"expected two or more runs, found {arguments.runs[0]!r} only")
    try:
        for line in compare(arguments.runs, force=arguments.force):
            print(line)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
