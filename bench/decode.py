"""Decoding a JPEG at a fraction of its size beside decoding it whole: a table, then a line of JSON.

    python bench/decode.py [--quick] [--images DIR] [--size 64 128 256]

For each wanted size: images a second on one core both ways, as the median of rounds in which both
take turns, and how near the pixels are (PSNR over all images: least and median). The pictures are
made up unless a folder of JPEG files is given; made-up ones are noisier than photographs.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from bench.stages.photographs import write_photographs
from latent_t2i.pipeline.images import Preprocessing, load


def main() -> None:
    """Measures each size and prints it."""
    parser = argparse.ArgumentParser(description="Compares two ways to decode JPEG files.")
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument("--images", type=Path, help="a folder of .jpg files; default: made up")
    parser.add_argument("--size", nargs="+", type=int, default=[64, 128, 256], help="in px")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 5)
    contents = read(args.images, 20 if args.quick else 80)
    print(f"{len(contents)} images, one core, medians of {rounds} rounds")
    print(f"{'px':>5}{'whole/s':>10}{'reduced/s':>11}{'times':>8}{'least PSNR':>12}{'median':>8}")
    sizes = {size_px: compare(contents, size_px, rounds) for size_px in args.size}
    print(
        json.dumps({"benchmark": "decode", "versions": {"pillow": version("pillow")}, "px": sizes})
    )


def read(images: Path | None, most: int) -> list[bytes]:
    """Returns the content of some JPEG files."""
    if images is not None:
        return [path.read_bytes() for path in sorted(images.glob("*.jpg"))[:most]]
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder, _ = write_photographs(Path(temporary), most)
        return [path.read_bytes() for path in sorted(folder.iterdir())]


def compare(contents: Sequence[bytes], size_px: int, rounds: int) -> dict[str, Any]:
    """Returns the figures of one wanted size, and prints them."""
    ways = {
        name: Preprocessing(size_px=(size_px, size_px), fast_jpeg=fast)
        for name, fast in (("whole", False), ("reduced", True))
    }
    pixels = {name: [load(c, how, key="k").pixels for c in contents] for name, how in ways.items()}
    nearness = [psnr(a, b) for a, b in zip(pixels["whole"], pixels["reduced"], strict=True)]
    turns = []
    for _ in range(rounds):
        turns.append({name: len(contents) / seconds(contents, how) for name, how in ways.items()})
    rates = {name: statistics.median(turn[name] for turn in turns) for name in ways}
    times = statistics.median(turn["reduced"] / turn["whole"] for turn in turns)
    figures = {
        "whole_per_s": round(rates["whole"], 1),
        "reduced_per_s": round(rates["reduced"], 1),
        "ratio": round(times, 3),
        "psnr_least": round(min(nearness), 1),
        "psnr_median": round(statistics.median(nearness), 1),
    }
    print(
        f"{size_px:>5}{rates['whole']:>10,.0f}{rates['reduced']:>11,.0f}{times:>7.2f}x"
        f"{min(nearness):>9.1f} dB{statistics.median(nearness):>5.1f} dB",
        flush=True,
    )
    return figures


def seconds(contents: Sequence[bytes], how: Preprocessing) -> float:
    """Returns how long decoding all of them takes."""
    began = time.perf_counter()
    for content in contents:
        load(content, how, key="k")
    return time.perf_counter() - began


def psnr(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Returns the peak signal-to-noise ratio of 8-bit pixels in dB; 99 for equal ones."""
    error = float(np.square(first.astype(np.float64) - second).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0


if __name__ == "__main__":
    main()
