"""Trains the embedded encoders and writes them as stock folders with a card.

    python -m scenes.train_encoders --out scenes/encoders          # both, about an hour, 2 cores
    python -m scenes.train_encoders --out scenes/encoders --only measure    # the card alone

The figures on the card come from the float16 weights as shipped, read back from the folder, on
scenes that were never trained on; `gate` refuses encoders that a denoiser could not learn from.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from latent_t2i.scenes import clip_training, oracle, vae_training
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import WORLDS, Scene, stream

LIMITS = {
    "vae/psnr_db": 34.0,
    "vae/oracle_all": 0.96,
    "vae/shape_accepted": 0.98,
    **{f"clip/{kind}": 0.90 for kind in clip_training.DISTORTIONS},
}
"""What the encoders must reach before any denoiser is trained on them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write the card; exit code 1 when a figure is below its limit."""
    parser = argparse.ArgumentParser(prog="python -m scenes.train_encoders", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "encoders")
    parser.add_argument("--only", choices=("vae", "text", "image", "measure"), default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, nargs=4, default=(1600, 4200, 1200, 2600),
                        metavar=("SMALL", "GROWN", "DECODER", "JOINT"))  # fmt: skip
    parser.add_argument("--made", help="how, for the card, when it was not one command")
    parser.add_argument("--num-measured", type=int, default=1000, help="scenes for the figures")
    parser.add_argument("--text-steps", type=int, default=900)
    parser.add_argument("--image-steps", type=int, default=2700)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    _train(args)
    figures = measure(args.out, args.num_measured)
    minutes = (time.perf_counter() - started) / 60
    for name, value in figures.items():
        print(f"{name:28} {value:.4f}")
    write_card(args.out, figures, args, sys.argv[1:] if argv is None else argv)
    print(f"{minutes:.0f} minutes, written to {args.out}")
    gate(figures)


def _train(args: argparse.Namespace) -> None:
    if args.only in (None, "vae"):
        vae = vae_training.train(tuple(args.vae_steps), args.seed)
        vae_training.save(vae, args.out / "vae")
    folder = args.out / "clip"
    if args.only in (None, "text"):
        tokenizer = clip_training.make_tokenizer()
        torch.manual_seed(args.seed)
        model = clip_training.build(tokenizer)
        clip_training.train_text(model, tokenizer, args.text_steps, args.seed)
        clip_training.save(model, tokenizer, folder)
    if args.only in (None, "image"):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        clip_training.train_image(model, tokenizer, args.image_steps, args.seed)
        clip_training.save(model, tokenizer, folder)


@torch.inference_mode()
def measure(folder: Path, num: int = 1000, seed: int = 12345) -> dict[str, float]:
    """Every figure of the card, on `num` held-out scenes of the full world."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scenes = [scene for scene, _ in islice(stream(WORLDS["full"], "val", seed), num)]
    drawn = render(scenes)
    decoded, latents = round_trip(vae, drawn)
    error = np.square(drawn.astype(np.float64) - decoded).mean()
    clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    choices = clip_training.forced_choice(clip, tokenizer, seed, num)
    return {
        "vae/psnr_db": float(10 * np.log10(255**2 / error)),
        **{f"vae/{name}": value for name, value in read_back(scenes, decoded).items()},
        "vae/latent_std_smallest": float(latents.std((0, 2, 3)).min()),
        "vae/latent_std_largest": float(latents.std((0, 2, 3)).max()),
        **{f"clip/{kind}": value for kind, value in choices.items()},
    }


@torch.inference_mode()
def round_trip(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Pictures through the VAE and back, and the latents' means.  # uint8 (B, H, W, 3)"""
    images, latents = [], []
    for i in range(0, len(pictures), 64):
        chunk = vae_training.to_tensor(pictures[i : i + 64])
        latents.append(vae.encode(chunk).latent_dist.mean)
        images.append(vae.decode(latents[-1]).sample)
    pixels = ((torch.cat(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy(), torch.cat(latents)


def read_back(scenes: Sequence[Scene], pictures: np.ndarray) -> dict[str, float]:
    """How the oracle reads pictures of these scenes: all of a scene right, and of the objects found
    the share that is accepted as some shape."""
    readings = oracle.read(pictures)
    everything = [
        oracle.check(scene, reading, {"size", "background"} | ({"place"} if scene.place else set()))
        for scene, reading in zip(scenes, readings, strict=True)
    ]
    found = [thing for reading in readings for thing in reading.things]
    return {
        "oracle_all": float(np.mean([verdict["all"] for verdict in everything])),
        "shape_accepted": float(np.mean([thing.shape is not None for thing in found])),
    }


def gate(figures: dict[str, float]) -> None:
    """Stop with exit code 1 when a figure is below its limit, naming both."""
    low = [f"{name} is {figures[name]:.4f}, expected at least {limit}"
           for name, limit in LIMITS.items() if figures[name] < limit]  # fmt: skip
    if low:
        raise SystemExit("encoders below the gate: " + "; ".join(low))


CARD = """# Embedded encoders

A VAE (`vae/`, `AutoencoderKL`) and a CLIP (`clip/`, `CLIPModel` with `CLIPTokenizer`) for the
procedural scenes of this package, in stock formats: `from_pretrained` loads them. They know
coloured shapes on plain backgrounds and nothing else; use real ones for photographs.

* Made by {made}, on two CPU cores with bfloat16 autocast, of
  nothing but the drawn scenes of the training split: held-out compositions are not in it. License:
  as the project.
* Weights: float16 safetensors, {size_mb:.1f} MB together.
* VAE: 8x downscaling, 8 channels, scaling factor 1 (latents standardised per channel).
* CLIP: text tower causal, 77 positions, width 128, 4 layers, locked after learning descriptions;
  image tower 8-pixel patches of 64-pixel pictures, width 128, 4 layers.

Measured on {num:,} scenes of the full world that were never trained on, from the shipped weights:

| figure | value | at least |
|---|---|---|
{rows}

`oracle_all`: every attribute of the scene is read back right after a round trip through the VAE.
`clip/...`: forced choice by CLIP score between a picture's caption and the same caption with one
thing changed; chance is 0.5.
"""


def write_card(
    folder: Path, figures: dict[str, float], args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """README.md beside the weights."""
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    rows = [f"| {name} | {value:.4f} | {LIMITS.get(name, '')} |" for name, value in figures.items()]
    card = CARD.format(
        made=args.made or f"`{shlex.join(['python', '-m', 'scenes.train_encoders', *argv])}`",
        num=args.num_measured,
        size_mb=size / 1e6,
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card, "utf-8")


if __name__ == "__main__":
    main()
