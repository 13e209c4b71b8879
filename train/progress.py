"""What a run says of itself: one device-side row per step, one line of metrics.jsonl per interval.

A step writes its loss, gradient norm and whether it was skipped into a small table on the device;
only at the logging interval is the table fetched. The unfinished table is part of a checkpoint, so
a resumed run writes the same lines as one that never stopped.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
MAX_SHOWN = 8
MAX_STEPS_READ = 4


class Progress:
    """Collects the rows of an interval and reports them."""

    def __init__(self, accelerator: Accelerator, folder: Path, interval: int) -> None:
        self._accelerator = accelerator
        self._path = folder / METRICS_FILE
        self._rows = torch.zeros(interval, 3, device=accelerator.device)
        self._num_rows = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self.last: dict[str, Any] = {}
        self._bar = tqdm(disable=True)

    def open(self, step: int, num_steps: int, state: dict[str, Any]) -> None:
        """Begins at `step`, from the unfinished interval of a checkpoint if there is one.

        Lines of metrics.jsonl beyond that step, which a killed run wrote, are dropped.
        """
        rows = state.get("rows", [])
        self._num_rows = min(len(rows), step % len(self._rows))  # fewer if the interval changed
        for place, row in enumerate(rows[len(rows) - self._num_rows :]):
            self._rows[place] = torch.tensor(row)
        self.num_skipped = state.get("num_skipped", 0)
        self.num_skipped_in_a_row = state.get("num_skipped_in_a_row", 0)
        self.last = state.get("last", {})
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            disable=not self._accelerator.is_main_process,
            mininterval=0.5 if terminal else 30.0,
            dynamic_ncols=terminal,
        )
        if self._accelerator.is_main_process:
            truncate_metrics(self._path, step)

    def add(self, loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Notes a step, on the device."""
        self._rows[self._num_rows] = torch.stack([loss, norm, skipped])
        self._num_rows += 1
        self._bar.update()

    @property
    def pending(self) -> bool:
        """Whether there are steps that no line has told of."""
        return self._num_rows > 0

    def fetch(self, step: int) -> tuple[int, dict[str, Any], list[int]]:
        """Ends the interval: returns its length, its figures and the numbers of its skipped steps.

        The loss is the mean over the steps' global batches that were not skipped.
        """
        rows = self._accelerator.reduce(self._rows[: self._num_rows], reduction="mean").tolist()
        first = step - len(rows)
        bad = [first + i for i, row in enumerate(rows) if row[2]]
        good = [row for row in rows if not row[2]]
        self.num_skipped += len(bad)
        for row in rows:
            self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if row[2] else 0
        self._num_rows = 0
        loss, norm = (sum(r[i] for r in good) / len(good) if good else None for i in (0, 1))
        figures = {"step": step, "loss": loss, "grad_norm": norm, "skipped": self.num_skipped}
        return len(rows), figures, bad

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and shows its main figures on the bar."""
        self.last = line
        if not self._accelerator.is_main_process:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        shares = line["ledger"]
        self._bar.set_postfix_str(
            f"epoch {line['epoch']:.2f}, loss {loss}, {line['images_per_s']:.0f} images/s, "
            f"denoise {shares['denoise']:.0%}, data {shares['data']:.1%}, skipped {line['skipped']}"
        )

    def say(self, text: str) -> None:
        """Prints a line, above the bar, from the main process."""
        if self._accelerator.is_main_process:
            self._bar.write(text, file=sys.stderr)

    def say_skipped(self, steps: list[int], suspects: Callable[[int], list[str]]) -> None:
        """Names the skipped steps of an interval and the records of the first few."""
        if not steps or not self._accelerator.is_main_process:
            return
        read = [key for step in steps[:MAX_STEPS_READ] for key in suspects(step)]
        keys, names = shorten(list(dict.fromkeys(read))), shorten([str(step) for step in steps])
        self.say(f"step {names}: skipped, not finite; records: {keys}")

    def state(self) -> dict[str, Any]:
        """Returns the unfinished interval for a checkpoint; all processes must ask for it."""
        rows = self._accelerator.reduce(self._rows[: self._num_rows], reduction="mean")
        return {
            "rows": rows.nan_to_num(0.0, 0.0, 0.0).tolist(),  # of skipped steps; JSON has no NaN
            "num_skipped": self.num_skipped,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
            "last": self.last,
        }

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def shorten(names: list[str]) -> str:
    """Returns the first names as text and how many more there are."""
    more = len(names) - MAX_SHOWN
    return ", ".join(names[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def truncate_metrics(path: Path, step: int) -> None:
    """Keeps the lines of metrics.jsonl up to `step`, dropping one that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    partial.replace(path)
