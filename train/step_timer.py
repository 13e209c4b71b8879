"""Where wall time goes: the share of each phase of a step.

On a CPU phases are timed by the clock. On a GPU work is queued, so each phase is bracketed by
events that are read at the logging interval only: waiting for data then counts as far as the GPU
stood idle.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "copy", "denoise", "optimiser", "ema", "save", "evaluate")


class StepTimer:
    """Adds up the time of each phase between two readings."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the enclosed work towards a phase."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            start_s = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start_s

    def read(self) -> tuple[float, dict[str, float]]:
        """Returns the seconds since the last reading and each phase's share; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        wall_s = time.perf_counter() - self._since
        shares = {name: self._seconds[name] / wall_s for name in PHASES}
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        self._events.clear()
        self._seconds.clear()
        self._since = time.perf_counter()
        return wall_s, shares
