"""Measures one contender in its own process, controlled over standard input.

    python -m bench.loaders.serve '{"name": "map", "content": {...}, "folder": ..., ...}'

Writes a line of JSON after the warm-up. Then reads a number of seconds per input line, delivers
batches for that long, and writes a line of figures. All other output goes to standard error.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.loaders.contenders import make
from bench.loaders.contents import BATCH_SIZE, Batch, Content, check

NUM_CHECKED = 3


def main(
    *,
    name: str,
    content: Content,
    folder: Path,
    num_workers: int,
    num_threads: int,
    warm_up_s: float,
) -> None:
    """Warms up, then runs a turn per line of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(num_threads)
    batches, figures = start(name, content, folder, num_workers)
    deliver(batches, warm_up_s)
    gc.freeze()  # exclude the start-up objects from later collections
    answer(answers, figures)
    for line in sys.stdin:
        for _ in range(2 * num_workers + 3):  # batches that were prefetched between turns
            next(batches)
        answer(answers, deliver(batches, float(line), 2))


def start(
    name: str, content: Content, folder: Path, num_workers: int
) -> tuple[Iterator[Batch], dict[str, Any]]:
    """Starts a contender, checks some batches, and returns its iterator and start-up figures."""
    contender = make(name)
    began = time.perf_counter()
    batches = contender.batches(folder, content, num_workers)
    next(batches)
    first_batch_s = time.perf_counter() - began
    num_batches = -(-content.num_records // BATCH_SIZE)
    rest_s = deliver(batches, 0.0, num_batches - 1)["seconds"] if num_batches > 1 else 0.0
    for _ in range(NUM_CHECKED if name != "copy" else 0):
        check(content, next(batches))
    return batches, {
        "first_batch_s": first_batch_s,
        "first_pass_per_s": num_batches * BATCH_SIZE / (first_batch_s + rest_s),
    }


def deliver(batches: Iterator[Batch], seconds: float, num_least: int = 0) -> dict[str, Any]:
    """Reads batches for `seconds`, at least `num_least`; returns records, seconds and memory."""
    number = 0
    began = now = time.perf_counter()
    while now - began < seconds or number < num_least:
        next(batches)
        number += 1
        now = time.perf_counter()
    return {"records": number * BATCH_SIZE, "seconds": now - began, **memory()}


def memory() -> dict[str, int]:
    """Returns this process's resident bytes: anonymous, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"anonymous_bytes": "RssAnon", "file_bytes": "RssFile"}
    return {name: 1024 * int(fields[field].split()[0]) for name, field in names.items()}


def answer(answers: TextIO, figures: dict[str, Any]) -> None:
    """Writes a line of JSON to the original standard output."""
    print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    content, folder = Content(**request.pop("content")), Path(request.pop("folder"))
    main(content=content, folder=folder, **request)
