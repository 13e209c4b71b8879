"""The memory benchmark of evaluation: all set metrics, and the same figures for the same images."""

import math

import pytest

from bench import evaluation
from latent_t2i.evaluation.metrics import kid


def test_all_set_metrics_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "NUM_SUBSETS", kid.NUM_SUBSETS)  # the benchmark changes it
    row = evaluation.measure(130, 8)
    assert row["num_images"] == 130
    assert row["with_figures_mb"] >= row["streaming_mb"] > 0
    expected = {"fid", "kid", "inception_score", "precision", "recall", "cmmd", "mind"}
    assert expected <= row["figures"].keys()
    assert all(math.isfinite(value) for value in row["figures"].values())
