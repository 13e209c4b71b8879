"""Metrics and progress of a run: metrics.jsonl and the progress bar.

Each step writes its loss, gradient norm and skip flag into a small table on the device, which the
host reads once per logging interval only. The unfinished table is part of a checkpoint, so a
resumed run writes the same lines as an uninterrupted one.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from latent_t2i.train import trackers

METRICS_FILE = "metrics.jsonl"
MAX_LISTED = 8
MAX_STEPS_READ = 4
# Between two lines of progress where stderr is not a terminal.
LINE_EVERY_S = 10.0
# The bar comes last and gets the columns that are left.
BAR_FORMAT = "{desc}{n_fmt}/{total_fmt}{postfix} {bar}"


class Skipped(NamedTuple):
    """The skipped steps of an interval."""

    steps: list[int]
    overflowed: set[int]
    """Those whose loss is finite: the gradients overflowed in the backward pass."""


class Progress:
    """Collects the metrics of each step and reports them once per interval."""

    def __init__(self, accelerator: Accelerator, folder: Path, interval: int) -> None:
        self._accelerator = accelerator
        self._path = folder / METRICS_FILE
        self._rows = torch.zeros(interval, 3, device=accelerator.device)
        self._num_rows = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self.overflowed: set[int] = set()
        """All steps of this process that were skipped although their loss is finite."""
        self.last: dict[str, Any] = {}
        """The newest line of training metrics."""
        self.validation: dict[str, Any] = {}
        """The newest line of validation metrics."""
        self.previewed: int | None = None
        """The step of the newest preview."""
        self._bar = tqdm(disable=True)
        self._plain = False
        self._printed_s = float("-inf")
        self._num_steps = 0
        self._starting = False

    def open(self, step: int, num_steps: int, state: dict[str, Any]) -> None:
        """Starts at `step`, with the `state` of a checkpoint if there is one.

        Drops the lines of metrics.jsonl that a killed run wrote after that step.
        """
        rows = state.get("rows", [])
        self._num_rows = min(len(rows), step % len(self._rows))  # fewer if the interval changed
        for index, row in enumerate(rows[len(rows) - self._num_rows :]):
            self._rows[index] = torch.tensor(row)
        self.num_skipped = state.get("num_skipped", 0)
        self.num_skipped_in_a_row = state.get("num_skipped_in_a_row", 0)
        self.last = state.get("last", {})
        self.validation = state.get("validation", {})
        self.previewed = state.get("previewed")
        main, terminal = self._accelerator.is_main_process, sys.stderr.isatty()
        self._num_steps, self._plain = num_steps, main and not terminal
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            disable=not (main and terminal),
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
        )
        if main:
            truncate_metrics(self._path, step, validated=self.validation.get("step", 0))

    def begin(self, activity: str) -> None:
        """Shows what the run is doing until the first step is complete."""
        if self._bar.n < self._num_steps:
            self._starting = True
            self._bar.set_description_str(f"{activity} ... ")
            if self._plain:
                self.say(f"{activity} ...")

    def add(self, loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Records a step, on the device."""
        # A skipped step counts as 1 if its loss is finite, as 2 if not: a record may be the cause.
        skipped = skipped * (2 - loss.isfinite().float())
        self._rows[self._num_rows] = torch.stack([loss, norm, skipped])
        self._num_rows += 1
        if self._starting:
            self._starting = False
            self._bar.set_description_str("", refresh=False)
        self._bar.update()

    @property
    def pending(self) -> bool:
        """Whether there are steps that no line reports yet."""
        return self._num_rows > 0

    def fetch(self, step: int) -> tuple[int, dict[str, Any], Skipped]:
        """Ends the interval; returns its length, its metrics and its skipped steps.

        Loss and gradient norm are means over the steps that were not skipped.
        """
        rows = self._accelerator.reduce(self._rows[: self._num_rows], reduction="mean").tolist()
        first = step - len(rows)
        bad = [first + i for i, row in enumerate(rows) if row[2]]
        # The mean over the processes is above 1 if any of them had a loss that is not finite.
        overflowed = {first + i for i, row in enumerate(rows) if 0 < row[2] <= 1}
        self.overflowed |= overflowed
        good = [row for row in rows if not row[2]]
        self.num_skipped += len(bad)
        for row in rows:
            self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if row[2] else 0
        self._num_rows = 0
        loss, norm = (sum(r[i] for r in good) / len(good) if good else None for i in (0, 1))
        metrics = {"step": step, "loss": loss, "grad_norm": norm, "skipped": self.num_skipped}
        return len(rows), metrics, Skipped(bad, overflowed)

    def write(self, line: dict[str, Any], *, remaining_s: float) -> None:
        """Appends a line to metrics.jsonl and shows its main metrics."""
        self.last = line
        if not self._accelerator.is_main_process:
            return
        self._append(line)
        text = describe(line, remaining_s)
        self._bar.set_postfix_str(text)
        now_s, step = time.monotonic(), line["step"]
        if self._plain and (now_s - self._printed_s >= LINE_EVERY_S or step == self._num_steps):
            self._printed_s = now_s
            self.say(f"{step}/{self._num_steps} {text}")

    def write_validation(self, line: dict[str, Any]) -> None:
        """Appends a line of validation metrics to metrics.jsonl and prints it."""
        self.validation = line
        if not self._accelerator.is_main_process:
            return
        self._append(line)
        found = line["validation"]
        loss = "not finite" if found["loss"] is None else _loss(found["loss"])
        self.say(
            f"step {line['step']}: validation loss {loss} (EMA); by noise level, low to high: "
            f"{' '.join(map(_loss, found['loss_by_quarter'].values()))}"
        )

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        trackers.log_line(self._accelerator, line)

    def say(self, text: str) -> None:
        """Prints a line above the bar, from the main process."""
        if self._accelerator.is_main_process:
            self._bar.write(text, file=sys.stderr)

    def say_skipped(
        self,
        skipped: Skipped,
        nonfinite_keys: Callable[[int], list[str]],
        loss_scale: float | None,
    ) -> None:
        """Prints the skipped steps of an interval and the broken records that the first few read.

        `loss_scale` is fp16's, after it was lowered. Where the loss is finite, so are the records,
        and they are not read again.
        """
        if not skipped.steps or not self._accelerator.is_main_process:
            return
        steps = [step for step in skipped.steps if step not in skipped.overflowed]
        if skipped.overflowed:
            names = shorten([str(step) for step in sorted(skipped.overflowed)])
            scale = "" if loss_scale is None else f"; fp16's loss scale is now {loss_scale:g}"
            self.say(
                f"step {names}: skipped, the gradients overflowed; the losses are finite, so no "
                f"record is the cause{scale}"
            )
        if steps:
            read = [key for step in steps[:MAX_STEPS_READ] for key in nonfinite_keys(step)]
            keys, names = shorten(list(dict.fromkeys(read))), shorten([str(step) for step in steps])
            cause = f"records: {keys}" if keys else "all values of their records are finite"
            self.say(f"step {names}: skipped, not finite; {cause}")

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint; all processes must call this."""
        rows = self._accelerator.reduce(self._rows[: self._num_rows], reduction="mean")
        return {
            "rows": rows.nan_to_num(0.0, 0.0, 0.0).tolist(),  # of skipped steps; JSON has no NaN
            "num_skipped": self.num_skipped,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
            "last": self.last,
            "validation": self.validation,
            "previewed": self.previewed,
        }

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()


def shorten(names: list[str]) -> str:
    """Returns the first names as text, with the number of the others."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def describe(line: dict[str, Any], remaining_s: float) -> str:
    """Returns the main metrics of a line, short enough for a bar of 80 columns."""
    data = line["time_breakdown"]["data"]
    return (
        f"epoch {_short(line['epoch'])} loss {_loss(line['loss'])} "
        f"{_short(line['images_per_s'])} img/s "
        f"data {data:.{0 if data >= 0.1 else 1}%} skip {line['skipped']} "
        f"ETA {tqdm.format_interval(remaining_s)}"
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _loss(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def truncate_metrics(path: Path, step: int, *, validated: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, and a last line that a kill truncated.

    Validation lines are kept up to `validated`: a run may be killed between its last validation
    and the checkpoint that records it.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            found = _parse_line(f"{path}: line {number}", line)
            if found["step"] <= (validated if "validation" in found else step):
                kept.append(line)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def _parse_line(place: str, line: bytes) -> dict[str, Any]:
    """Returns a line of metrics.jsonl; raises ValueError if it has no step."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deep
        found = None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        start = line[:60].decode(errors="replace").strip()
        raise ValueError(
            f"{place}: expected a JSON object with an integer 'step', found {start!r}; correct or "
            "delete this line"
        )
    return found
