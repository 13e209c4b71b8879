"""Rows that an evaluation lacks, with the reason: a figure without its floor or ceiling says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.inputs import Inputs
from latent_t2i.evaluation.metrics import metric_class
from latent_t2i.evaluation.metrics.metric import FeatureMetric, Metric, RowName

ONLY_STATISTICS = "the reference has statistics only: give a folder of real images as --reference"
NO_HALVES = (
    "the reference's statistics have no halves to compare: make them with evaluation.reference"
)
NOTHING_TO_JUDGE = "none of its images has the captions or objects that the metric needs"


def absent_rows(config: EvaluationConfig, inputs: Inputs) -> dict[RowName, str]:
    """Returns the rows that no metric can have with these inputs, with the reason."""
    found: dict[RowName, str] = {}
    has_statistics = inputs.statistics is not None
    if inputs.reals is None and not has_statistics:
        found["real"] = "there are no real images: --reference"
    if inputs.bundle is None:
        found["reconstruction"] = "there is no VAE that reconstructs images: --bundle"
        found["diverse"] = "there is no model that draws several images of a prompt: --bundle"
        found["memorisation"] = "there is no model that draws further images: --bundle"
        return found
    if inputs.reals is None:
        found["reconstruction"] = ONLY_STATISTICS if has_statistics else found["real"]
    if not config.num_diverse_prompts:
        found["diverse"] = "--num-diverse-prompts is 0"
    return found


def missing_rows(
    names: Sequence[str],
    figures: Mapping[str, Mapping[str, Mapping[str, float]]],
    absent: Mapping[RowName, str],
    inputs: Inputs,
) -> list[dict[str, Any]]:
    """Returns the rows that metrics lack: each with the metrics and the reason.

    `figures` are those of each row by metric; `absent` is what `absent_rows` returns.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        cls = metric_class(name)
        for row in cls.rows:
            # The further images of memorisation have their figures among its details.
            if row != "memorisation" and not figures.get(row, {}).get(name):
                reason = absent.get(row) or _reason(cls, row, inputs)
                lost = cls.lost_without.get(row)
                found.setdefault((row, f"{reason}; {lost}" if lost else reason), []).append(name)
        for figure, reason in cls.without_ceiling.items():
            metric, _, judged = figure.partition("/")
            if figures.get(judged, {}).get(metric):
                found.setdefault(("real", reason), []).append(figure)
    return [
        {"row": row, "metrics": metrics, "reason": reason}
        for (row, reason), metrics in found.items()
    ]


def _reason(cls: type[Metric], row: RowName, inputs: Inputs) -> str:
    if row == "real" and inputs.reals is None:
        return NO_HALVES if issubclass(cls, FeatureMetric) else ONLY_STATISTICS
    return NOTHING_TO_JUDGE


def without_figures(
    names: Sequence[str],
    figures: Mapping[str, Mapping[str, Mapping[str, float]]],
    missing: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Returns the chosen metrics that have a figure in no row, with the reasons."""
    found = {}
    for name in names:
        if not any(row.get(name) for row in figures.values()):
            reasons = [f"{m['row']}: {m['reason']}" for m in missing if name in m["metrics"]]
            found[name] = "no row has a figure; " + "; ".join(reasons)
    return found
