"""Compares a training step with its bound and with online encoding: a table, then a line of JSON.

    python bench/train_step.py [--quick] [--size 64 256] [--networks embedded|sd]

The training loop on shards (`ours`) takes turns with a bare loop on one resident batch (`bare`, the
bound), and then with a loop that reads JPEGs and runs the VAE and the text encoder in each step
(`online`). All use the same denoiser, optimizer, precision and batch size. Ratios are medians over
rounds. Then it measures single settings, and the share of the device's fastest matrix product.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from bench.stages.photographs import write_photographs
from bench.steps import changes, contenders
from bench.steps.networks import DEMO, EMBEDDED, make_unet, num_parameters, write_sd_encoders
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.encode import find_device, num_cores
from latent_t2i.pipeline.processes import ProcessInfo
from latent_t2i.pipeline.stage import load_encoders, make_shards
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.optim import make_optimizer
from latent_t2i.train.setup import Run, start

BATCH_SIZES = {"embedded": {64: 64}, "sd": {64: 64, 256: 32, 512: 16}}
SMALL_BATCH = 8
MIN_STEPS = 3


def main() -> None:
    """Measures each image size and prints its table."""
    args = parse()
    figures: dict[str, Any] = describe_setup(args) | {"sizes": {}}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as temporary:
        folder = Path(temporary)
        if args.networks == "sd":
            vae, text_encoder = write_sd_encoders(folder / "sd")
        else:
            vae, text_encoder = EMBEDDED / "vae", EMBEDDED / "clip"
        args.vae, args.text_encoder = args.vae or str(vae), args.text_encoder or str(text_encoder)
        args.images, args.captions = write_photographs(folder / "coco", args.records)
        for size_px in args.size:
            figures["sizes"][size_px] = measure_size(args, size_px, folder / str(size_px))
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    """Parses the command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Compares a training step with its limit.")
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument(
        "--size", nargs="+", type=int, help="image sizes in px; default: 64 256, quick: 64"
    )
    parser.add_argument(
        "--networks",
        choices=("embedded", "sd"),
        help="default: sd on a GPU (random weights), else embedded",
    )
    parser.add_argument("--vae", help="autoencoder; default: that of --networks")
    parser.add_argument("--text-encoder", help="text encoder; default: that of --networks")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--precision", choices=("bf16", "fp16", "no"), default="bf16")
    parser.add_argument("--batch-size", type=int, help="default: depends on size and networks")
    parser.add_argument("--records", type=int, help="number of synthetic images")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--turn", type=float, help="seconds per turn")
    parser.add_argument(
        "--workers", type=int, default=min(num_cores(), 16), help="workers of the DataLoader"
    )
    parser.add_argument(
        "--compile", action="store_true", default=on_gpu, help="measure torch.compile too"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="let ours replay a CUDA graph")
    parser.add_argument("--no-changes", action="store_true", help="do not measure single settings")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder; default: /tmp")
    args = parser.parse_args()
    args.networks = args.networks or ("sd" if on_gpu else "embedded")
    args.size = args.size or ([64] if args.quick else [64, 256])
    args.records = args.records or (128 if args.quick else 512)
    args.rounds = args.rounds or (2 if args.quick else 24)
    args.turn = args.turn or (1.0 if args.quick else 1.5)
    if args.precision == "fp16" and not on_gpu:
        parser.error("--precision fp16 needs a GPU, found none; expected bf16 or no")
    if args.cuda_graph and not on_gpu:
        parser.error("--cuda-graph needs a GPU, found none")
    return args


def describe_setup(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the versions and settings that the figures depend on."""
    on_gpu = torch.cuda.is_available()
    return {
        "benchmark": "train_step",
        "device": torch.cuda.get_device_name() if on_gpu else f"{num_cores()} cores",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")}
        | {"python": platform.python_version()},
        "networks": args.networks,
        "precision": args.precision,
        "cuda_graph": args.cuda_graph,
        "max_tokens": args.max_tokens,
        "workers": args.workers,
        "rounds": args.rounds,
    }


def measure_size(args: argparse.Namespace, size_px: int, folder: Path) -> dict[str, Any]:
    """Measures one image size and prints its table."""
    usual = BATCH_SIZES[args.networks].get(size_px, SMALL_BATCH)
    batch_size = args.batch_size or usual
    if batch_size > args.records:
        raise ValueError(
            f"--records: expected at least one batch of {batch_size} images, found {args.records}"
        )
    denoiser = DEMO if args.networks == "embedded" else DenoiserConfig()
    write_shards(args, size_px, folder / "shards")
    run = start_run(args, denoiser, batch_size, folder)
    resident = contenders.resident_batch(run)
    breakdown: list[dict[str, float]] = []
    turns, bare = make_turns(args, run, denoiser, resident, size_px, breakdown)
    device = run.accelerator.device
    step_s = contenders.time_steps(bare, device, 2) / 2
    num_steps = max(MIN_STEPS, round(args.turn / step_s))
    num_weights = num_parameters(run.state.unet)
    print(
        f"\n{size_px} px, {num_weights / 1e6:.1f} M weights, batch {batch_size}, in images/s; "
        f"medians of turns of {num_steps} steps"
    )
    figures: dict[str, Any] = {"batch_size": batch_size, "steps": num_steps, "weights": num_weights}
    for other, num_rounds in (("bare", args.rounds), ("online", max(2, args.rounds // 4))):
        rounds = take_turns(turns, other, num_steps, num_rounds)
        figures |= show(other, rounds, batch_size)
    run.progress.close()
    wall_s = sum(seconds for turn in breakdown for seconds in turn.values())
    shares = {name: sum(turn[name] for turn in breakdown) / wall_s for name in breakdown[0]}
    figures |= {"time_breakdown": {name: round(share, 4) for name, share in shares.items()}}
    print("time breakdown of ours: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    figures |= share_of_ceiling(bare, batch_size, figures["ours_beside_bare"], args, device)
    if not args.no_changes:
        figures["changes"] = measure_changes(args, denoiser, resident, num_steps)
    return figures


def write_shards(args: argparse.Namespace, size_px: int, folder: Path) -> None:
    """Encodes the images into shards."""
    config = PipelineConfig(
        name="bench",
        vae=args.vae,
        text_encoder=args.text_encoder,
        source=SourceConfig(images=str(args.images), captions=str(args.captions)),
        image_size_px=size_px,
        max_tokens=args.max_tokens,
        out=str(folder),
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_shards(config, load_encoders(config, find_device("auto", 0)), ProcessInfo())


def start_run(
    args: argparse.Namespace, denoiser: DenoiserConfig, batch_size: int, folder: Path
) -> Run:
    """Returns a run that is ready to train, set up as the training command does it."""
    config = TrainConfig(
        name="bench",
        vae=args.vae,
        text_encoder=args.text_encoder,
        shards=str(next((folder / "shards").rglob("manifest.json")).parent),
        out=str(folder / "run"),
        batch_size=batch_size,
        num_steps=10**9,
        mixed_precision=args.precision,
        checkpoint_every_steps=10**9,
        channels_last=torch.cuda.is_available(),
        cuda_graph=args.cuda_graph,
        trackers=("none",),
        model=denoiser,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        return start(config)


def make_turns(
    args: argparse.Namespace,
    run: Run,
    denoiser: DenoiserConfig,
    resident: contenders.Resident,
    size_px: int,
    breakdown: list[dict[str, float]],
) -> tuple[dict[str, Callable[[int], float]], Callable[[], None]]:
    """Returns the contenders, as functions from a number of steps to seconds, and the bare step.

    Each turn of `ours` appends its time breakdown to `breakdown`.
    """
    device, precision = run.accelerator.device, run.accelerator.mixed_precision
    channels, height, _ = run.plan.latent_shape

    def unet() -> torch.nn.Module:
        return make_unet(
            denoiser,
            latent_channels=channels,
            side=height,
            text_width=resident[2].shape[-1],
            device=device,
            precision=precision,
            channels_last=run.plan.config.channels_last,
        )

    model = unet()
    bare = contenders.bare_step(
        model, make_optimizer(run.plan.config.optim, model.parameters()), resident, precision
    )
    online = contenders.online_step(
        run,
        unet(),
        images=args.images,
        captions=args.captions,
        size_px=size_px,
        encoders=(args.vae, args.text_encoder),
        num_workers=args.workers,
    )

    def ours(num_steps: int) -> float:
        seconds, phases = contenders.ours(run, num_steps)
        breakdown.append(phases)
        return seconds

    return {
        "bare": lambda number: contenders.time_steps(bare, device, number),
        "ours": ours,
        "online": lambda number: contenders.then_wait(
            lambda: contenders.time_steps(online, device, number), min(2.0, 2 * args.turn)
        ),
    }, bare


def take_turns(
    turns: dict[str, Callable[[int], float]], other: str, num_steps: int, num_rounds: int
) -> list[tuple[float, float]]:
    """Returns the seconds per step of `other` and of ours for each round; the order alternates."""
    rounds = []
    for number in range(num_rounds):
        names = ("ours", other) if number % 2 else (other, "ours")
        step_s = {name: turns[name](num_steps) / num_steps for name in names}
        rounds.append((step_s[other], step_s["ours"]))
        print(f"[{other}: round {number + 1} of {num_rounds}]", file=sys.stderr, flush=True)
    return rounds


def show(other: str, rounds: Sequence[tuple[float, float]], batch_size: int) -> dict[str, float]:
    """Returns and prints the medians of ours and another contender."""
    ratio = statistics.median(theirs / ours for theirs, ours in rounds)
    theirs, ours = (batch_size / statistics.median(times) for times in zip(*rounds, strict=True))
    about = {"bare": "one resident batch", "online": "VAE and text encoder in each step"}
    print(
        f"{other:<8}{theirs:>9,.1f}   {about[other]:<36}ours in turns {ours:>9,.1f}: {ratio:.3f}x",
        flush=True,
    )
    return {
        other: round(theirs, 2),
        f"ours_beside_{other}": round(ours, 2),
        f"ratio_to_{other}": round(ratio, 4),
    }


def share_of_ceiling(
    bare: Callable[[], None],
    batch_size: int,
    images_per_s: float,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Returns the FLOP per image, the device's ceiling, and the share of it that ours reaches."""
    flops = changes.step_flops(bare) / batch_size
    ceiling = changes.ceiling_flops_per_s(device, args.precision, 0.2 * args.turn)
    share = flops * images_per_s / ceiling
    print(
        f"{flops / 1e9:.2f} GFLOP per image; fastest matrix product {ceiling / 1e12:.3f} TFLOP/s: "
        f"ours reaches {share:.1%} of it"
    )
    return {
        "flops_per_image": round(flops),
        "ceiling_flops_per_s": round(ceiling),
        "share_of_ceiling": round(share, 4),
    }


def measure_changes(
    args: argparse.Namespace,
    denoiser: DenoiserConfig,
    resident: contenders.Resident,
    num_steps: int,
) -> dict[str, float]:
    """Measures the speed-up of each single setting and prints it."""
    found = {}
    print("speed-up of single settings over a bare step with plain attention and default AdamW:")
    steps = changes.changes_for(resident[0].device, compiled=args.compile)
    for name, step in steps.items():
        found[name] = round(
            changes.compare(
                step,
                denoiser,
                resident,
                args.precision,
                num_steps=max(MIN_STEPS, num_steps // 2),
                rounds=max(2, args.rounds // 2),
            ),
            3,
        )
        print(f"  {name:<16}{found[name]:.2f}x", flush=True)
    return found


if __name__ == "__main__":
    main()
