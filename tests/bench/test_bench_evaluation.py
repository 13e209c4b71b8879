"""The memory benchmark of evaluation: all set metrics, and the same figures for the same images."""

import math

from bench import evaluation


def test_all_set_metrics_are_measured() -> None:
    row = evaluation.measure(130, 8)
    assert row["num_images"] == 130
    assert row["with_figures_mb"] >= row["streaming_mb"] > 0
    expected = {"fid", "kid", "inception_score", "precision", "recall", "cmmd", "mind"}
    assert expected <= row["figures"].keys()
    assert all(math.isfinite(value) for value in row["figures"].values())
