"""When to end: the last step, the time budget, or a signal, on all processes at the same step."""

import signal
import time
from enum import Enum
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

CHECK_EVERY_STEPS = 10


class Reason(Enum):
    """Why a run ends."""

    DONE = "the last step"
    BUDGET = "the time budget"
    SIGNAL = "a signal"


class Stop:
    """Watches for the end of a run; a context manager, since it takes over SIGTERM and SIGINT.

    Only the first signal is taken over: a second one ends the process at once.
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
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, over all starts."""
        return time.perf_counter() - self._started_s

    def reason(self, step: int, train_s: float) -> Reason | None:
        """Returns why to end before `step`, `train_s` after the beginning, or None to go on.

        It takes the time that a checkpoint keeps, not the clock's, so that a run which its budget
        ended is over for good. Processes agree every few steps only: that waits for the device.
        """
        over = self._budget_s is not None and train_s >= self._budget_s
        if step >= self._num_steps:
            return Reason.DONE
        if self._accelerator.num_processes > 1:
            return self._common_reason(over) if step % CHECK_EVERY_STEPS == 0 else None
        if self.signal is not None:
            return Reason.SIGNAL
        return Reason.BUDGET if over else None

    def _common_reason(self, over: bool) -> Reason | None:
        """Returns what any process wants; a signal that reached one ends all."""
        own = torch.tensor([float(self.signal or 0), over], device=self._accelerator.device)
        number, any_over = self._accelerator.gather(own.unsqueeze(0)).amax(dim=0).tolist()
        if number:
            self.signal = int(number)
            return Reason.SIGNAL
        return Reason.BUDGET if any_over else None
