"""The time breakdown: the share of wall time that each phase of a step takes.

On a GPU each phase is bracketed by CUDA events that are read at the logging interval, so timing
does not synchronise. Waiting for data then counts only as far as the GPU was idle.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "copy", "denoise", "optimiser", "ema", "save", "evaluate")


class StepTimer:
    """Sums the time of each phase between two reads."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the enclosed work to a phase."""
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
        """Returns the seconds since the last read and each phase's share; synchronises a GPU."""
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
