"""The figures of an interval, its unfinished rest in a checkpoint, and the ledger."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from train.ledger import PHASES, Ledger
from train.progress import Progress, shorten, truncate_metrics


def make(folder: Path, interval: int = 4) -> Progress:
    """A progress that has begun at step 0."""
    progress = Progress(Accelerator(cpu=True, mixed_precision="no"), folder, interval)
    progress.open(0, 100, {})
    return progress


def add(progress: Progress, *losses: float) -> None:
    """Adds steps; one whose loss is not a number was skipped."""
    for loss in losses:
        value = torch.tensor(loss)
        progress.add(value, 2 * value, value.isnan().float())


def test_figures_leave_skipped_steps_out_but_count_them(tmp_path: Path) -> None:
    progress = make(tmp_path)
    add(progress, 1.0, float("nan"), 4.0, float("nan"))
    assert progress.fetch(14) == (
        4,
        {"step": 14, "loss": 2.5, "grad_norm": 5.0, "skipped": 2},
        [11, 13],
    )
    assert progress.num_skipped_in_a_row == 1
    add(progress, float("nan"))
    _, figures, bad = progress.fetch(15)
    assert (figures["loss"], bad, progress.num_skipped_in_a_row) == (None, [14], 2)


@pytest.mark.parametrize(
    ("interval", "length", "loss", "skipped"),
    [(4, 4, 2.0, [2]), (3, 1, 3.0, []), (2, 2, 3.0, [2])],  # the last two: the setting changed
)
def test_an_unfinished_interval_goes_on_from_a_checkpoint(
    tmp_path: Path, interval: int, length: int, loss: float, skipped: list[int]
) -> None:
    progress = make(tmp_path)
    add(progress, 1.0, 2.0, float("nan"))
    state = json.loads(json.dumps(progress.state(), allow_nan=False))
    other = make(tmp_path, interval)
    other.open(3, 100, state)
    assert other.pending == (length > 1)
    add(other, 3.0)
    found, figures, bad = other.fetch(4)
    assert (found, figures["loss"], bad) == (length, loss, skipped)


def test_lines_after_the_checkpoint_and_half_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\n{"step": 12}\n{"st')
    truncate_metrics(path, 12, validated=0)
    assert path.read_text() == '{"step": 4}\n{"step": 8}\n{"step": 12}\n'
    truncate_metrics(path, 8, validated=0)
    assert path.read_text() == '{"step": 4}\n{"step": 8}\n'


def test_long_lists_are_shortened() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(n) for n in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_the_ledger_divides_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("train.ledger.time.perf_counter", lambda: now)
    ledger = Ledger(torch.device("cpu"))
    with ledger.phase("data"):
        now += 1
    for _ in range(2):
        with ledger.phase("denoise"):
            now += 1
    now += 1
    shares = {**dict.fromkeys(PHASES, 0.0), "data": 0.25, "denoise": 0.5, "other": 0.25}
    assert ledger.read() == (4.0, shares)
    now += 2
    assert ledger.read() == (2.0, {**dict.fromkeys(PHASES, 0.0), "other": 1.0})
