"""Intervals of shares, and the charts."""

import re
from pathlib import Path

import pytest

from latent_t2i.evaluation.curves import guidance_chart, log_ticks, loss_chart, read_history, smooth
from latent_t2i.evaluation.report import wilson


def test_wilson_interval_of_known_values() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.06, 0.7, [0.1, 0.2, 0.5]),
        (0.011, 2.0, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (1e-6, 1.0, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (0.81, 0.93, [0.825, 0.85, 0.875, 0.9, 0.925]),
        (3e-12, 1e7, [1e-11, 1e-8, 1e-5, 1e-2, 1e1, 1e4, 1e7]),
    ],
)
def test_logarithmic_ticks_are_few(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("name", ["training", "validation"])
def test_a_history_of_one_line_is_visible(name: str) -> None:
    line = (
        {"step": 7, "loss": 0.5} if name == "training" else {"step": 7, "validation": {"loss": 1}}
    )
    # matplotlib draws a marker as a <use> element, as it does ticks.
    num_used = [str(loss_chart(history)).count("<use ") for history in ([line], [line] * 2)]
    assert num_used[0] > num_used[1]


def test_charts_are_reproducible_inline_svg() -> None:
    history = [{"step": step, "loss": 1 / step} for step in range(1, 9)] + [
        {"step": 9, "loss": None}
    ]
    chart = loss_chart(history)
    assert chart.startswith("<svg")
    assert chart == loss_chart(history)
    assert "validation" not in chart
    measured = [{"step": 8, "validation": {"loss": 0.5}}, {"step": 9, "validation": {"loss": 0.4}}]
    assert "validation (EMA)" in loss_chart([*history, *measured])
    assert loss_chart([{"step": 9, "loss": None}]) is None
    both = guidance_chart({"first": [(1.0, 0.2), (4.0, 0.9)], "second": [(1.0, 0.4)]})
    assert "first" in both
    assert "second" in both


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "the line is '[1]', expected a JSON object"),
        ('{"loss": 1.0}', "step is 'None', expected a finite number"),
        ('{"step": 2, "loss": "low"}', "loss is 'low', expected a finite number"),
        ('{"step": 2, "loss": NaN}', "loss is 'nan', expected a finite number"),
        ('{"step": 2, "loss": ' + "9" * 400 + "}", "expected a finite number"),
        ('{"step": 2, "validation": 3}', "validation is '3', expected a JSON object"),
        ('{"step": 2, "validation": {"loss": "low"}}', "validation.loss is 'low', expected"),
        ('{"step": 2, "time_breakdown": {"data": []}}', "time_breakdown.data is '[]', expected"),
    ],
)
def test_an_unusable_line_of_the_history_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: .*{re.escape(message)}"):
        read_history(path)
