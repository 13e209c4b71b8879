"""What presets take, without their shards: a table, then a line of JSON.

    python bench/sizes.py [--quick] [--config demo coco64 ...] [flags]

Latents and text are those of the preset's encoders where these are folders here; for others say
`--latent-channels`, `--vae-downscale` and `--text-width` (the defaults: Stable Diffusion 1's VAE
and CLIP ViT-L/14). Memory is one process's with the whole batch, by train/estimate.py.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
from typing import Any

from latent_t2i.configs import cli
from latent_t2i.model.paths import find_path, size
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.shards.schema import make_layout
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.estimate import count_memory, measure

PRESETS = ("demo", "scenes", "scenes-gpu", "coco64", "coco256", "coco512")
JSON_BYTES = 1024
"""Of a record with five captions, roughly."""


def main() -> None:
    """Counts each preset and prints it."""
    parser = argparse.ArgumentParser(description="Tells what presets take.")
    parser.add_argument("--quick", action="store_true", help="the demo only")
    parser.add_argument("--config", nargs="+", default=PRESETS, help="presets, by path or name")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--captions", type=int, default=5, help="of an image")
    for flag, default in (("latent-channels", 4), ("vae-downscale", 8), ("text-width", 768)):
        parser.add_argument(f"--{flag}", type=int, default=default, help="of encoders elsewhere")
    args = parser.parse_args()
    rows = [describe(name, args) for name in (PRESETS[:1] if args.quick else args.config)]
    print("| preset | latents | weights | GFLOP an image, forward | in shards | memory, at batch |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| `{row['preset']}` | {' x '.join(map(str, row['latents']))} "
            f"| {row['num_parameters'] / 1e6:.1f} M | {row['forward_gflop']:.4g} "
            f"| {row['record_bytes'] / 1e3:.0f} kB "
            f"| {size(row['memory_bytes'])}, {row['batch_size']} |"
        )
    print(json.dumps({"presets": rows}))


def describe(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a preset."""
    train = cli.parse(TrainConfig, "train", ["--config", name])
    stage_one = cli.parse(PipelineConfig, "pipeline", ["--config", name])
    vae, text = (_read_config(encoder) for encoder in (stage_one.vae, stage_one.text_encoder))
    channels = vae.get("latent_channels", args.latent_channels)
    downscale = 2 ** (len(vae["block_out_channels"]) - 1) if vae else args.vae_downscale
    text_width = text.get("text_config", text).get("hidden_size", args.text_width)
    side = stage_one.image_size_px // downscale
    batch_size = train.micro_batch_size or train.batch_size
    passes = measure(
        train.model,
        latent_shape=(channels, side, side),
        text_shape=(stage_one.max_tokens, text_width),
        micro_batch_size=batch_size,
        precision=train.mixed_precision,
        device_type=args.device,
        checkpointing=train.gradient_checkpointing,
    )
    num_averages = len(train.ema.sigma_rels) + (train.ema.decay is not None)
    layout = make_layout(
        latent=(stage_one.views, 2 * channels, side, side),
        text=(args.captions, stage_one.max_tokens, text_width),
        json_bytes=JSON_BYTES,
        text_dtype=stage_one.text_dtype,
    )
    return {
        "preset": name,
        "latents": [channels, side, side],
        "num_parameters": passes.num_parameters,
        "forward_gflop": passes.forward_flop / 1e9,
        "record_bytes": layout.record_bytes,
        "memory_bytes": sum(count_memory(passes, num_averages, keeps_gradients=False)),
        "batch_size": batch_size,
    }


def _read_config(name: str) -> dict[str, Any]:
    """Returns an encoder's config.json; nothing for one that is not a folder here."""
    folder = find_path(name)
    path = None if folder is None else folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path and path.is_file() else {}
    return config


if __name__ == "__main__":
    main()
