"""The training step's benchmark: every figure is there, and the contenders do the same work."""

import json
from pathlib import Path

import pytest
import torch

from bench import train_step
from bench.steps import contenders
from bench.steps.changes import Step, make_step, step_flops
from bench.steps.contenders import Resident
from bench.train_step import show, take_turns
from model.denoiser import DenoiserConfig

TINY = DenoiserConfig(
    channels=(8, 16), attention=(True, True), attention_head_dim=2, norm_num_groups=4
)


def test_every_figure_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--size 64 --batch-size 2 --records 4 --rounds 2 --turn 0.01 --workers 1 --no-changes"
    monkeypatch.setattr("sys.argv", ["train_step", *flags.split(), "--folder", str(tmp_path)])
    monkeypatch.setattr(contenders, "REST_S", 0.0)
    train_step.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["sizes"]["64"]
    assert figures["steps"] >= 3 and figures["batch_size"] == 2
    for name in ("ratio_to_bare", "ratio_to_online", "share_of_ceiling", "flops_per_image"):
        assert figures[name] > 0
    assert sum(figures["ledger"].values()) == pytest.approx(1, abs=1e-3)
    assert not list(tmp_path.iterdir()), "what it wrote is gone"


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


def test_a_change_does_the_same_work() -> None:
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
