"""Decides when a run ends: at the last step, the time budget or a signal, on all ranks at once."""

import signal
import time
from enum import Enum
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

CHECK_EVERY_STEPS = 10


class StopReason(Enum):
    """Why a run ends."""

    DONE = "last step reached"
    BUDGET = "time budget used up"
    SIGNAL = "signal"


class Stop:
    """A context manager that records SIGTERM and SIGINT and decides when a run ends.

    Only the first signal is recorded. The handlers are then restored, so a second one ends the
    process at once.
    """

    def __init__(
        self, accelerator: Accelerator, *, num_steps: int, budget_s: float | None, spent_s: float
    ) -> None:
        self._accelerator = accelerator
        self._num_steps = num_steps
        self._budget_s = budget_s
        self._started_s = time.perf_counter() - spent_s
        self._handlers: dict[int, Any] = {}
        self.signal: int | None = None

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, including those before a resume."""
        return time.perf_counter() - self._started_s

    def reason(self, step: int, train_s: float) -> StopReason | None:
        """Returns why the run ends before `step`, or None to continue.

        `train_s` is the training time that the checkpoint records, not the clock's: a run that has
        used up its budget then stays finished when it is started again.
        """
        over = self._budget_s is not None and train_s >= self._budget_s
        if step >= self._num_steps:
            return StopReason.DONE
        if self._accelerator.num_processes > 1:
            # Only every few steps: agreeing synchronises host and device.
            return self._agree(over) if step % CHECK_EVERY_STEPS == 0 else None
        if self.signal is not None:
            return StopReason.SIGNAL
        return StopReason.BUDGET if over else None

    def _agree(self, over: bool) -> StopReason | None:
        """Returns the reason that any process has, so that one process's signal ends them all."""
        own = torch.tensor([float(self.signal or 0), over], device=self._accelerator.device)
        number, any_over = self._accelerator.gather(own.unsqueeze(0)).amax(dim=0).tolist()
        if number:
            self.signal = int(number)
            return StopReason.SIGNAL
        return StopReason.BUDGET if any_over else None
