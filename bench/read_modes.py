"""Compares ways to read shards on a file system whose requests take long, as on a network.

    python -m bench.read_modes [--quick]

The shards lie on a FUSE file system with a delay per request (loaders/slow_files.py). `map` and
`pread` are `--data.read` of map access, `cache` downloads the shards to the local disk first. Each
starts with an empty page cache, and reads two epochs in a new process. Needs Linux and root.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import tempfile
import time
from contextlib import nullcontext

from bench.loaders.contents import CONTENTS, Content
from bench.loaders.rounds import call
from bench.loaders.slow_files import can_mount, mounted
from bench.loaders.with_shards import write_shards
from latent_t2i.shards.access import Access, make_loader, open_set
from latent_t2i.shards.loader import batches

MODES = ("map", "pread", "cache")
LATENCIES_MS = (0.2, 1.0, 5.0)
NUM_RECORDS = 512
QUICK_RECORDS = 128
RECORDS_PER_SHARD = 16
BATCH_SIZE = 64
NUM_EPOCHS = 2


def main() -> None:
    """Measures all modes and prints their table."""
    parser = argparse.ArgumentParser(description="Compares map, pread and cache on a slow disk.")
    parser.add_argument("--quick", action="store_true", help="one latency and fewer records")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder; default: /tmp")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one mode, in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    if not can_mount():
        print("skipped: it needs root and /dev/fuse to mount a file system")
        print(json.dumps({"benchmark": "read_modes", "left_out": "needs root and /dev/fuse"}))
        return
    content = CONTENTS[0].resized(QUICK_RECORDS if args.quick else NUM_RECORDS)
    latencies = LATENCIES_MS[1:2] if args.quick else LATENCIES_MS
    figures = compare(content, latencies, args.folder)
    show(figures)
    print(json.dumps({"benchmark": "read_modes", "num_records": content.num_records} | figures))


def compare(
    content: Content, latencies_ms: tuple[float, ...], parent: Path | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the figures of each mode, by latency; `local` is the disk below."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as temporary:
        folder, point = Path(temporary) / "set", Path(temporary) / "mounted"
        point.mkdir()
        write_shards(folder, content, RECORDS_PER_SHARD)
        for latency in (None, *latencies_ms):
            row = found.setdefault("local" if latency is None else f"{latency:g}_ms", {})
            for number, mode in enumerate(MODES if latency is not None else MODES[:2]):
                name = f"cache-{len(found)}-{number}"
                request = {"mode": mode, "cache_dir": str(Path(temporary) / name)}
                at = mounted(folder, point, latency) if latency is not None else nullcontext()
                with at:
                    request["folder"] = str(folder if latency is None else point)
                    row[mode] = json.loads(
                        call("bench.read_modes", "--measure", json.dumps(request))
                    )
    return found


def measure(mode: str, folder: str, cache_dir: str) -> dict[str, float]:
    """Returns the time to the first batch and the records per second of two epochs."""
    access = Access(
        kind="cache" if mode == "cache" else "map",
        cache_dir=Path(cache_dir),
        read="pread" if mode == "pread" else "map",
    )
    location = Path(folder).as_uri() if mode == "cache" else folder
    began = time.perf_counter()
    shards = open_set(location, access, verify="none")
    order = shards.order(batch_size=BATCH_SIZE, seed=0)
    per_epoch = order.num_steps(1)
    times = []
    loader = make_loader(shards, order, access)
    for _ in batches(loader, start=0, stop=NUM_EPOCHS * per_epoch):
        times.append(time.perf_counter())
    first, second = times[per_epoch - 1], times[-1]
    num = per_epoch * BATCH_SIZE
    return {
        "first_batch_s": round(times[0] - began, 3),
        "first_epoch_per_s": round(num / (first - began)),
        "second_epoch_per_s": round(num / (second - first)),
    }


def show(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints the table."""
    print(f"{'latency':<10}{'':<8}{'first batch':>13}{'first epoch':>16}{'second epoch':>16}")
    for latency, modes in figures.items():
        for mode, row in modes.items():
            print(
                f"{latency.replace('_', ' '):<10}{mode:<8}{row['first_batch_s']:>11.2f} s"
                f"{row['first_epoch_per_s']:>10,.0f} rec/s{row['second_epoch_per_s']:>10,.0f} rec/s"
            )


if __name__ == "__main__":
    main()
