"""Memory, compute and shard size of each preset: a table, then a line of JSON.

    python bench/sizes.py [--quick] [--config demo coco64 ...] [flags]

Shapes come from the preset's encoders if these are local folders. For other encoders, give
`--latent-channels`, `--vae-downscale` and `--text-width`.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json

from latent_t2i.model.paths import format_bytes
from latent_t2i.sizes import Encoders, size_preset

PRESETS = ("demo", "scenes", "scenes-gpu", "coco64", "coco256", "coco512", "finetune-sd")


def main() -> None:
    """Estimates each preset and prints the table."""
    parser = argparse.ArgumentParser(description="Estimates what presets need.")
    parser.add_argument("--quick", action="store_true", help="the demo only")
    parser.add_argument("--config", nargs="+", default=PRESETS, help="presets, by path or name")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--captions", type=int, default=5, help="captions per image")
    for flag, default in vars(Encoders()).items():
        help_text = "for encoders that are not local folders"
        parser.add_argument(
            f"--{flag.replace('_', '-')}", type=int, default=default, help=help_text
        )
    args = parser.parse_args()
    encoders = Encoders(**{flag: getattr(args, flag) for flag in vars(Encoders())})
    rows = [
        size_preset(name, device=args.device, num_captions=args.captions, encoders=encoders)
        for name in (PRESETS[:1] if args.quick else args.config)
    ]
    print(
        "| preset | latents | parameters | GFLOP per image, forward | in shards "
        "| memory, at batch |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| `{row['preset']}` | {' x '.join(map(str, row['latents']))} "
            f"| {row['num_parameters'] / 1e6:.1f} M | {row['forward_gflop']:.4g} "
            f"| {row['record_bytes'] / 1e3:.0f} kB "
            f"| {format_bytes(row['memory_bytes'])}, {row['batch_size']} |"
        )
    print(json.dumps({"presets": rows}))


if __name__ == "__main__":
    main()
