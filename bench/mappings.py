"""Measures the page tables of a process that maps many more shards than it may have mappings.

    python -m bench.mappings [--quick]

The shards are a few sparse files under many numbers: page tables depend on addresses alone. They
are mapped in turn, and a few places of each are read.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import re
import tempfile
import time
from typing import Any

import numpy as np
import torch

from latent_t2i.shards.mapping import Region
from latent_t2i.shards.source import Part

NUM_FILES = 4
ITEM_BYTES = 512
ITEMS_PER_SHARD = 8
BATCH_SHARDS = 256
KB_PER_MB = 1000 / 1.024


def main() -> None:
    """Prints the figures of the command line's size."""
    parser = argparse.ArgumentParser(description="Measures page tables by number of shards.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the shards")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--shard-bytes", type=int, default=2**26)
    args = parser.parse_args()
    num_shards = args.shards // 10 if args.quick else args.shards
    figures = measure(num_shards, args.shard_bytes)
    print(f"{'shards mapped':>15}{'page tables':>14}")
    for number, size in figures["page_table_mb_by_shards"].items():
        print(f"{number:>15,}{size:>11.1f} MB")
    print(json.dumps({"benchmark": "mappings", **figures}))


def measure(num_shards: int, shard_bytes: int = 2**26) -> dict[str, Any]:
    """Maps shards in turn; returns the size of the page tables along the way, and the times.

    `page_table_mb` is their growth from before the first shard to after the last one.
    """
    region = Region(num_shards, shard_bytes)
    rng = np.random.default_rng(0)
    out = torch.empty((BATCH_SHARDS * ITEMS_PER_SHARD, ITEM_BYTES), dtype=torch.uint8)
    before = page_table_kb()
    sizes: dict[int, float] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        paths = sparse_files(Path(temporary), shard_bytes)
        for first in range(0, num_shards, BATCH_SHARDS):
            shards = np.arange(first, min(first + BATCH_SHARDS, num_shards))
            region.slots.touch(shards)
            for shard in shards.tolist():
                region.open(shard, paths[shard % NUM_FILES])
            files = shards.repeat(ITEMS_PER_SHARD)
            places = rng.integers(0, shard_bytes // ITEM_BYTES, len(files)) * ITEM_BYTES
            region.gather(files, [Part(places, ITEM_BYTES, ITEM_BYTES, out[: len(files)])])
            if (first // BATCH_SHARDS) % (num_shards // BATCH_SHARDS // 8 or 1) == 0:
                sizes[int(shards[-1]) + 1] = round((page_table_kb() - before) / KB_PER_MB, 2)
        sizes[num_shards] = round((page_table_kb() - before) / KB_PER_MB, 2)
    return {
        "num_shards": num_shards,
        "shard_bytes": shard_bytes,
        "num_slots": region.slots.num,
        "page_table_mb": sizes[num_shards],
        "page_table_mb_by_shards": sizes,
        "us_per_shard": round(1e6 * (time.perf_counter() - began) / num_shards, 1),
    }


def sparse_files(folder: Path, size_bytes: int) -> list[Path]:
    """Makes files that take no space on the disk."""
    paths = [folder / f"{number}.tar" for number in range(NUM_FILES)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(size_bytes)
    return paths


def page_table_kb() -> int:
    """Returns the size of this process's page tables, in units of 1024 bytes."""
    found = re.search(r"VmPTE:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise ValueError("/proc/self/status: expected a line VmPTE, found none")
    return int(found[1])


if __name__ == "__main__":
    main()
