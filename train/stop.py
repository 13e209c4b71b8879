"""Decides when a run ends: at the last step, the time budget or a signal, on all ranks at once."""

import ctypes
import os
import signal
import sys
import time
from enum import Enum
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

CHECK_EVERY_STEPS = 10
# SIGUSR1: Slurm's --signal, before the time limit. SIGHUP: the terminal was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PARENT_DIED = signal.SIGUSR1
PR_SET_PDEATHSIG = 1  # from sys/prctl.h


class StopReason(Enum):
    """Why a run ends."""

    DONE = "last step reached"
    BUDGET = "time budget used up"
    SIGNAL = "signal"


def prepare_signals() -> None:
    """Makes process 1 exit at SIGTERM, and requests a signal when the launcher dies."""
    if os.getpid() == 1:
        # In a container. The kernel does not apply the default action of SIGTERM to process 1.
        signal.signal(signal.SIGTERM, _exit)
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # accelerate's launcher of one process does not forward signals. SIGTERM would end the
        # launcher only, and the training would continue as an orphan. Other parents do not count: a
        # background job may outlive its shell.
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_DIED)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), PARENT_DIED)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


class Stop:
    """A context manager that records signals and decides when a run ends.

    A second SIGINT ends the process at once.
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
        for number in SIGNALS:
            # nohup ignores SIGHUP, which must stay ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._handlers):
            self._restore(number)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        # The other signals have no further effect. They often come twice: from Slurm, to all
        # processes of a job, and from the launcher, which forwards its own or dies of it.
        self._restore(signal.SIGINT)

    def _restore(self, number: int) -> None:
        if number in self._handlers:
            signal.signal(number, self._handlers.pop(number))

    @property
    def signal_name(self) -> str:
        """The name of the recorded signal."""
        return signal.Signals(self.signal or 0).name

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
