"""Trains the embedded encoders, measures the saved float16 weights and writes a model card.

python -m scenes.train_encoders --out scenes/encoders      # both; about an hour on 2 cores
python -m scenes.train_encoders --out scenes/encoders --only measure
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
    **{f"clip/{kind}": 0.90 for kind in clip_training.NEGATIVE_KINDS},
}
"""The minimum of each metric for encoders that a denoiser can be trained on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and writes the card; exits with code 1 if a metric is below its limit."""
    parser = argparse.ArgumentParser(prog="python -m scenes.train_encoders", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "encoders")
    parser.add_argument("--only", choices=("vae", "text", "image", "measure"), default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, nargs=4, default=(1600, 4200, 1200, 2600),
                        metavar=("SMALL", "GROWN", "DECODER", "JOINT"))  # fmt: skip
    parser.add_argument("--made-by", help="how, for the card, if not by this command alone")
    parser.add_argument("--num-measured", type=int, default=1000, help="scenes to measure on")
    parser.add_argument("--text-steps", type=int, default=900)
    parser.add_argument("--image-steps", type=int, default=2700)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    _train(args)
    metrics = measure(args.out, args.num_measured)
    minutes = (time.perf_counter() - started) / 60
    for name, value in metrics.items():
        print(f"{name:28} {value:.4f}")
    write_card(args.out, metrics, args, sys.argv[1:] if argv is None else argv)
    print(f"{minutes:.0f} minutes, written to {args.out}")
    check_limits(metrics)


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
    """Measures the saved encoders on `num` validation scenes of the full world."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scenes = [scene for scene, _ in islice(stream(WORLDS["full"], "val", seed), num)]
    images = render(scenes)
    decoded, latents = round_trip(vae, images)
    error = np.square(images.astype(np.float64) - decoded).mean()
    clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    accuracy = clip_training.forced_choice(clip, tokenizer, seed, num)
    return {
        "vae/psnr_db": float(10 * np.log10(255**2 / error)),
        **{f"vae/{name}": value for name, value in oracle_accuracy(scenes, decoded).items()},
        "vae/latent_std_smallest": float(latents.std((0, 2, 3)).min()),
        "vae/latent_std_largest": float(latents.std((0, 2, 3)).max()),
        **{f"clip/{kind}": value for kind, value in accuracy.items()},
    }


@torch.inference_mode()
def round_trip(vae: AutoencoderKL, images: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Returns decode(encode(images)) and the posterior means.  # uint8 (B, H, W, 3)"""
    decoded, latents = [], []
    for i in range(0, len(images), 64):
        chunk = vae_training.to_tensor(images[i : i + 64])
        latents.append(vae.encode(chunk).latent_dist.mean)
        decoded.append(vae.decode(latents[-1]).sample)
    pixels = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy(), torch.cat(latents)


def oracle_accuracy(scenes: Sequence[Scene], images: np.ndarray) -> dict[str, float]:
    """Returns the shares of images with every attribute right and of objects with a shape."""
    detections = oracle.detect(images)
    correct = []
    for scene, detected in zip(scenes, detections, strict=True):
        mentions = {"size", "background"} | ({"place"} if scene.place else set())
        correct.append(oracle.check(scene, detected, mentions)["all"])
    accepted = [item.shape is not None for detected in detections for item in detected.objects]
    return {"oracle_all": float(np.mean(correct)), "shape_accepted": float(np.mean(accepted))}


def check_limits(metrics: dict[str, float]) -> None:
    """Exits with code 1 if a metric is below its limit."""
    low = [f"{name} is {metrics[name]:.4f}, expected at least {limit}"
           for name, limit in LIMITS.items() if metrics[name] < limit]  # fmt: skip
    if low:
        raise SystemExit("the encoders are below their limits: " + "; ".join(low))


CARD = """# Embedded encoders

A VAE (`vae/`, `AutoencoderKL`) and a CLIP (`clip/`, `CLIPModel` with `CLIPTokenizer`) for the
procedural scenes of this package, as stock folders for `from_pretrained`. They are trained on
coloured shapes on plain backgrounds only. Use other encoders for photographs.

* Training: {made}, on two CPU cores with bfloat16 autocast.
* Data: rendered scenes of the training split, without the held-out compositions.
* License: that of the project.
* Weights: float16 safetensors, {size_mb:.1f} MB in total.
* VAE: 8x downscaling, 8 channels, scaling factor 1 (latents standardised per channel).
* CLIP text tower: causal, 77 positions, width 128, 4 layers, locked after attribute training.
* CLIP image tower: 8-pixel patches of 64-pixel images, width 128, 4 layers.

Measured with the float16 weights on {num:,} validation scenes of the full world:

| metric | value | minimum |
|---|---|---|
{rows}

`oracle_all` is the share of images with every attribute detected correctly after the VAE's round
trip. `shape_accepted` is the share of detected objects with a recognised shape. `clip/...` is the
accuracy at ranking the true caption above a hard negative; chance is 0.5.
"""


def write_card(
    folder: Path, metrics: dict[str, float], args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Writes the model card, README.md, beside the weights."""
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    rows = [f"| {name} | {value:.4f} | {LIMITS.get(name, '')} |" for name, value in metrics.items()]
    card = CARD.format(
        made=args.made_by or f"`{shlex.join(['python', '-m', 'scenes.train_encoders', *argv])}`",
        num=args.num_measured,
        size_mb=size / 1e6,
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(card, "utf-8")


if __name__ == "__main__":
    main()
