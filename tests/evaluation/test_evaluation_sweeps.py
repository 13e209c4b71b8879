"""The best value, the Pareto front and the rank correlation of sweeps, and what figures mean."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.evaluation import figures
from latent_t2i.evaluation.figures import describe, lead_order, main_figures, show
from latent_t2i.evaluation.metrics import METRICS
from latent_t2i.evaluation.sweeps import best, pareto_front, rank_correlation, smooth

VALUE = st.integers(-3, 3).map(float)
DIRECTIONS = st.sampled_from(["higher", "lower"])


def test_the_pareto_front_of_known_points() -> None:
    points = [(1.0, 5.0), (2.0, 9.0), (3.0, 8.0), (0.5, 1.0), (math.nan, 10.0)]
    assert pareto_front(points, ("lower", "higher")) == [3, 0, 1]
    assert pareto_front(points, ("higher", "higher")) == [2, 1]


@settings(max_examples=40)
@given(st.lists(st.tuples(VALUE, VALUE)), st.tuples(DIRECTIONS, DIRECTIONS))
def test_the_front_is_exactly_what_nothing_beats(
    points: list[tuple[float, float]], better: tuple[figures.Direction, figures.Direction]
) -> None:
    front = pareto_front(points, better)

    def no_worse(a: float, b: float, direction: str) -> bool:
        return a >= b if direction == "higher" else a <= b

    for number, point in enumerate(points):
        beaten = any(
            other != point and all(map(no_worse, other, point, better)) for other in points
        )
        assert (number in front) != beaten


@settings(max_examples=40)
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, unique=True))
def test_any_increasing_map_has_rank_correlation_one(xs: list[float]) -> None:
    ordered = sorted(xs)
    ranks = [float(ordered.index(x)) ** 3 for x in xs]
    assert rank_correlation(xs, ranks) == pytest.approx(1)
    assert rank_correlation(xs, [-rank for rank in ranks]) == pytest.approx(-1)


def test_a_rank_correlation_of_too_few_or_constant_values_is_unknown() -> None:
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 2, None, math.nan], [1, 2, 3, 4]) is None
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None


def test_the_best_value_is_by_direction_and_skips_missing_ones() -> None:
    values = [3.0, None, 1.0, math.nan, 3.0]
    assert best(values, "lower") == 2
    assert best(values, "higher") == 0
    assert best([None], "lower") is None


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


def test_few_images_put_unbiased_figures_before_fid() -> None:
    names = ["fid", "clip_score", "coverage", "kid", "cmmd", "frechet_distance", "oracle/x/y"]
    few = lead_order(names, 9_999)
    assert few == ["clip_score", "kid", "cmmd", "coverage", "fid", "frechet_distance"]
    assert lead_order(names, 10_000)[:2] == ["clip_score", "fid"]


def test_figures_that_are_not_listed_are_shown_under_their_name() -> None:
    assert describe("novel/figure").title == "novel/figure"
    assert describe("oracle/pair/colours").title == "Two objects, colours"
    assert describe("oracle/held_out/all").title == "Oracle, held out: all"
    assert describe("r_precision/of_18").title == "R-precision among 18"
    assert {describe(name).family for name in ("fid", "kid", "cmmd", "mind")} == {"quality"}


def test_every_metric_has_a_figure() -> None:
    lacking = [
        name for name in METRICS
        if name != "prdc" and not any(pattern.startswith(name) for pattern in figures.FIGURES)
    ]  # fmt: skip
    assert not lacking


def test_values_as_text() -> None:
    assert show("oracle/pair/colours", 0.8751) == "88\u00a0%"
    assert show("oracle/pair/colours", 0.8751, digits=4) == "87.5\u00a0%"
    assert [show("fid", value) for value in (31.257, 0.0012345, 1234.5, 100.0)] == [
        "31.3", "0.00123", "1,234", "100",
    ]  # fmt: skip
    assert show("fid", None) == show("fid", math.nan) == "none"


def test_lpips_of_its_rows_counts_among_the_main_figures() -> None:
    rows = {"samples": {"fid": 3.0}, "diverse": {"lpips": 0.3}, "reconstruction": {"lpips": 0.1}}
    assert main_figures({"rows": rows}) == {
        "fid": 3.0, "lpips/diverse": 0.3, "lpips/reconstruction": 0.1,
    }  # fmt: skip
