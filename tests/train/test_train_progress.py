"""Metrics of an interval, their state in a checkpoint, the progress bar, and the time breakdown."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tqdm import tqdm

from latent_t2i.train.progress import (
    BAR_FORMAT,
    Progress,
    Skipped,
    describe,
    shorten,
    truncate_metrics,
)
from latent_t2i.train.step_timer import PHASES, StepTimer

LINE = {
    "step": 128_000,
    "loss": 0.1234567,
    "skipped": 12,
    "epoch": 98.76543,
    "images_per_s": 12345.6,
    "time_breakdown": {"data": 0.1234},
}


def make(folder: Path, interval: int = 4) -> Progress:
    """Returns the progress of a run at step 0."""
    progress = Progress(Accelerator(cpu=True, mixed_precision="no"), folder, interval)
    progress.open(0, 100, {})
    return progress


def add(progress: Progress, *losses: float) -> None:
    """Adds a step for each loss; steps whose loss is NaN are skipped ones."""
    for loss in losses:
        value = torch.tensor(loss)
        progress.add(value, 2 * value, value.isnan().float())


def test_skipped_steps_are_counted_but_not_averaged(tmp_path: Path) -> None:
    progress = make(tmp_path)
    add(progress, 1.0, float("nan"), 4.0, float("nan"))
    assert progress.fetch(14) == (
        4,
        {"step": 14, "loss": 2.5, "grad_norm": 5.0, "skipped": 2},
        Skipped([11, 13], set()),
    )
    assert progress.num_skipped_in_a_row == 1
    add(progress, float("nan"))
    _, found, bad = progress.fetch(15)
    assert (found["loss"], bad.steps, progress.num_skipped_in_a_row) == (None, [14], 2)


@pytest.mark.parametrize(
    ("interval", "length", "loss", "skipped"),
    [(4, 4, 2.0, [2]), (3, 1, 3.0, []), (2, 2, 3.0, [2])],  # the last two: another interval
)
def test_an_unfinished_interval_continues_from_a_checkpoint(
    tmp_path: Path, interval: int, length: int, loss: float, skipped: list[int]
) -> None:
    progress = make(tmp_path)
    add(progress, 1.0, 2.0, float("nan"))
    state = json.loads(json.dumps(progress.state(), allow_nan=False))
    other = make(tmp_path, interval)
    other.open(3, 100, state)
    assert other.pending == (length > 1)
    add(other, 3.0)
    found, means, bad = other.fetch(4)
    assert (found, means["loss"], bad) == (length, loss, Skipped(skipped, set()))


def test_overflowed_gradients_are_told_from_losses_that_are_not_finite(tmp_path: Path) -> None:
    progress = make(tmp_path)
    for loss, skipped in ((1.0, 0.0), (2.0, 1.0), (float("inf"), 1.0)):
        progress.add(torch.tensor(loss), torch.tensor(0.0), torch.tensor(skipped))
    state = json.loads(json.dumps(progress.state(), allow_nan=False))
    other = make(tmp_path)
    other.open(3, 100, state)
    for each in (progress, other):
        _, means, skipped_steps = each.fetch(3)
        assert means["loss"] == 1.0
        assert skipped_steps == Skipped([1, 2], {1})


def test_skipped_steps_of_finite_losses_read_no_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = []
    progress = make(tmp_path)

    def keys(step: int) -> list[str]:
        read.append(step)
        return ["broken"] if step == 6 else []

    progress.say_skipped(Skipped([3, 4], {3, 4}), keys, 32768.0)
    progress.say_skipped(Skipped([5, 6], {5}), keys, None)
    progress.say_skipped(Skipped([7], set()), keys, 16384.0)
    assert read == [6, 7]
    finite = "skipped, the gradients overflowed; the losses are finite, so no record is the cause"
    assert capsys.readouterr().err.splitlines() == [
        f"step 3, 4: {finite}; fp16's loss scale is now 32768",
        f"step 5: {finite}",
        "step 6: skipped, not finite; records: broken",
        "step 7: skipped, not finite; all values of their records are finite",
    ]


@pytest.mark.parametrize(
    ("step", "validated", "kept"), [(12, 0, [0, 1, 4]), (8, 0, [0, 1]), (12, 4, [0, 1, 2, 4])]
)
def test_lines_after_the_checkpoint_and_incomplete_ones_are_dropped(
    tmp_path: Path, step: int, validated: int, kept: list[int]
) -> None:
    lines = [
        '{"step": 4}\n',
        '{"step": 8}\n',
        '{"step": 4, "validation": {}}\n',
        '{"step": 12, "validation": {}}\n',
        '{"step": 12}\n',
        '{"st',
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines))
    truncate_metrics(path, step, validated=validated)
    assert path.read_text() == "".join(lines[index] for index in kept)


@pytest.mark.parametrize(
    "line",
    [
        b"text",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "4"}',
        b'{"step": NaN}',
        b"\xff",
        b'{"step": ' + b"[" * 10**6,
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 4, "loss": "a text"}\n' + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: expected a JSON object with"):
        truncate_metrics(path, 4, validated=0)
    assert path.read_bytes() == content


def test_long_lists_are_shortened() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(n) for n in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_the_time_breakdown_divides_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("latent_t2i.train.step_timer.time.perf_counter", lambda: now)
    timer = StepTimer(torch.device("cpu"))
    with timer.phase("data"):
        now += 1
    for _ in range(2):
        with timer.phase("denoise"):
            now += 1
    now += 1
    shares = {**dict.fromkeys(PHASES, 0.0), "data": 0.25, "denoise": 0.5, "other": 0.25}
    assert timer.read() == (4.0, shares)
    now += 2
    assert timer.read() == (2.0, {**dict.fromkeys(PHASES, 0.0), "other": 1.0})


def test_the_bar_fits_into_80_columns() -> None:
    text = describe(LINE, 37_353.0)
    assert text == "epoch 98.8 loss 0.1235 12346 img/s data 12% skip 12 ETA 10:22:33"
    meter = tqdm.format_meter(
        n=128_000, total=200_000, elapsed=1.0, ncols=79, bar_format=BAR_FORMAT, postfix=text
    )
    assert meter.startswith(f"128000/200000, {text}")
    assert len(meter) <= 80
    assert describe(LINE | {"loss": None, "epoch": 0.01234, "images_per_s": 7.891}, 59.0) == (
        "epoch 0.0123 loss none 7.89 img/s data 12% skip 12 ETA 00:59"
    )


def test_without_a_terminal_plain_lines_are_printed_at_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 50.0
    monkeypatch.setattr("latent_t2i.train.progress.time.monotonic", lambda: now_s)
    progress = make(tmp_path)
    progress.begin("compiling")
    add(progress, 1.0)
    for step, then_s in ((4, 50.0), (8, 52.0), (12, 60.5), (100, 61.0)):
        now_s = then_s
        progress.write(LINE | {"step": step}, remaining_s=10.0)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["compiling", "4/100", "12/100", "100/100"]
    assert "\r" not in "".join(lines)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_bar_shows_what_the_first_step_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = make(tmp_path)
    progress.begin("compiling")
    assert "compiling ... 0/100" in terminal.getvalue()
    before = len(terminal.getvalue())
    add(progress, 1.0)
    progress.write(LINE | {"step": 4}, remaining_s=10.0)
    progress.close()
    assert "compiling" not in terminal.getvalue()[before:]
    assert "epoch 98.8 loss 0.1235" in terminal.getvalue()[before:]
