"""The charts as inline SVG, and the training's metrics.jsonl that they plot."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from latent_t2i.evaluation.curves import (
    Series,
    bar_chart,
    front_chart,
    history_chart,
    line_chart,
    log_ticks,
    loss_chart,
    quarters_chart,
    read_history,
    thinned,
)

SERIES = Series(name="first", points=[(1.0, 20.0), (4.0, 90.0)], colour="#3b7dd8")


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


def test_thinned_values_keep_both_ends() -> None:
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert thinned(list(range(101)), 5) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("name", ["training", "validation"])
def test_a_history_of_one_line_is_visible(name: str) -> None:
    line = (
        {"step": 7, "loss": 0.5} if name == "training" else {"step": 7, "validation": {"loss": 1}}
    )
    # matplotlib draws a marker as a <use> element, as it does ticks.
    num_used = [str(loss_chart(history)).count("<use ") for history in ([line], [line] * 2)]
    assert num_used[0] > num_used[1]


def test_the_loss_chart_is_reproducible_inline_svg() -> None:
    history = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    history.append({"step": 9, "loss": None})
    chart = loss_chart(history)
    assert chart is not None
    assert chart.startswith("<svg")
    assert chart == loss_chart(history)
    assert "validation" not in chart
    measured = [{"step": 8, "validation": {"loss": 0.5}}, {"step": 9, "validation": {"loss": 0.4}}]
    assert "validation (EMA)" in str(loss_chart([*history, *measured]))
    assert loss_chart([{"step": 9, "loss": None}]) is None


def test_quarters_of_the_timesteps_are_lines_and_null_is_left_out() -> None:
    quarters = {"t1of4": 0.4, "t4of4": None}
    chart = quarters_chart([{"step": 5, "validation": {"loss": 1, "loss_by_quarter": quarters}}])
    assert "quarter 1 of 4, least noise" in str(chart)
    assert "quarter 4 of 4" not in str(chart)
    assert quarters_chart([{"step": 5, "validation": {"loss": 1}}]) is None


def test_a_chart_of_the_history_leaves_lines_without_the_number_out() -> None:
    lines = [{"step": 1, "images_per_s": 60.0}, {"step": 2}, {"step": 3, "images_per_s": 80.0}]
    assert "60 at 1 to 80 at 3" in str(history_chart(lines, "images_per_s", "images per second"))
    assert history_chart(lines, "grad_norm", "norm") is None


def test_charts_are_accessible_xml_without_ids_that_clash() -> None:
    one = line_chart(
        [SERIES], "guidance scale", "% correct", log_x=True, best=(4.0, 90.0),
        level=("real images", 99.0),
    )  # fmt: skip
    two = line_chart(
        [SERIES], "images seen", "score", whole_x=True, top={1.0: "0.1", 4.0: "0.4"}, title="CLIP"
    )
    bars = bar_chart([("3 to 4", 2.0), ("5 to 6", 7.0)], "tokens", "captions")
    front = front_chart([("1", 3.0, 4.0), ("a<b", 2.0, 5.0)], [1], "KID", "CLIP score")
    roots = [ElementTree.fromstring(str(chart)) for chart in (one, two, bars, front)]
    labels = [root.attrib["aria-label"] for root in roots]
    assert all(root.attrib["role"] == "img" for root in roots)
    assert labels[0] == "% correct against guidance scale. first: 20 at 1 to 90 at 4"
    assert labels[1].startswith("CLIP against images seen")
    assert labels[2] == "captions by tokens; most in 5 to 6"
    assert labels[3].endswith("on the Pareto front: a<b")
    ids = [
        element.attrib["id"] for root in roots for element in root.iter() if "id" in element.attrib
    ]
    assert len(ids) == len(set(ids))
    assert "metadata" not in str(one)
    assert bar_chart([], "tokens", "captions") is None
    assert line_chart([], "x", "y") is None


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
        ('{"step": 2, "images_per_s": "fast"}', "images_per_s is 'fast', expected"),
        ('{"step": 2, "validation": 3}', "validation is '3', expected a JSON object"),
        ('{"step": 2, "validation": {"loss": "low"}}', "validation.loss is 'low', expected"),
        (
            '{"step": 2, "validation": {"loss_by_quarter": {"t1of4": []}}}',
            "validation.loss_by_quarter.t1of4 is '[]', expected",
        ),
        ('{"step": 2, "time_breakdown": {"data": []}}', "time_breakdown.data is '[]', expected"),
    ],
)
def test_an_unusable_line_of_the_history_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: .*{re.escape(message)}"):
        read_history(path)
