"""Rows that an evaluation lacks: which, of which metrics, and why."""

from pathlib import Path
from typing import Any

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.inputs import Inputs
from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.evaluation.missing_rows import (
    NO_HALVES,
    ONLY_STATISTICS,
    absent_rows,
    missing_rows,
    without_figures,
)
from latent_t2i.evaluation.reals import SceneReals

CONFIG = EvaluationConfig(name="x")
ITEMS = [Item(position=0, key="a")]
REALS = SceneReals(items=ITEMS, size_px=8)


def make_inputs(**settings: Any) -> Inputs:
    return Inputs(out=Path("out"), items=ITEMS, size=(8, 8), **settings)


def test_a_bundle_with_real_images_has_all_rows() -> None:
    assert absent_rows(CONFIG, make_inputs(bundle=Path("b"), reals=REALS)) == {}


def test_rows_that_need_a_bundle_images_or_a_setting() -> None:
    alone = absent_rows(CONFIG, make_inputs())
    assert alone.keys() == {"real", "reconstruction", "diverse", "memorisation"}
    few = EvaluationConfig(name="x", num_diverse_prompts=0)
    drawn = absent_rows(few, make_inputs(bundle=Path("b"), statistics=Path("r.npz")))
    assert drawn == {"reconstruction": ONLY_STATISTICS, "diverse": "--num-diverse-prompts is 0"}


def test_statistics_have_no_images_and_may_have_no_halves() -> None:
    inputs = make_inputs(bundle=Path("b"), statistics=Path("r.npz"))
    figures = {"samples": {"fid": {"fid": 3.0}, "clip_score": {"clip_score": 30.0}},
               "shuffled": {"clip_score": {"clip_score": 9.0}}, "real": {}}  # fmt: skip
    names, absent = ("fid", "clip_score"), absent_rows(CONFIG, inputs)
    assert missing_rows(names, figures, absent, inputs) == [
        {"row": "real", "metrics": ["fid"], "reason": NO_HALVES},
        {"row": "reconstruction", "metrics": ["fid", "clip_score"], "reason": ONLY_STATISTICS},
        {"row": "real", "metrics": ["clip_score"], "reason": ONLY_STATISTICS},
    ]


def test_a_ratio_of_memorisation_alone_has_no_meaning() -> None:
    inputs = make_inputs(bundle=Path("b"), statistics=Path("r.npz"))
    figures = {"samples": {"memorisation": {"memorisation/ratio": 0.9}}}
    (missing,) = missing_rows(("memorisation",), figures, absent_rows(CONFIG, inputs), inputs)
    assert missing["row"] == "reconstruction"
    assert missing["reason"].startswith(ONLY_STATISTICS)
    assert missing["reason"].endswith("and `ratio` has no meaning on its own")


def test_a_metric_without_any_figure_is_skipped() -> None:
    inputs = make_inputs(bundle=Path("b"), reals=REALS)
    figures = {"samples": {"clip_score": {}, "fid": {"fid": 1.0}}}
    missing = missing_rows(("clip_score", "fid"), figures, {}, inputs)
    skipped = without_figures(("clip_score", "fid"), figures, missing)
    assert skipped.keys() == {"clip_score"}
    assert skipped["clip_score"].startswith("no row has a figure; samples: none of its images")
