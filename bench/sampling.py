"""Sampling against the stock `StableDiffusionPipeline`: the same bundle, steps and batch size.

    python -m bench.sampling                      # the shipped bundle, 64 images, 25 steps
    python -m bench.sampling --quick
    python -m bench.sampling --bundle runs/coco512/bundle --device cuda --num-images 16

Every contender turns the same prompts and seeds into PNG files. Before anything is timed, images
that should be the stock pipeline's are compared with them: not those of an option that makes other
images by design. They take turns, and a ratio is the median of the ratios
within a round.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from latent_t2i.model import generate
from latent_t2i.sample import sampler
from latent_t2i.sample.config import DrawSettings
from latent_t2i.sample.folder import Picture, draw_folder, picture_path
from latent_t2i.sample.schedulers import choose_scheduler

BUNDLE = Path(__file__).resolve().parent.parent / "scenes" / "bundle"
INTERVAL = (0.3, 5.0)
NUM_PROMPTS = 8
"""Distinct prompts; in practice a prompt is drawn with several seeds."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to draw, and the contender that it is compared with."""

    about: str
    base: str = "stock"
    own: bool = True
    load: dict[str, Any] = field(default_factory=dict)
    speed_up: dict[str, bool] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    overlap: bool | None = None
    """Decode in a second thread; None: on a GPU only."""
    max_difference: int | None = 2
    """Largest difference from the stock pipeline's bytes; None: other images by design."""


BF16 = {"dtype": "bfloat16"}
OPTIONS = {
    "stock": Option(about="StableDiffusionPipeline, one call per batch", own=False),
    "ours": Option(about="sample.run"),
    "overlap": Option(about="--, decoding in a second thread", base="ours", overlap=True),
    "channels_last": Option(about="--channels-last", base="ours", speed_up={"channels_last": True}),
    "interval": Option(
        about=f"--guidance-interval {INTERVAL[0]} {INTERVAL[1]}",
        base="ours",
        settings={"guidance_interval": INTERVAL},
        max_difference=None,
    ),
    "compile": Option(about="--compile", base="ours", speed_up={"compiled": True}),
    "stock_bf16": Option(
        about="StableDiffusionPipeline in bfloat16", own=False, load=BF16, max_difference=None
    ),
    "bf16": Option(about="--dtype bfloat16", base="stock_bf16", load=BF16, max_difference=None),
}
QUICK = ("stock", "ours", "channels_last", "interval")


def main() -> None:
    """Measures all options and prints the table."""
    args = parse()
    figures = describe_setup(args)
    options = {name: OPTIONS[name] for name in args.options}
    pipelines = {name: prepare(args, option) for name, option in options.items()}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as temporary:
        rounds = measure(args, options, pipelines, Path(temporary))
    print(json.dumps(figures | show(args, options, rounds)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Compares sampling with the stock pipeline.")
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--num-images", type=int, help="default: 64, or 8 with --quick")
    parser.add_argument("--num-steps", type=int, help="default: 25, or 5 with --quick")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 with --quick")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, metavar="OPTION")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    args = parser.parse_args(argv)
    args.num_images = args.num_images or (8 if args.quick else 64)
    args.num_steps = args.num_steps or (5 if args.quick else 25)
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.batch_size = min(args.batch_size, args.num_images)
    args.options = args.options or (QUICK if args.quick else [*OPTIONS])
    bases = [name for option in args.options for name in (OPTIONS[option].base, option)]
    args.options = list(dict.fromkeys(["stock", *bases]))
    return args


def describe_setup(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the versions and settings that the figures depend on."""
    device = sampler.choose_device(args.device)
    return {
        "benchmark": "sampling",
        "device": torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")}
        | {"python": platform.python_version()},
        "bundle": str(args.bundle),
        "num_images": args.num_images,
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "guidance_scale": args.guidance_scale,
        "rounds": args.rounds,
    }


def prepare(args: argparse.Namespace, option: Option) -> Any:
    """Loads the bundle as the option needs it."""
    loading = {"dtype": "float32"} | option.load
    pipeline: Any = sampler.load(args.bundle, device=args.device, **loading)
    sampler.speed_up(pipeline.unet, **option.speed_up)
    pipeline.scheduler = choose_scheduler(pipeline.scheduler, "dpmpp")
    return pipeline


def pictures_of(args: argparse.Namespace, option: Option) -> list[Picture]:
    """Returns the pictures to draw: a few prompts, each with several seeds."""
    settings = DrawSettings(num_steps=args.num_steps, guidance_scale=args.guidance_scale)
    return [
        Picture(
            prompt=f"a large red star {number * NUM_PROMPTS // args.num_images}",
            seed=number,
            settings=replace(settings, **option.settings),
        )
        for number in range(args.num_images)
    ]


def measure(
    args: argparse.Namespace,
    options: dict[str, Option],
    pipelines: dict[str, Any],
    folder: Path,
) -> list[dict[str, float]]:
    """Returns the images per second of each option in each round."""
    turns = {
        name: turn_of(args, option, pipelines[name], folder / name)
        for name, option in options.items()
    }
    for name, turn in turns.items():  # also compiles
        turn()
        compare(args, folder / name, folder / "stock", options[name].max_difference)
    rounds = []
    for number in range(args.rounds):
        names = list(turns)[:: -1 if number % 2 else 1]
        rounds.append({name: args.num_images / turns[name]() for name in names})
        print(f"[round {number + 1} of {args.rounds}]", file=sys.stderr, flush=True)
    return rounds


def turn_of(
    args: argparse.Namespace, option: Option, pipeline: Any, folder: Path
) -> Callable[[], float]:
    """Returns a function that draws all pictures and returns the seconds it took."""
    pictures = pictures_of(args, option)

    def own() -> None:
        draw_folder(pipeline, pictures, folder, batch_size=args.batch_size, identity={})

    def turn() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        beside = generate.decodes_beside if option.overlap is None else lambda _: option.overlap
        with mock.patch.object(generate, "decodes_beside", beside):
            began = time.perf_counter()
            if option.own:
                own()
            else:
                draw_stock(args, pipeline, pictures, folder)
            return time.perf_counter() - began

    return turn


def draw_stock(
    args: argparse.Namespace, pipeline: Any, pictures: Sequence[Picture], folder: Path
) -> None:
    """Draws as a script with diffusers does: a call per batch, then a file per image."""
    for start in range(0, len(pictures), args.batch_size):
        batch = pictures[start : start + args.batch_size]
        images = pipeline(
            [picture.prompt for picture in batch],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_steps,
            generator=[torch.Generator().manual_seed(picture.seed) for picture in batch],
        ).images
        for number, image in enumerate(images, start):
            image.save(picture_path(folder, number))


def compare(
    args: argparse.Namespace, folder: Path, stock: Path, max_difference: int | None
) -> None:
    """Raises AssertionError if an image differs more than it may from the stock pipeline's."""
    for number in range(args.num_images):
        with (
            Image.open(picture_path(folder, number)) as one,
            Image.open(picture_path(stock, number)) as other,
        ):
            difference = np.abs(np.asarray(one, int) - np.asarray(other, int)).max()
        assert max_difference is None or difference <= max_difference, (folder.name, difference)


def show(
    args: argparse.Namespace, options: dict[str, Option], rounds: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Prints the table; returns its figures."""
    print(
        f"\n{args.num_images} images, {args.num_steps} steps, batches of {args.batch_size}: "
        f"medians of {len(rounds)} rounds"
    )
    print(f"{'':15}{'images/s':>9}{'to stock':>10}{'to base':>9}   what")
    figures: dict[str, Any] = {}
    for name, option in options.items():
        rate = statistics.median(turn[name] for turn in rounds)
        to_stock, to_base = (
            statistics.median(turn[name] / turn[base] for turn in rounds)
            for base in ("stock", option.base)
        )
        figures[name] = {
            "images_per_s": round(rate, 3),
            "ratio_to_stock": round(to_stock, 3),
            f"ratio_to_{option.base}": round(to_base, 3),
        }
        print(f"{name:15}{rate:>9.2f}{to_stock:>9.2f}x{to_base:>8.2f}x   {option.about}")
    sys.stdout.flush()
    return {"options": figures}


if __name__ == "__main__":
    main()
