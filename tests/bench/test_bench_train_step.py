"""The training step benchmark: figures, variants that do the same work, parts that fail."""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import train_step
from bench.steps import attempts, changes
from bench.steps.attempts import attempt, failures, last_json
from bench.steps.changes import Step, base_for, changes_for, make_adamw, make_step, step_flops
from bench.steps.contenders import Resident
from bench.steps.networks import TINY, make_unet
from bench.train_step import show, take_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
def test_all_figures_are_present(tmp_path: Path) -> None:
    """Runs in a subprocess, so that the DataLoader's workers end with it."""
    flags = "--size 64 --batch-size 2 --records 4 --rounds 2 --turn 0.01 --workers 1 "
    flags += "--networks tiny --parts bare online"
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


@pytest.fixture
def resident() -> Resident:
    torch.manual_seed(0)
    return (
        torch.randn(2, 4, 8, 8),
        torch.tensor([1, 2]),
        torch.randn(2, 5, 32),
        torch.randn(2, 4, 8, 8),
    )


def test_settings_do_the_same_work(resident: Resident) -> None:
    plain, fused, sdpa = (
        make_step(how, TINY, resident, "no") for how in (Step(), Step(fused=True), Step(sdpa=True))
    )
    assert step_flops(plain) == step_flops(fused) > 0
    assert step_flops(sdpa) > 0


def test_large_latents_are_compared_with_sdpa() -> None:
    """Plain attention at 512 px takes 64 GB for the softmax alone."""
    assert base_for(8) == Step() and base_for(32) == base_for(64) == Step(sdpa=True)
    small = changes_for(base_for(8), CUDA, compiled=True)
    large = changes_for(base_for(64), CUDA, compiled=True)
    assert [*small] == ["SDPA", *large]
    assert [*large] == ["channels_last", "compile", "fused AdamW", "CUDA graph, fused AdamW"]
    assert all(step.sdpa for step in large.values())
    assert [*changes_for(base_for(64), CPU, compiled=False)] == ["channels_last", "fused AdamW"]


def test_a_recorded_step_has_fused_adamw() -> None:
    """With another AdamW, GradScaler fetches a number from the device, which a capture forbids."""
    unet = make_unet(TINY, latent_channels=4, side=8, text_width=32, device=CPU, precision="no")
    for step, fused, capturable in (
        (Step(), None, False),
        (Step(fused=True), True, False),
        (Step(cuda_graph=True), True, True),
    ):
        (group,) = make_adamw(step, unet).param_groups
        assert (group["fused"], group["capturable"]) == (fused, capturable)
        assert getattr(make_adamw(step, unet), "_step_supports_amp_scaling", False) is bool(fused)


def test_a_step_is_captured_while_other_threads_use_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    class Fake:
        def __init__(self, *_: Any) -> None: ...

        def wait_stream(self, _: Any) -> None: ...

        def replay(self) -> None:
            calls.append("replay")

    @contextlib.contextmanager
    def context(*args: Any, **settings: Any) -> Iterator[None]:
        calls.append(settings)
        yield

    for name, fake in {
        "Stream": Fake,
        "CUDAGraph": Fake,
        "current_stream": Fake,
        "stream": context,
        "graph": context,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = changes.capture(lambda: calls.append("step"), CUDA)
    replay()
    mode = {"capture_error_mode": "thread_local"}
    assert calls == [{}, "step", "step", "step", mode, "step", "replay"]


def test_a_failed_change_does_not_lose_the_others(
    resident: Resident, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(step: Step, *_: Any, **settings: Any) -> float:
        if step.channels_last:
            raise torch.OutOfMemoryError("Tried to allocate 64.00 GiB\nand more")
        return 1.2345

    monkeypatch.setattr(changes, "compare", compare)
    monkeypatch.setattr(attempts, "free", lambda: None)  # collecting garbage takes half a second
    args = argparse.Namespace(compile=False, networks="tiny", precision="no", turn=1.0, rounds=2)
    found: dict[str, Any] = {}
    printed: list[int] = []
    train_step.measure_changes(args, resident, found, lambda: printed.append(len(found)))
    reason = "OutOfMemoryError: Tried to allocate 64.00 GiB"
    assert found == {
        "base": "plain attention, default AdamW",
        "SDPA": 1.234,
        "channels_last": {"failed": reason},
        "fused AdamW": 1.234,
    }
    assert printed == [2, 3, 4], "the figures are printed after each change"
    assert f"channels_last: failed: {reason}" in capsys.readouterr().out
    assert failures({"sizes": {64: found}}) == [f"sizes / 64 / channels_last: {reason}"]


def test_an_attempt_stops_at_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "free", lambda: None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("x", interrupt)


def test_the_last_json_line_counts() -> None:
    assert last_json('{"a": 1}\ntable\n{"a": 2}\n[x]\n{cut off') == {"a": 2}
    assert last_json("nothing") is None
    assert failures({"a": {"b": 1.0}, "c": []}) == []
