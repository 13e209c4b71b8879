"""The training step benchmark: all figures are present, and variants do the same work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import train_step
from bench.steps.changes import Step, make_step, step_flops
from bench.steps.contenders import Resident
from bench.train_step import show, take_turns
from latent_t2i.model.denoiser import DenoiserConfig

TINY = DenoiserConfig(
    channels=(8, 16), attention=(True, True), attention_head_dim=2, norm_num_groups=4
)


@pytest.mark.slow
def test_all_figures_are_present(tmp_path: Path) -> None:
    """Runs in a subprocess, so that the DataLoader's workers end with it."""
    flags = "--size 64 --batch-size 2 --records 4 --rounds 2 --turn 0.01 --workers 1 --no-changes"
    done = subprocess.run(
        [sys.executable, train_step.__file__, *flags.split(), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    figures = json.loads(done.stdout.splitlines()[-1])["sizes"]["64"]
    assert figures["steps"] >= 3 and figures["batch_size"] == 2
    for name in ("ratio_to_bare", "ratio_to_online", "share_of_ceiling", "flops_per_image"):
        assert figures[name] > 0
    assert sum(figures["time_breakdown"].values()) == pytest.approx(1, abs=1e-3)
    assert not list(tmp_path.iterdir()), "the temporary folder is removed"


def test_ratios_are_medians_within_rounds() -> None:
    seconds = {"bare": iter([1.0, 2.0, 3.0]), "ours": iter([2.0, 2.0, 30.0])}
    order = []

    def turn(name: str, num_steps: int) -> float:
        order.append(name)
        return next(seconds[name]) * num_steps

    turns = {name: lambda n, name=name: turn(name, n) for name in seconds}
    rounds = take_turns(turns, "bare", 5, 3)
    assert rounds == [(1, 2), (2, 2), (3, 30)]
    assert order == ["bare", "ours", "ours", "bare", "bare", "ours"]
    figures = show("bare", rounds, batch_size=4)
    assert figures == {"bare": 2.0, "ours_beside_bare": 2.0, "ratio_to_bare": 0.5}


def test_settings_do_the_same_work() -> None:
    torch.manual_seed(0)
    resident: Resident = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([1, 2]),
        torch.randn(2, 5, 32),
        torch.randn(2, 4, 8, 8),
    )
    plain, fused, sdpa = (
        make_step(how, TINY, resident, "no") for how in (Step(), Step(fused=True), Step(sdpa=True))
    )
    assert step_flops(plain) == step_flops(fused) > 0
    assert step_flops(sdpa) > 0
