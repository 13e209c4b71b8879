"""What sets cost that are larger than any disk here: tables, then a line of JSON.

    python -m bench.scale [--quick]

* Opening: the manifest and the shard table of 1B records in 1M shards, written without the shards,
  are opened in a new process. Memory is what opening adds to it.
* Order and draws: what a step of 2,048 records costs the host, besides copying them; also of the
  same shards as three sets with weights.
* Page tables: 100,000 sparse shards are mapped in turn (mappings.py).
* Listing: records per second of stage one's list, with their captions tokenised.

docs/scaling.md derives the costs of 1M, 100M and 1B images from these figures.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import hashlib
import json
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import numpy as np

from bench import mappings
from bench.loaders.contents import SMALL
from bench.loaders.with_shards import write_shards
from bench.steps.host import measure_order_and_draws_ms
from latent_t2i.model.encoders import TextEncoder
from latent_t2i.pipeline.index import build_index
from latent_t2i.pipeline.sets import check_records
from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.files import write_file
from latent_t2i.shards.mixed_order import MixedOrder
from latent_t2i.shards.order import Order, Shuffle
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import MANIFEST_NAME, FileEntry, Manifest
from latent_t2i.shards.shard_table import TABLE_DTYPE, ShardTable

ENCODER = Path(__file__).resolve().parent.parent / "scenes/encoders/clip"
BATCH_SIZE = 2048
NUM_SHARDS = 1_000_000
RECORDS_PER_SHARD = 1000
NUM_LISTED = 50_000
SHUFFLES: tuple[Shuffle, ...] = ("full", "blocks", "none")
WEIGHTS = (1.0, 0.5, 2.0)
"""Of the three sets, which have six, three and one tenth of the shards."""
QUICK = 100
"""`--quick` divides all numbers by this."""
KB_PER_MB = 1000 / 1.024


def main() -> None:
    """Measures all parts and prints the tables."""
    parser = argparse.ArgumentParser(description="Costs of sets of up to a billion records.")
    parser.add_argument("--quick", action="store_true", help="a hundredth of everything")
    parser.add_argument("--open", type=Path, metavar="FOLDER", help="opens a set in this process")
    args = parser.parse_args()
    if args.open:
        print(json.dumps(measure_opening(args.open)))
        return
    divisor = QUICK if args.quick else 1
    num_shards = NUM_SHARDS // divisor
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary) / "set"
        write_set(folder, num_shards)
        opening = open_in_new_process(folder)
    order_ms = {shuffle: measure_order(num_shards, shuffle) for shuffle in SHUFFLES}
    mixed_ms = {shuffle: measure_mixed_order(num_shards, shuffle) for shuffle in SHUFFLES}
    mapped = mappings.measure(100_000 // divisor)
    listed = measure_listing(NUM_LISTED // divisor)
    print(f"opening {num_shards:,} shards: {opening['open_s']:.2f} s, {opening['open_mb']:.0f} MB")
    for shuffle, time_ms in order_ms.items():
        print(
            f"order and draws of {BATCH_SIZE} records, {shuffle}: {time_ms:.2f} ms, of three sets "
            f"{mixed_ms[shuffle]:.2f} ms"
        )
    print(f"page tables after {mapped['num_shards']:,} shards: {mapped['page_table_mb']} MB")
    print(f"listing: {listed['listed_records_per_s']:,.0f} records/s")
    figures = {
        "benchmark": "scale",
        "versions": {name: version(name) for name in ("torch", "numpy")}
        | {"python": platform.python_version()},
        "num_records": num_shards * RECORDS_PER_SHARD,
        "num_shards": num_shards,
        **opening,
        "order_and_draws_ms": max(order_ms.values()),
        "order_and_draws_ms_by_shuffle": order_ms,
        "mixed_order_and_draws_ms": max(mixed_ms.values()),
        "mixed_order_and_draws_ms_by_shuffle": mixed_ms,
        "page_table_mb": mapped["page_table_mb"],
        "mappings": mapped,
        **listed,
    }
    print(json.dumps(figures))


def write_set(folder: Path, num_shards: int) -> None:
    """Writes a set of one shard, and then the table and the manifest of a large one over it."""
    write_shards(folder, SMALL.resized(1), 1)
    manifest = Manifest.load(folder)
    rows = np.zeros(num_shards, TABLE_DTYPE)
    rows["number"] = np.arange(num_shards)
    rows["records"] = RECORDS_PER_SHARD
    table = manifest.shard_table
    assert table is not None
    np.save(folder / table.name, rows)
    content = (folder / table.name).read_bytes()
    num_records = num_shards * RECORDS_PER_SHARD
    large = replace(
        manifest,
        shard_table=FileEntry(
            name=table.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        ),
        shards=ShardTable(rows, [layout.record_bytes for layout in manifest.layouts]),
        num_source=num_records,
        num_records=num_records,
        num_captions=num_records * manifest.layouts[0].num_captions,
    )
    write_file(folder / MANIFEST_NAME, large.dump().encode())


def open_in_new_process(folder: Path) -> dict[str, float]:
    """Returns what a new process measures."""
    command = [sys.executable, "-m", "bench.scale", "--open", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_opening(folder: Path) -> dict[str, float]:
    """Opens a set and its order; returns the time, and the memory that it adds at its peak."""
    before_kb = memory_kb("VmRSS")
    began = time.perf_counter()
    shards = open_shards(folder)
    shards.order(batch_size=BATCH_SIZE, seed=0).records(0)
    open_s = time.perf_counter() - began
    return {"open_s": open_s, "open_mb": (memory_kb("VmHWM") - before_kb) / KB_PER_MB}


def memory_kb(name: str) -> int:
    """Returns a figure of this process's memory, in units of 1024 bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def measure_order(num_shards: int, shuffle: Shuffle) -> float:
    """Returns what a step of a global batch costs the host, in ms."""
    sizes = np.full(num_shards, RECORDS_PER_SHARD)
    order = Order(sizes=sizes, batch_size=BATCH_SIZE, seed=0, shuffle=shuffle)
    return measure_order_and_draws_ms(order)


def measure_mixed_order(num_shards: int, shuffle: Shuffle) -> float:
    """Does what `measure_order` does, for the same shards as three sets with weights."""
    bounds = [0, num_shards * 6 // 10, num_shards * 9 // 10, num_shards]
    parts = tuple(np.full(stop - start, RECORDS_PER_SHARD) for start, stop in pairwise(bounds))
    order = MixedOrder(parts=parts, weights=WEIGHTS, batch_size=BATCH_SIZE, seed=0, shuffle=shuffle)
    return measure_order_and_draws_ms(order)


def measure_listing(num_records: int) -> dict[str, float]:
    """Returns how many records stage one lists per second, and the bytes of each in its list."""
    text = TextEncoder.load(str(ENCODER))
    with ThreadPoolExecutor(1) as pool:
        check = partial(check_records, tokenize=text.tokenize, max_tokens=24, buckets=(), pool=pool)
        began = time.perf_counter()
        with closing(build_index(make_records(num_records), check, lambda _: None)) as index:
            seconds = time.perf_counter() - began
            assert index.num_source == num_records
            (num_bytes,) = index._db.execute(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            ).fetchone()
    return {
        "listed_records_per_s": num_records / seconds,
        "listed_bytes_per_record": num_bytes / num_records,
    }


def make_records(num_records: int) -> Iterator[Record]:
    """Yields records with a caption of 13 words each."""
    for number in range(num_records):
        yield Record(
            key=f"{number:010d}",
            locator=FileLocator(path=f"/images/{number:010d}.jpg"),
            captions=(f"a photograph of a dog that runs over a meadow behind ball {number}",),
            extra={"file_name": f"{number:010d}.jpg"},
        )


if __name__ == "__main__":
    main()
