"""Runs contenders in turns, so that other load on the machine affects all of them alike.

A round is one turn of each contender. A comparison is the median over rounds of the ratio within a
round. After a turn, workers finish the batches they prefetch, and the next turn waits for that.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.loaders.contents import Content

ROOT = Path(__file__).resolve().parents[2]
END_TIMEOUT_S = 30
SETTLE_TIMEOUT_S = 10
SETTLE_S = 0.1
# Share of a core. CPU time is counted in ticks of 10 ms, and waiting threads poll occasionally.
IDLE_SHARE = 0.11


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A contender with its number of processes and threads."""

    name: str
    num_workers: int = 0
    num_threads: int = 1

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name if self.num_threads == 1 else f"{self.name}, {self.num_threads} threads"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a runner, one entry per round."""

    start: dict[str, float]
    turns: list[dict[str, float]]

    @property
    def rates(self) -> list[float]:
        """Records per second of each round."""
        return [turn["records"] / turn["seconds"] for turn in self.turns]

    @property
    def rate(self) -> float:
        """Median records per second."""
        return statistics.median(self.rates)

    def times(self, other: "Result") -> float:
        """Returns the median over rounds of this runner's speed divided by the other's."""
        pairs = zip(self.rates, other.rates, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def peak(self, kind: str) -> int:
        """Returns the most memory of a kind at the end of a turn, in bytes."""
        return int(max(turn[kind] for turn in self.turns))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Number and length of the turns."""

    rounds: int = 7
    turn_s: float = 1.0
    warm_up_s: float = 2.0
    """Added to one pass over the records."""
    start_together: bool = False
    """Faster, but the start-up figures are inaccurate."""


def run(
    runners: list[Runner], content: Content, folders: dict[str, Path], timing: Timing
) -> dict[str, Result]:
    """Runs all rounds and returns each runner's result by its label."""
    with ExitStack() as stack:
        servers = {}
        for runner in runners:
            server = Server(runner, content, folders[runner.name], timing.warm_up_s)
            servers[runner.label] = stack.enter_context(server)
            if not timing.start_together:
                server.start()
        for server in servers.values():
            server.start()
        turns: dict[str, list[dict[str, float]]] = {label: [] for label in servers}
        for number in range(timing.rounds):
            for label in list(servers)[:: -1 if number % 2 else 1]:
                turns[label].append(servers[label].turn(timing.turn_s))
        return {
            label: Result(start=server.figures, turns=turns[label])
            for label, server in servers.items()
        }


class Server:
    """A subprocess that runs bench.loaders.serve."""

    def __init__(self, runner: Runner, content: Content, folder: Path, warm_up_s: float) -> None:
        self._label = runner.label
        request = {**asdict(runner), "content": asdict(content), "folder": str(folder)}
        request["warm_up_s"] = warm_up_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.loaders.serve", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(runner.num_threads),
        )
        self.figures: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it has ended; _answer reports that
            self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # the threads of a peer can deadlock at exit
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def start(self) -> None:
        """Waits until the process has warmed up."""
        self.figures = self.figures or self._answer()

    def turn(self, seconds: float) -> dict[str, float]:
        """Lets the process deliver batches for some seconds and returns the figures."""
        assert self._process.stdin
        print(seconds, file=self._process.stdin, flush=True)
        figures = self._answer()
        self._settle()
        return figures

    def _settle(self) -> None:
        """Waits until the process and its workers are idle."""
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        used, before = cpu_s(family), -math.inf
        while used - before > IDLE_SHARE * SETTLE_S and time.monotonic() < deadline:
            time.sleep(SETTLE_S)
            used, before = cpu_s(family), used

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self._label}: its process ended early; its error is printed above"
            )
        answer: dict[str, float] = json.loads(line)
        return answer


def cpu_s(family: list[psutil.Process]) -> float:
    """Returns the CPU time that the processes have used, in seconds."""
    times = [process.cpu_times() for process in family if process.is_running()]
    return sum(time.user + time.system for time in times)


def call(module: str, *arguments: Any) -> str:
    """Runs a module in a subprocess and returns its standard output."""
    command = [sys.executable, "-m", module]
    command += [word if isinstance(word, str) else json.dumps(word) for word in arguments]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(1)
    )
    return done.stdout


def environment(num_threads: int) -> dict[str, str]:
    """Returns the environment variables of a measured process."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS")
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, **dict.fromkeys(names, str(num_threads))}
