"""Checks in under a minute that everything runs on this device: a line per check, then JSON.

    python -m bench.steps.smoke [--rehearse]

Stage one, training in each precision, as a CUDA graph and compiled, resuming, and sampling, with
tiny networks and drawn scenes. A failed check does not stop the others. `--rehearse` tries the
script on a CPU: fp16 and the graph then run as float32 and eagerly, and nothing is built.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from bench.steps.attempts import attempt, emit, failures
from bench.steps.networks import EMBEDDED, TINY

MODULES = (
    "configs.cli",
    "model.bundle",
    "model.posthoc",
    "pipeline.stage",
    "sample.sampler",
    "scenes.dataset",
    "shards.verify",
    "train.loop",
)
NUM_IMAGES = 64
NUM_STEPS = 3
NUM_GRAPH_STEPS = 8
"""The first four run eagerly, the fifth records the graph, and all from there on replay it."""


def main() -> None:
    """Runs all checks; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description="Checks that everything runs on this device.")
    parser.add_argument("--rehearse", action="store_true", help="try the script without a GPU")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.rehearse:
        parser.error("found no GPU that torch can use; --rehearse tries the script without one")
    figures: dict[str, Any] = {
        "benchmark": "smoke",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "checks": {},
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        for name, check in list_checks(Path(folder), rehearse=args.rehearse).items():
            figures["checks"][name] = attempt(name, partial(timed, name, check))
            figures["total_s"] = round(time.perf_counter() - began, 1)
            emit(figures)
    sys.exit(bool(failures(figures)))


def list_checks(folder: Path, *, rehearse: bool) -> dict[str, Callable[[], object]]:
    """Returns the checks by name, in order: later ones use the files of earlier ones."""
    run = partial(train, folder)
    return {
        "imports": import_all,
        "stage one": lambda: encode(folder),
        "train fp16": lambda: run("fp16", mixed_precision="fp16"),
        "train bf16": lambda: run("bf16", mixed_precision="bf16"),
        "resume": lambda: run("bf16", mixed_precision="bf16", num_steps=NUM_STEPS + 1),
        "train graph": lambda: run(
            "graph", mixed_precision="fp16", cuda_graph=True, num_steps=NUM_GRAPH_STEPS
        ),
        "train compiled": lambda: run_compiled(run, rehearse=rehearse),
        "sample": lambda: sample(folder),
    }


def timed(name: str, check: Callable[[], object]) -> dict[str, float]:
    """Runs a check and returns its seconds."""
    began = time.perf_counter()
    check()
    seconds = round(time.perf_counter() - began, 1)
    print(f"{name}: {seconds} s", flush=True)
    return {"seconds": seconds}


def import_all() -> None:
    """Imports the parts, so that a missing package shows here."""
    for name in MODULES:
        import_module(f"latent_t2i.{name}")


def encode(folder: Path) -> None:
    """Writes shards of drawn scenes, with the VAE's flipped views."""
    from latent_t2i.pipeline.config import PipelineConfig, SourceConfig, ViewsConfig
    from latent_t2i.pipeline.encode import find_device, supports_tf32
    from latent_t2i.pipeline.stage import build

    config = PipelineConfig(
        name="smoke",
        vae=str(EMBEDDED / "vae"),
        text_encoder=str(EMBEDDED / "clip"),
        source=SourceConfig(kind="scenes", num_images=NUM_IMAGES),
        max_tokens=24,
        views=ViewsConfig(flip=True),
        max_quarantined=0,
        out=str(folder / "shards"),
    )
    manifest = build(config)[""]
    expect(manifest.num_records == NUM_IMAGES, f"{manifest.num_records} records")
    products = manifest.preprocessing.get("float32_products", "float32")
    tf32 = supports_tf32(find_device("auto", 0))
    expect(products == ("tf32" if tf32 else "float32"), f"float32 products in {products}")


def train(folder: Path, name: str, *, num_steps: int = NUM_STEPS, **settings: Any) -> None:
    """Trains a tiny denoiser, saves a checkpoint and a bundle, and checks the losses."""
    from latent_t2i.train.config import TrainConfig
    from latent_t2i.train.loop import train as run

    config = TrainConfig(
        name=name,
        shards=(str(folder / "shards"),),
        out=str(folder / name),
        batch_size=8,
        num_steps=num_steps,
        log_every_steps=1,
        channels_last=True,
        trackers=("none",),
        model=TINY,
        **settings,
    )
    AcceleratorState._reset_state(True)  # it keeps the precision of the process's first run
    bundle = run(config)
    expect((bundle / "model_index.json").exists(), "no bundle")
    expect(any((folder / name / "checkpoints").iterdir()), "no checkpoint")
    check_losses((folder / name / "metrics.jsonl").read_text(), num_steps)


def check_losses(metrics: str, num_steps: int) -> None:
    """Raises ValueError unless every step has a finite loss, or was skipped while others were not.

    The first steps of fp16 may be skipped, until its loss scale is low enough.
    """
    lines = [line for line in map(json.loads, metrics.splitlines()) if "loss" in line]
    expect(len(lines) == num_steps, f"{len(lines)} lines of {num_steps} steps")
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    num_skipped = lines[-1]["skipped"]
    expect(len(losses) + num_skipped == num_steps, f"{len(losses)} losses, {num_skipped} skipped")
    expect(bool(losses) and all(map(math.isfinite, losses)), f"losses {losses}")


def run_compiled(run: Callable[..., None], *, rehearse: bool) -> None:
    """Trains a step with compiled blocks."""
    from latent_t2i.train import prepare

    before = prepare.BACKEND
    if rehearse:  # building kernels takes minutes on two cores
        prepare.BACKEND = "eager"
    try:
        run("compiled", mixed_precision="bf16", compile=True, num_steps=1)
    finally:
        prepare.BACKEND = before


def sample(folder: Path) -> None:
    """Draws a picture with the bundle of the bf16 run."""
    from latent_t2i.sample import sampler

    pipeline = sampler.load(folder / "bf16/bundle")
    (picture,) = sampler.draw(pipeline, ["a red circle"], [0], num_steps=2, guidance_scale=4.0)
    expect(picture.size == (64, 64), f"a picture of {picture.size}")
    expect(not is_flat(picture), "a picture of one color")


def is_flat(picture: Image.Image) -> bool:
    """Returns whether all pixels of a picture have the same color, as after an overflow."""
    return all(low == high for low, high in picture.getextrema())  # per channel


def expect(condition: bool, found: str) -> None:
    """Raises ValueError with what was found, unless the condition holds."""
    if not condition:
        raise ValueError(f"found {found}")


if __name__ == "__main__":
    main()
