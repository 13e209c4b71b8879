"""Compares stage one with its bound and with a plain script: a table, then a line of JSON.

    python bench/stage_one.py [--quick] [--size 64 256] [--networks embedded|sd|tiny]
                              [--images DIR --captions FILE]

Each round measures on the same JPEG files: decoding alone on all cores, the encoders alone on
tensors in memory, the whole stage from listing to manifest, and the script that most people would
write (bench/stages/plain_script.py). No measurement includes loading the networks. Ratios are
medians over rounds. The figures so far are printed as JSON after each size; the last line has them
all. A size that fails is recorded with its reason.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import io
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from bench.stages import plain_script
from bench.stages.photographs import write_photographs
from bench.steps.attempts import attempt, emit
from bench.steps.networks import NETWORKS, find_encoders
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.encode import (
    Encoders,
    encode_captions,
    encode_views,
    find_device,
    fixed_kernels,
    num_cores,
    single_threaded,
)
from latent_t2i.pipeline.images import Picture, Preprocessing
from latent_t2i.pipeline.index import TokenizedRecord
from latent_t2i.pipeline.processes import ProcessInfo
from latent_t2i.pipeline.sources import coco
from latent_t2i.pipeline.stage import load_encoders, make_shards
from latent_t2i.pipeline.workers import GPU_STREAMS, Batch, cut_batches, load_record


def main() -> None:
    """Measures each image size and prints its table."""
    args = parse()
    figures: dict[str, Any] = describe_setup(args) | {"sizes": {}}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as temporary:
        folder = Path(temporary)
        if args.images is None:
            args.images, args.captions = write_photographs(folder / "coco", args.records)
        vae, text_encoder = find_encoders(args.networks, folder / "networks")
        args.vae, args.text_encoder = args.vae or str(vae), args.text_encoder or str(text_encoder)
        for size_px in args.size:
            figures["sizes"][size_px] = attempt(
                f"{size_px} px", partial(measure_size, args, size_px, folder)
            )
            emit(figures)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Compares stage one with its bound.")
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument("--size", nargs="+", type=int, default=[64], help="image sizes in px")
    parser.add_argument("--images", type=Path, help="folder of COCO images; default: synthetic")
    parser.add_argument("--captions", type=Path, help="captions file of --images")
    parser.add_argument("--records", type=int, help="number of synthetic images")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--networks",
        choices=tuple(NETWORKS),
        default="embedded",
        help="sd: of Stable Diffusion's size, tiny: to try the script; both with random weights",
    )
    parser.add_argument("--vae", help="autoencoder; default: that of --networks")
    parser.add_argument("--text-encoder", help="text encoder; default: that of --networks")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, help="default: stage one's")
    parser.add_argument("--compile", action="store_true", help="compile the VAE's encoder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder; default: /tmp")
    args = parser.parse_args()
    args.records = args.records or (256 if args.quick else 3000)
    args.rounds = args.rounds or (1 if args.quick else 5)
    return args


def describe_setup(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the versions and settings that the figures depend on."""
    device = find_device(args.device, 0)
    on_gpu = device.type == "cuda"
    return {
        "benchmark": "stage_one",
        "device": torch.cuda.get_device_name() if on_gpu else f"{num_cores()} cores",
        "versions": {name: version(name) for name in ("torch", "diffusers", "pillow")}
        | {"python": platform.python_version()},
        "networks": args.networks,
        "compile": args.compile,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
    }


def measure_size(args: argparse.Namespace, size_px: int, folder: Path) -> dict[str, Any]:
    """Measures one image size and prints the medians."""
    config = PipelineConfig(
        name="bench",
        vae=args.vae,
        text_encoder=args.text_encoder,
        source=SourceConfig(images=str(args.images), captions=str(args.captions)),
        image_size_px=size_px,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        compile=args.compile,
        max_quarantined=0,
        out=str(folder / "shards"),
    )
    encoders = load_encoders(config, find_device(args.device, 0))
    records = list(coco.records(args.images, args.captions))
    tokenized = [TokenizedRecord(r, encoders.text.tokenize(r.captions)) for r in records]
    preprocessing = Preprocessing(size_px=(size_px, size_px))
    batches = list(cut_batches(None, tokenized, preprocessing, encoders.batch_size))
    turns = {
        "decode": lambda: decode(batches),
        "encode": lambda: encode(batches, encoders),
        "stage": lambda: stage(config, encoders),
        "script": lambda: script(args, size_px, folder / "script"),
    }
    rounds = []
    for number in range(args.rounds):
        names = list(turns)[:: -1 if number % 2 else 1]
        rounds.append({name: len(records) / turns[name]() for name in names})
        print(f"[{size_px} px: round {number + 1} of {args.rounds}]", file=sys.stderr, flush=True)
    figures = {"batch_size": encoders.batch_size, "tf32": encoders.tf32}
    return figures | show(size_px, len(records), rounds, on_gpu=encoders.device.type == "cuda")


def decode(batches: Sequence[Batch]) -> float:
    """Returns the seconds to decode all records on all cores."""
    preprocessing = batches[0].preprocessing
    began = time.perf_counter()
    with ThreadPoolExecutor(num_cores()) as pool:
        records = (record for batch in batches for record in batch.records)
        for picture in pool.map(lambda record: load_record(record, preprocessing), records):
            assert isinstance(picture, Picture)
    return time.perf_counter() - began


def encode(batches: Sequence[Batch], encoders: Encoders) -> float:
    """Returns the seconds to encode decoded images and all captions."""
    rng = np.random.default_rng(0)
    width, height = batches[0].preprocessing.size_px
    pixels = rng.integers(0, 256, (1, len(batches[0].records), height, width, 3), np.uint8)
    on_gpu = encoders.device.type == "cuda"

    def one(batch: Batch) -> None:
        stream = torch.cuda.Stream(encoders.device) if on_gpu else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            encode_views(encoders, pixels[:, : len(batch.records)])
            for captions in batch.captions:
                encode_captions(encoders, captions)

    with (
        single_threaded(),
        fixed_kernels(tf32=encoders.tf32),
        ThreadPoolExecutor(
            GPU_STREAMS if on_gpu else num_cores(), initializer=lambda: torch.set_num_threads(1)
        ) as pool,
    ):
        began = time.perf_counter()
        list(pool.map(one, batches))
        return time.perf_counter() - began


def stage(config: PipelineConfig, encoders: Encoders) -> float:
    """Returns the seconds from listing the source to the manifest."""
    with tempfile.TemporaryDirectory(dir=Path(str(config.out)).parent) as out:
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_shards(replace(config, out=out), encoders, ProcessInfo())
        return time.perf_counter() - began


def script(args: argparse.Namespace, size_px: int, out: Path) -> float:
    """Returns the seconds that the plain script needs."""
    vae, text_encoder = Path(args.vae), Path(args.text_encoder)
    done = plain_script.main(args.images, args.captions, vae, text_encoder, out, size_px)
    shutil.rmtree(out)
    return float(done["seconds"])


def show(
    size_px: int, num_records: int, rounds: Sequence[dict[str, float]], *, on_gpu: bool
) -> dict[str, Any]:
    """Returns and prints the medians of one image size."""
    for turn in rounds:
        # On a CPU the same cores decode and encode. A GPU encodes while the CPU decodes.
        both = 1 / (1 / turn["decode"] + 1 / turn["encode"])
        turn["bound"] = turn["encode"] if on_gpu else both
    rates = {name: statistics.median(turn[name] for turn in rounds) for name in rounds[0]}
    ratios = {
        f"ratio_to_{name}": round(statistics.median(t["stage"] / t[name] for t in rounds), 3)
        for name in ("bound", "script")
    }
    print(f"\n{size_px} px, {num_records} images: images/s, medians of {len(rounds)} rounds")
    about = {
        "decode": "decoding alone, all cores",
        "encode": "the encoders alone",
        "bound": "the encoders alone" if on_gpu else "decoding and encoding, nothing else",
        "stage": "the whole stage",
        "script": "the plain script",
    }
    for name, text in about.items():
        times = f"{rates['stage'] / rates[name]:.2f}x" if name != "stage" else ""
        print(f"{name:<8}{rates[name]:>9,.1f}   {text:<36}{times}")
    sys.stdout.flush()
    return {name: round(rate, 1) for name, rate in rates.items()} | ratios


if __name__ == "__main__":
    main()
