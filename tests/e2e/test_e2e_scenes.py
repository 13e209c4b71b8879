"""The four commands in sequence, started from another folder, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_t2i.model.paths import ROOT

SHORT = ["--config", "demo", "--name", "short"]


def run(folder: Path, *command: str) -> str:
    """Runs a command of the checkout in `folder`, in the C locale; returns its output."""
    environment = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_four_commands(elsewhere: Path) -> None:
    out = ["--out", "run"]
    shards = ["--source.num-images", "40", "--out", "shards"]
    run(elsewhere, "-m", "latent_t2i.pipeline.run", *SHORT, *shards)
    steps = [
        "--shards",
        "shards",
        "--num-steps",
        "2",
        "--batch-size",
        "8",
        "--log-every-steps",
        "1",
    ]
    run(elsewhere, str(ROOT / "train" / "run.py"), *SHORT, *steps, *out)
    bundle = ["--bundle", "run/bundle", "--num-steps", "2"]
    run(elsewhere, "-m", "latent_t2i.sample.run", *SHORT, *bundle, *out)
    few = ["--run", "run", "--num-prompts", "2", "--guidance-scales", "1", "4", "--metrics"]
    few += ["oracle", "clip_score", "cmmd"]
    output = run(elsewhere, "-m", "latent_t2i.evaluation.run", *SHORT, *bundle, *out, *few)
    files = {path.name for path in (elsewhere / "run").iterdir()}
    assert {"samples.png", "report.html", "metrics.json", "metrics.jsonl", "bundle"} <= files
    metrics = json.loads((elsewhere / "run" / "metrics.json").read_text())
    assert {"oracle/single/shape_and_colour", "oracle/pair/colours", "clip_score"} <= set(metrics)
    assert "oracle/single/shape_and_colour" in output
    assert "report.html" in output
