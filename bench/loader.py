"""Compares this project's loader with others on the same records: a table, then a line of JSON.

    python bench/loader.py [--quick] [--content 77-float16 ...] [--records N] [--workers 0 2]

Each loader runs in its own process. The processes take turns, and a ratio compares two turns of one
round (loaders/rounds.py). The records are first written in every format to a temporary folder of up
to 8 GB, and all reads come from the page cache. Loaders that are not installed are skipped.
Results: docs/benchmarks.md.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from bench.loaders.contenders import ENTRIES, missing
from bench.loaders.contents import BATCH_SIZE, CONTENTS, SMALL, Content
from bench.loaders.rounds import Result, Runner, Timing, call, run
from bench.loaders.with_shards import write_shards

SHARD_COUNTS = (1, 10, 100, 1000)
QUICK_RECORDS = 512
QUICK_TIMING = Timing(rounds=3, turn_s=0.2, warm_up_s=0.2, start_together=True)
PARTS = ("contents", "memory", "opening")
MB = 1e6


def main() -> None:
    """Runs the selected parts and prints their tables."""
    args = parse()
    left_out = missing(args.contenders)
    names = [name for name in args.contenders if name not in left_out]
    figures: dict[str, Any] = describe_setup(args, names, left_out) | {"contents": {}}
    for name, reason in left_out.items():
        print(f"skipped: {name}: {reason}")
    for content in selected_contents(args) if "contents" in args.parts else ():
        with write_records(content, names, args.folder) as folders:
            for num_workers in args.workers:
                found = compare(content, names, folders, num_workers, args)
                figures["contents"].setdefault(content.name, {}).update(found)
    if "memory" in args.parts:
        figures["memory"] = memory(args, names)
    if "opening" in args.parts:
        figures["opening"] = opening(args)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Compares loaders on the same records.")
    names = [content.name for content in CONTENTS]
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument("--content", nargs="+", choices=names, help="default: all, quick: one")
    parser.add_argument("--records", type=int, help="records per content, at least 256")
    parser.add_argument(
        "--workers", type=int, nargs="+", help="worker processes; default: 0 2, quick: 0"
    )
    parser.add_argument("--contenders", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="default: 7, quick: 3")
    parser.add_argument("--turn", type=float, help="seconds per turn; default: 1, quick: 0.2")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder; default: /tmp")
    args = parser.parse_args()
    quick = args.quick
    args.content = args.content or (names[:1] if quick else names)
    args.workers = args.workers or ([0] if quick else [0, 2])
    flags = {"rounds": args.rounds, "turn_s": args.turn}
    overrides = {name: value for name, value in flags.items() if value is not None}
    args.timing = replace(QUICK_TIMING if quick else Timing(), **overrides)
    if args.records is not None and args.records < BATCH_SIZE:
        parser.error(f"--records: expected at least {BATCH_SIZE}, found {args.records}")
    return args


def describe_setup(
    args: argparse.Namespace, names: list[str], left_out: dict[str, str]
) -> dict[str, Any]:
    """Returns the versions and settings that the figures depend on."""
    peers = {found for name in names if (found := ENTRIES[name].distribution)}
    return {
        "benchmark": "loader",
        "versions": {name: version(name) for name in sorted({"torch", "numpy", *peers})}
        | {"python": platform.python_version()},
        "batch_size": BATCH_SIZE,
        "timing": asdict(args.timing),
        "left_out": left_out,
    }


def selected_contents(args: argparse.Namespace) -> Iterator[Content]:
    """Yields the selected contents with the selected number of records."""
    for content in CONTENTS:
        if content.name in args.content:
            num_records = args.records or (QUICK_RECORDS if args.quick else content.num_records)
            yield content.resized(num_records)


@contextmanager
def write_records(
    content: Content, names: list[str], folder: Path | None
) -> Iterator[dict[str, Path]]:
    """Writes the records and yields each contender's folder; removes them afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as temporary:
        whole = Path(temporary)
        log_progress(f"{content.name}: {content.num_records} records")
        request = {"names": names, "content": asdict(content), "folder": temporary}
        call("bench.loaders.store", request)
        yield {name: whole / ENTRIES[name].store for name in names}


def compare(
    content: Content, names: list[str], folders: dict[str, Path], workers: int, args: Any
) -> dict[str, Any]:
    """Measures a content with the given number of worker processes and prints the table."""
    runners = [
        Runner(name=name, num_workers=workers if ENTRIES[name].has_workers else 0)
        for name in names
        if not (workers and name == "cache")  # a full cache reads like map
    ]
    if workers:
        runners += [Runner(name=name, num_threads=workers) for name in ("map", "copy")]
    log_progress(
        f"{content.name}: {workers} workers: {', '.join(runner.label for runner in runners)}"
    )
    results = run(runners, content, folders, args.timing)
    show(content, workers, results)
    labels = {runner.label: runner.name for runner in runners}
    figures = {label: result_figures(content, result) for label, result in results.items()}
    if workers:
        return {f"with_{workers}_workers": figures}
    return {
        "num_records": content.num_records,
        "delivered_bytes_per_record": content.delivered_bytes,
        "stored_bytes_per_record": content.stored_bytes,
        **ratios(results, labels),
        "one_process": figures,
    }


def ratios(results: dict[str, Result], labels: dict[str, str]) -> dict[str, Any]:
    """Returns the speed of map access relative to the others, each in one process."""
    if "map" not in results:
        return {}
    times = {label: results["map"].times(result) for label, result in results.items()}
    peers = [label for label in results if ENTRIES[labels[label]].is_peer]
    best = min(peers, key=times.__getitem__, default=None)
    named = {
        "ratio_to_webdataset": times.get("webdataset"),
        "ratio_to_best_peer": times[best] if best else None,
        "ratio_to_hand_tuned": times.get("datasets-bytes"),
        "ratio_to_copy": times.get("copy"),
    }
    return {key: value and round(value, 3) for key, value in named.items()} | {"best_peer": best}


def result_figures(content: Content, result: Result) -> dict[str, float]:
    """Returns the figures of a result for the line of JSON."""
    return {
        "records_per_s": round(result.rate),
        "slowest": round(min(result.rates)),
        "fastest": round(max(result.rates)),
        "first_pass_per_s": round(result.start["first_pass_per_s"]),
        "first_batch_s": round(result.start["first_batch_s"], 4),
        "gb_per_s": round(result.rate * content.delivered_bytes / 1e9, 2),
        "anonymous_mb": round(result.peak("anonymous_bytes") / MB),
        "file_mb": round(result.peak("file_bytes") / MB),
    }


def show(content: Content, workers: int, results: dict[str, Result]) -> None:
    """Prints the table of one comparison."""
    size = content.num_records * content.stored_bytes / 1e9
    processes = f"{workers} worker processes" if workers else "one process"
    print(
        f"\n{content.name}, {processes}: {content.num_records} records, {size:.2f} GB, "
        f"{content.delivered_bytes / 1e3:.1f} kB delivered per record"
    )
    print(
        f"{'':<18}{'records/s':>10}{'slowest':>10}{'fastest':>10}{'GB/s':>7}{'map is':>9}"
        f"{'first batch':>13}{'memory':>9}"
    )
    for label, result in results.items():
        times = f"{results['map'].times(result):.2f}x" if "map" in results else ""
        figures = result_figures(content, result)
        print(
            f"{label:<18}{figures['records_per_s']:>10,}{figures['slowest']:>10,}"
            f"{figures['fastest']:>10,}{figures['gb_per_s']:>7.1f}{times:>9}"
            f"{1e3 * figures['first_batch_s']:>10,.0f} ms{figures['anonymous_mb']:>6,} MB"
        )
    sys.stdout.flush()


def memory(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Measures resident memory with a quarter of the records and with all, and prints it."""
    content = next(content for content in CONTENTS if content.name == "32-int8")
    most = 4 * (BATCH_SIZE if args.quick else content.num_records // 4)
    timing = replace(args.timing, rounds=2)
    measured = ("map",) if args.quick else ("map", "cache", "stream")
    found: dict[str, Any] = {name: {} for name in measured if name in names}
    for num_records in (most // 4, most):
        smaller = content.resized(num_records)
        with write_records(smaller, list(found), args.folder) as folders:
            results = run([Runner(name=name) for name in found], smaller, folders, timing)
            for name, sizes in found.items():
                result = results[name]
                sizes[num_records] = {
                    "set_mb": round(num_records * content.stored_bytes / MB),
                    "anonymous_mb": round(result.peak("anonymous_bytes") / MB),
                    "file_mb": round(result.peak("file_bytes") / MB),
                }
    print(f"\nresident memory, {content.name}: anonymous, and mapped files")
    print(f"{'':<18}{'records':>10}{'set':>12}{'own':>12}{'mapped':>12}")
    for name, sizes in found.items():
        for num_records, row in sizes.items():
            cells = "".join(f"{row[key]:>9,} MB" for key in row)
            print(f"{name:<18}{num_records:>10,}{cells}")
    return found


def opening(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures opening and the first batch by the number of shards, and prints it."""
    rows = []
    small = SMALL.resized(SHARD_COUNTS[-1]) if args.quick else SMALL
    for count in SHARD_COUNTS:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as temporary:
            log_progress(f"{count} shards")
            write_shards(Path(temporary), small, small.num_records // count)
            rows.append(json.loads(call("bench.loaders.opening", temporary)))
    print("\nopening a set for map access, and its first batch of 256 records over all shards")
    print(f"{'':>8}{'':>10}{'page cache warm, ms':>26}{'cold, ms':>22}{'cold, MB read':>22}")
    print(f"{'shards':>8}{'MB':>10}" + f"{'open':>12}{'+ batch':>12}" * 3)
    for row in rows:
        cold, warm = row["cold"], row["warm"]
        cells = [warm["opening_s"], warm["first_batch_s"], cold["opening_s"], cold["first_batch_s"]]
        read = [cold["opening_bytes"], cold["first_batch_bytes"]]
        print(
            f"{row['shards']:>8,}{row['bytes'] / MB:>10.1f}"
            + "".join(f"{1e3 * cell:>12.1f}" for cell in cells)
            + "".join(f"{cell / MB:>12.2f}" for cell in read)
            + ("" if row["evicted"] else "  (still in the page cache)")
        )
    return rows


def log_progress(text: str) -> None:
    """Prints progress to standard error."""
    print(f"[{text}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
