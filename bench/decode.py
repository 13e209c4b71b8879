"""Compares decoding JPEGs at a reduced scale and in full: a table, then a line of JSON.

    python bench/decode.py [--quick] [--images DIR] [--size 64 128 256]

For each target size, prints images per second on one core (medians over rounds, both ways in turns)
and the PSNR between the two results (minimum and median over the images). The images are synthetic,
and noisier than photographs, unless a folder of JPEG files is given.
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
    """Measures each target size and prints its row."""
    parser = argparse.ArgumentParser(description="Compares two ways to decode JPEG files.")
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument("--images", type=Path, help="folder of .jpg files; default: synthetic")
    parser.add_argument(
        "--size", nargs="+", type=int, default=[64, 128, 256], help="target sizes in px"
    )
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
    """Returns the bytes of at most `most` JPEG files."""
    if images is not None:
        return [path.read_bytes() for path in sorted(images.glob("*.jpg"))[:most]]
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder, _ = write_photographs(Path(temporary), most)
        return [path.read_bytes() for path in sorted(folder.iterdir())]


def compare(contents: Sequence[bytes], size_px: int, rounds: int) -> dict[str, Any]:
    """Measures one target size and prints its row."""
    ways = {
        name: Preprocessing(size_px=(size_px, size_px), fast_jpeg=fast)
        for name, fast in (("whole", False), ("reduced", True))
    }
    pixels = {
        name: [load(c, way, key="k").pixels[0] for c in contents] for name, way in ways.items()
    }
    psnrs = [psnr(a, b) for a, b in zip(pixels["whole"], pixels["reduced"], strict=True)]
    turns = []
    for _ in range(rounds):
        turns.append({name: len(contents) / seconds(contents, way) for name, way in ways.items()})
    rates = {name: statistics.median(turn[name] for turn in turns) for name in ways}
    times = statistics.median(turn["reduced"] / turn["whole"] for turn in turns)
    figures = {
        "whole_per_s": round(rates["whole"], 1),
        "reduced_per_s": round(rates["reduced"], 1),
        "ratio": round(times, 3),
        "psnr_least": round(min(psnrs), 1),
        "psnr_median": round(statistics.median(psnrs), 1),
    }
    print(
        f"{size_px:>5}{rates['whole']:>10,.0f}{rates['reduced']:>11,.0f}{times:>7.2f}x"
        f"{min(psnrs):>9.1f} dB{statistics.median(psnrs):>5.1f} dB",
        flush=True,
    )
    return figures


def seconds(contents: Sequence[bytes], preprocessing: Preprocessing) -> float:
    """Returns the seconds to decode all files."""
    began = time.perf_counter()
    for content in contents:
        load(content, preprocessing, key="k")
    return time.perf_counter() - began


def psnr(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """Returns the peak signal-to-noise ratio of 8-bit pixels in dB, 99 if they are equal."""
    error = float(np.square(first.astype(np.float64) - second).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0


if __name__ == "__main__":
    main()
