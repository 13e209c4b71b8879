"""Compares a training step with its bound and with online encoding: a table, then a line of JSON.

    python bench/train_step.py [--quick] [--size 64 256] [--networks embedded|sd|tiny]

The training loop on shards (`ours`) takes turns with a bare loop on one resident batch (`bare`, the
bound), and then with a loop that reads JPEGs and runs the VAE and the text encoder in each step
(`online`). All use the same denoiser, optimizer, precision and batch size. Ratios are medians over
rounds. Then it measures single settings, and the share of the device's fastest matrix product.

The figures so far are printed as JSON after each part; the last line has them all. A part that
fails is recorded with its reason, and the others go on.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import io
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from bench.stages.photographs import write_photographs
from bench.steps import changes, contenders
from bench.steps.attempts import attempt, emit, free
from bench.steps.networks import NETWORKS, find_encoders, make_unet, num_parameters
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.encode import find_device, num_cores
from latent_t2i.pipeline.processes import ProcessInfo
from latent_t2i.pipeline.stage import load_encoders, make_shards
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.optim import make_optimizer
from latent_t2i.train.prepare import compile_blocks
from latent_t2i.train.setup import Run, start

BATCH_SIZES = {"embedded": {64: 64}, "sd": {64: 64, 256: 32, 512: 16}, "tiny": {}}
SMALL_BATCH = 8
MIN_STEPS = 3
PARTS = ("bare", "online", "changes")


def main() -> None:
    """Measures each image size and prints its table."""
    args = parse()
    figures: dict[str, Any] = describe_setup(args) | {"sizes": {}}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as temporary:
        folder = Path(temporary)
        vae, text_encoder = find_encoders(args.networks, folder / "networks")
        args.vae, args.text_encoder = args.vae or str(vae), args.text_encoder or str(text_encoder)
        args.images, args.captions = write_photographs(folder / "coco", args.records)
        for size_px in args.size:
            measure_size(args, size_px, folder / str(size_px), figures)
    emit(figures)


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
        choices=tuple(NETWORKS),
        help="default: sd on a GPU, else embedded; sd and tiny have random weights",
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
        "--compile", action="store_true", default=on_gpu, help="measure the change to torch.compile"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="compile the denoiser's blocks for all contenders"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="let ours replay a CUDA graph")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all"
    )
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
        "compiled": args.compiled,
        "cuda_graph": args.cuda_graph,
        "max_tokens": args.max_tokens,
        "workers": args.workers,
        "rounds": args.rounds,
    }


def measure_size(
    args: argparse.Namespace, size_px: int, folder: Path, figures: dict[str, Any]
) -> None:
    """Measures one image size, prints its tables, and adds its figures to those of the others."""
    batch_size = args.batch_size or BATCH_SIZES[args.networks].get(size_px, SMALL_BATCH)
    if batch_size > args.records:
        raise ValueError(
            f"--records: expected at least one batch of {batch_size} images, found {args.records}"
        )
    found: dict[str, Any] = {"batch_size": batch_size}
    figures["sizes"][size_px] = found
    prepared = attempt(f"{size_px} px", lambda: prepare(args, size_px, batch_size, folder))
    if isinstance(prepared, dict):
        found |= prepared
        emit(figures)
        return
    run, resident = prepared
    del prepared
    found["weights"] = num_parameters(run.state.unet)
    print(f"\n{size_px} px, {found['weights'] / 1e6:.1f} M weights, batch {batch_size}: images/s")
    # One network beside that of the run at a time, or those of 512 px would not fit on a GPU.
    for name, measure in (("bare", measure_bare), ("online", measure_online)):
        if name in args.parts:
            part = attempt(name, partial(measure, args, run, resident, size_px))
            found |= {name: part} if "failed" in part else part
            emit(figures)
    run.progress.close()
    del run
    free()
    if "changes" in args.parts:
        found["changes"] = {}
        measure_changes(args, resident, found["changes"], lambda: emit(figures))


def prepare(
    args: argparse.Namespace, size_px: int, batch_size: int, folder: Path
) -> tuple[Run, contenders.Resident]:
    """Returns a run on shards of this image size, and one of its batches on the device."""
    write_shards(args, size_px, folder / "shards")
    free()
    run = start_run(args, batch_size, folder)
    return run, contenders.resident_batch(run)


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


def start_run(args: argparse.Namespace, batch_size: int, folder: Path) -> Run:
    """Returns a run that is ready to train, set up as the training command does it."""
    config = TrainConfig(
        name="bench",
        vae=args.vae,
        text_encoder=args.text_encoder,
        shards=(str(next((folder / "shards").rglob("manifest.json")).parent),),
        out=str(folder / "run"),
        batch_size=batch_size,
        num_steps=10**9,
        mixed_precision=args.precision,
        checkpoint_every_steps=10**9,
        channels_last=torch.cuda.is_available(),
        compile=args.compiled,
        cuda_graph=args.cuda_graph,
        trackers=("none",),
        model=NETWORKS[args.networks],
    )
    with contextlib.redirect_stderr(io.StringIO()):
        return start(config)


def make_denoiser(
    args: argparse.Namespace, run: Run, resident: contenders.Resident
) -> torch.nn.Module:
    """Returns a denoiser with the settings of the run's."""
    unet = make_unet(
        NETWORKS[args.networks],
        latent_channels=resident[0].shape[1],
        side=resident[0].shape[2],
        text_width=resident[2].shape[-1],
        device=run.accelerator.device,
        precision=run.accelerator.mixed_precision,
        channels_last=run.plan.config.channels_last,
    )
    if args.compiled:
        compile_blocks(unet, num_shapes=1)
    return unet


def measure_bare(
    args: argparse.Namespace, run: Run, resident: contenders.Resident, size_px: int
) -> dict[str, Any]:
    """Compares the training loop with a bare loop on one batch, and with the device's ceiling."""
    device, precision = run.accelerator.device, run.accelerator.mixed_precision
    model = make_denoiser(args, run, resident)
    optimizer = make_optimizer(run.plan.config.optim, model.parameters())
    bare = contenders.bare_step(model, optimizer, resident, precision)
    breakdown: list[dict[str, float]] = []

    def ours(num_steps: int) -> float:
        seconds, phases = contenders.ours(run, num_steps)
        breakdown.append(phases)
        return seconds

    turns = {"bare": lambda number: contenders.time_steps(bare, device, number), "ours": ours}
    num_steps = count_steps(args, bare, device)
    batch_size = len(resident[0])
    figures: dict[str, Any] = {"steps": num_steps}
    figures |= show("bare", take_turns(turns, "bare", num_steps, args.rounds), batch_size)
    wall_s = sum(seconds for turn in breakdown for seconds in turn.values())
    shares = {name: sum(turn[name] for turn in breakdown) / wall_s for name in breakdown[0]}
    figures |= {"time_breakdown": {name: round(share, 4) for name, share in shares.items()}}
    print("time breakdown of ours: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()))
    return figures | share_of_ceiling(bare, batch_size, figures["ours_beside_bare"], args, device)


def measure_online(
    args: argparse.Namespace, run: Run, resident: contenders.Resident, size_px: int
) -> dict[str, Any]:
    """Compares the training loop with one that encodes JPEGs and captions in each step."""
    device = run.accelerator.device
    online = contenders.online_step(
        run,
        make_denoiser(args, run, resident),
        images=args.images,
        captions=args.captions,
        size_px=size_px,
        encoders=(args.vae, args.text_encoder),
        num_workers=args.workers,
    )

    def turn(num_steps: int) -> float:
        return contenders.then_wait(
            lambda: contenders.time_steps(online, device, num_steps), min(2.0, 2 * args.turn)
        )

    turns = {"online": turn, "ours": lambda number: contenders.ours(run, number)[0]}
    rounds = take_turns(
        turns, "online", count_steps(args, online, device), max(2, args.rounds // 4)
    )
    return show("online", rounds, len(resident[0]))


def count_steps(args: argparse.Namespace, step: Callable[[], None], device: torch.device) -> int:
    """Returns the number of steps of a turn."""
    step_s = contenders.time_steps(step, device, 2) / 2
    return max(MIN_STEPS, round(args.turn / step_s))


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
    resident: contenders.Resident,
    found: dict[str, Any],
    emit_all: Callable[[], None],
) -> None:
    """Measures the speed-up of each single setting, prints it, and adds it to `found`."""
    base = changes.base_for(resident[0].shape[2])
    attention = "SDPA" if base.sdpa else "plain attention"
    found["base"] = f"{attention}, default AdamW"
    print(f"speed-up of single settings over a bare step with {found['base']}:")
    steps = changes.changes_for(base, resident[0].device, compiled=args.compile)
    for name, step in steps.items():
        found[name] = attempt(
            name,
            lambda step=step: round(
                changes.compare(
                    step,
                    base,
                    NETWORKS[args.networks],
                    resident,
                    args.precision,
                    turn_s=0.5 * args.turn,
                    rounds=max(2, args.rounds // 2),
                ),
                3,
            ),
        )
        if not isinstance(found[name], dict):
            print(f"  {name:<24}{found[name]:.2f}x", flush=True)
        emit_all()


if __name__ == "__main__":
    main()
