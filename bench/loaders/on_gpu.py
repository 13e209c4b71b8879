"""Measures the loader with a GPU, from pinned buffers: a table, then a line of JSON.

    python -m bench.loaders.on_gpu [--records N] [--seconds S]

For each content and number of threads, prints records per second: `made` (batches made, not
copied), `pageable` and `pinned` (copied to the device, from ordinary and from pinned memory), and
the bound, `copy` (one pinned batch copied repeatedly). `--device cpu` tries the script without a
GPU and pins nothing. The figures so far are printed as JSON after each content.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.loaders.contents import BATCH_SIZE, CONTENTS, Batch, Content, check
from bench.loaders.with_shards import RECORDS_PER_SHARD, write_shards
from bench.steps.attempts import attempt, emit
from latent_t2i.shards.loader import MapLoader, batches
from latent_t2i.shards.reader import RawBatch, open_shards

NUM_CHECKED = 20
DELAY_CYCLES = 20_000_000
"""About 10 ms, in which the loader makes several batches."""


def main() -> None:
    """Measures each content and prints it."""
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can use")
    figures: dict[str, Any] = {"benchmark": "gpu", **describe_setup(args.device), "contents": {}}
    for content in CONTENTS:
        content = content.resized(args.records or content.num_records)
        with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
            folder = Path(temporary)
            write_shards(folder, content, RECORDS_PER_SHARD)
            measure = partial(measure_content, content, folder, args)
            figures["contents"][content.name] = attempt(content.name, measure)
        emit(figures)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Measures the loader with a GPU.")
    parser.add_argument("--records", type=int, help="records per content, at least 256")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per measurement")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


def describe_setup(device: str) -> dict[str, Any]:
    """Returns the device and versions that the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "batch_size": BATCH_SIZE,
    }


def measure_content(content: Content, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measures a content with each number of threads and prints the rates."""
    device = torch.device(args.device)
    figures: dict[str, Any] = {"delivered_bytes_per_record": content.delivered_bytes}
    print(f"\n{content.name}: {content.num_records} records, records/s")
    for num_threads in thread_counts():
        torch.set_num_threads(num_threads)
        loader = make_loader(folder)
        check_on_device(content, loader, device)
        rates = measure(loader, device, args.seconds)
        figures[f"threads_{num_threads}"] = rates
        cells = "".join(f"{name:>12}{rate:>10,.0f}" for name, rate in rates.items())
        print(f"{num_threads:>3} threads{cells}", flush=True)
    return figures


def thread_counts() -> list[int]:
    """Returns 1, 2, 4, ... up to the number of cores, at most 16."""
    most = min(len(os.sched_getaffinity(0)), 16)
    return [1 << power for power in range(most.bit_length())]


def make_loader(folder: Path) -> MapLoader:
    """Opens the set for map access."""
    shards = open_shards(folder, fields=("latent", "text", "tokens"), verify="none")
    return MapLoader(shards=shards, order=shards.order(batch_size=BATCH_SIZE, seed=0))


def check_on_device(content: Content, loader: MapLoader, device: torch.device) -> None:
    """Raises ValueError if a batch on the device differs from the records written."""
    on_gpu = device.type == "cuda"
    arrived = []
    stream = torch.cuda.current_stream() if on_gpu else None
    with closing(
        batches(loader, start=0, stop=NUM_CHECKED, pin_memory=on_gpu, stream=stream)
    ) as made:
        for batch in made:
            if on_gpu:
                # Delay the copy, so that a buffer refilled too early shows as wrong values.
                torch.cuda._sleep(DELAY_CYCLES)
            arrived.append(copy_batch(batch, device))
    for on_device in arrived:
        check(content, Batch(*(tensor.cpu() for tensor in on_device)))


def measure(loader: MapLoader, device: torch.device, seconds: float) -> dict[str, float]:
    """Returns records per second: batches made, made and copied, and only copied."""
    on_gpu = device.type == "cuda"
    rates = {}
    for name, pin_memory, use in (
        ("made", on_gpu, None),
        ("pageable", False, device),
        ("pinned", on_gpu, device),
    ):
        stream = torch.cuda.current_stream() if on_gpu else None
        with closing(
            batches(loader, start=0, stop=sys.maxsize, pin_memory=pin_memory, stream=stream)
        ) as made:
            rates[name] = rate(made, use, seconds)
    buffer = loader.buffer(pin_memory=on_gpu)
    loader.fill(0, buffer)
    rates["copy"] = rate(repeat(buffer, make_wait(device)), device, seconds)
    return {name: round(rate) for name, rate in rates.items()}


def repeat(buffer: RawBatch, wait: Callable[[], None]) -> Iterator[RawBatch]:
    """Yields one batch forever, each time after its last copy has arrived."""
    while True:
        wait()
        yield buffer


def rate(made: Iterator[RawBatch], device: torch.device | None, seconds: float) -> float:
    """Returns records per second after a warm-up, with copies to `device` if given."""
    wait = make_wait(device)
    deliver(made, device, 0.2 * seconds, wait)
    return deliver(made, device, seconds, wait)


def make_wait(device: torch.device | None) -> Callable[[], None]:
    """Returns the function that waits for all copies to a device."""
    return torch.cuda.synchronize if device and device.type == "cuda" else _nothing


def deliver(
    made: Iterator[RawBatch], device: torch.device | None, seconds: float, wait: Callable[[], None]
) -> float:
    """Returns records per second, including the wait for the last copy."""
    number = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        batch = next(made)
        if device:
            copy_batch(batch, device)
        number += 1
    wait()
    return number * BATCH_SIZE / (time.perf_counter() - began)


def copy_batch(batch: RawBatch, device: torch.device) -> Batch:
    """Copies a batch to a device; from pinned memory the copy is asynchronous."""
    parts = (batch.latent, batch.text, batch.extra["tokens"])
    return Batch(*(part.to(device, non_blocking=True, copy=True) for part in parts))


def _nothing() -> None:
    """Does nothing: copies within the CPU's memory are synchronous."""


if __name__ == "__main__":
    main()
