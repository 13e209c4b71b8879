"""The sampling benchmarks: what they compare draws the same images, at the cost they state."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import guidance, sampling
from latent_t2i.model.bundle import sampling_scheduler
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.generate import Guidance
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def test_every_option_draws_the_stock_pipelines_images(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The tiny images are noise; the options must draw the same noise.
    options = ["overlap", "interval", "channels_last"]
    flags = [
        "--quick",
        "--num-images",
        "3",
        "--num-steps",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--bundle",
    ]
    monkeypatch.setattr("sys.argv", ["x", *flags, str(bundle), "--options", *options])
    sampling.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(figures["options"]) == ["stock", "ours", *options]
    for row in figures["options"].values():
        assert row["images_per_s"] > 0 and row["ratio_to_stock"] > 0


def test_methods_of_guidance_cost_the_same() -> None:
    objective = ObjectiveConfig(prediction="v", beta_schedule="squaredcos_cap_v2")
    scheduler: Any = sampling_scheduler(make_scheduler(objective))
    methods = guidance.plan(scheduler, object(), 40)
    assert methods["none"].num_steps == 40 and methods["plain 4"].num_steps == 20
    for method in methods.values():
        assert 38 <= method.num_evaluations <= 40
    assert guidance.evaluations(scheduler, Guidance(scale=2.0, interval=(1e5, 1e6)), 7) == 7


def test_differences_of_guidance_are_paired() -> None:
    base = np.arange(200) % 2 == 0
    assert guidance.compare(base, base) == (0, 0)
    low, high = guidance.compare(np.ones(200, bool), base)
    assert 0.4 < low < 0.5 < high < 0.6
