"""What the loader delivers to a GPU: pinned buffers, copied while the next batch is made.

    bench/gpu.sh [--records N] [--seconds S]

For each content and number of threads, records per second: `made` (batches made, not copied),
`pageable` and `pinned` (copied to the device, from ordinary and from pinned memory), and the bound,
`copy` (one pinned batch copied again and again). Before that, batches are held to the records on
the device while its stream is kept behind, so that a buffer filled too early would show. Prints a
table, then a line of JSON. With `--device cpu`, which is for trying the script, nothing is pinned.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bench.loaders.contents import BATCH_SIZE, CONTENTS, Batch, Content, check
from bench.loaders.with_shards import RECORDS_PER_SHARD, write_shards
from latent_t2i.shards.loader import MapLoader, batches
from latent_t2i.shards.reader import RawBatch, open_shards

NUM_CHECKED = 20
DELAY_CYCLES = 20_000_000
"""Some 10 ms: several batches are made in that time."""


def main() -> None:
    """Measures every content."""
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can use")
    figures: dict[str, Any] = {"benchmark": "gpu", **setting(args.device), "contents": {}}
    for content in CONTENTS:
        content = content.resized(args.records or content.num_records)
        with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
            folder = Path(temporary)
            write_shards(folder, content, RECORDS_PER_SHARD)
            figures["contents"][content.name] = of_content(content, folder, args)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures the loader with a GPU.")
    parser.add_argument("--records", type=int, help="of each content, at least 256")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


def setting(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "batch_size": BATCH_SIZE,
    }


def of_content(content: Content, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns a content's figures by number of threads, and prints them."""
    device = torch.device(args.device)
    figures: dict[str, Any] = {"delivered_bytes_per_record": content.delivered_bytes}
    print(f"\n{content.name}: {content.num_records} records, records/s")
    for num_threads in thread_counts():
        torch.set_num_threads(num_threads)
        loader = make_loader(folder)
        hold_to_records(content, loader, device)
        rates = measure(loader, device, args.seconds)
        figures[f"threads_{num_threads}"] = rates
        cells = "".join(f"{name:>12}{rate:>10,.0f}" for name, rate in rates.items())
        print(f"{num_threads:>3} threads{cells}", flush=True)
    return figures


def thread_counts() -> list[int]:
    """1, 2, 4, ... up to the number of cores, 16 at most."""
    most = min(len(os.sched_getaffinity(0)), 16)
    return [1 << power for power in range(most.bit_length())]


def make_loader(folder: Path) -> MapLoader:
    """Map access, opened anew."""
    shards = open_shards(folder, verify="none")
    return MapLoader(shards=shards, order=shards.order(batch_size=BATCH_SIZE, seed=0))


def hold_to_records(content: Content, loader: MapLoader, device: torch.device) -> None:
    """Raises ValueError where what arrives is not what was written."""
    on_gpu = device.type == "cuda"
    arrived = []
    with closing(batches(loader, start=0, stop=NUM_CHECKED, pin_memory=on_gpu)) as made:
        for batch in made:
            if on_gpu:
                torch.cuda._sleep(DELAY_CYCLES)
            arrived.append(copied(batch, device))
    for on_device in arrived:
        check(content, Batch(*(tensor.cpu() for tensor in on_device)))


def measure(loader: MapLoader, device: torch.device, seconds: float) -> dict[str, float]:
    """Returns records per second: made, made and copied, and copied only."""
    on_gpu = device.type == "cuda"
    rates = {}
    for name, pin_memory, use in (
        ("made", on_gpu, None),
        ("pageable", False, device),
        ("pinned", on_gpu, device),
    ):
        with closing(batches(loader, start=0, stop=sys.maxsize, pin_memory=pin_memory)) as made:
            rates[name] = rate(made, use, seconds)
    buffer = loader.buffer(pin_memory=on_gpu)
    loader.fill(0, buffer)
    rates["copy"] = rate(again(buffer, waiting(device)), device, seconds)
    return {name: round(rate) for name, rate in rates.items()}


def again(buffer: RawBatch, wait: Callable[[], None]) -> Iterator[RawBatch]:
    """Yields one batch without end, once its last copy has arrived."""
    while True:
        wait()
        yield buffer


def rate(made: Iterator[RawBatch], device: torch.device | None, seconds: float) -> float:
    """Returns records per second of batches, copied to a device if one is given."""
    wait = waiting(device)
    deliver(made, device, 0.2 * seconds, wait)
    return deliver(made, device, seconds, wait)


def waiting(device: torch.device | None) -> Callable[[], None]:
    """Returns what waits until all copies to a device have arrived."""
    return torch.cuda.synchronize if device and device.type == "cuda" else _nothing


def deliver(
    made: Iterator[RawBatch],
    device: torch.device | None,
    seconds: float,
    wait: Callable[[], None],
) -> float:
    """Returns records per second; the last copy is waited for."""
    number = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        batch = next(made)
        if device:
            copied(batch, device)
        number += 1
    wait()
    return number * BATCH_SIZE / (time.perf_counter() - began)


def copied(batch: RawBatch, device: torch.device) -> Batch:
    """Returns a batch on a device, in memory of its own; from pinned memory without waiting."""
    parts = (batch.latent, batch.text, batch.tokens)
    return Batch(*(part.to(device, non_blocking=True, copy=True) for part in parts))


def _nothing() -> None:
    """There is nothing to wait for."""


if __name__ == "__main__":
    main()
