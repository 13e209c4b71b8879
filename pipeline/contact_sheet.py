"""Decodes some records of a set of shards and draws them on one sheet, with their captions.

    python -m pipeline.contact_sheet shards/data/demo/train --num 16 --out sheet.png

A bucketed set gets one sheet per bucket (sheet-64x64.png and so on).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latent_t2i.model.encoders import fingerprint, latent_channels, load_vae
from latent_t2i.model.grid import labelled_grid
from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.parsing import printable
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.summary import spread

DECODE_BATCH = 8


def draw_sheet(shards: ShardSet, num: int, *, view: int = 0, vae: str | None, out: Path) -> str:
    """Decodes a view of up to `num` records, spread over the set, and saves the sheet.

    `vae` is a folder or Hub repository; None stands for the manifest's VAE. Returns one line that
    describes the sheet. Raises ValueError if there is no such view, and if the VAE is unavailable
    or has another number of latent channels.
    """
    manifest = shards.manifest
    if not 0 <= view < manifest.num_views:
        raise ValueError(f"--view: expected 0 to {manifest.num_views - 1}, found {view}")
    name = vae or manifest.vae.name
    network = load_vae(name, None if vae else manifest.vae.revision)
    if latent_channels(network) != manifest.latent_channels:
        raise ValueError(
            f"--vae: {name!r} has {latent_channels(network)} latent channels, but the latents in "
            f"{shards.folder} have {manifest.latent_channels}; pass the VAE that encoded them"
        )
    records = spread(len(shards), num)
    first = np.zeros(len(records))
    view_u = np.full(len(records), (view + 0.5) / manifest.num_views)
    # Stored latents are unscaled, so the posterior's mean is decoded as it is.
    latents = shards.gather(records, first, view_u).latent[:, : manifest.latent_channels]
    with torch.inference_mode():
        decoded = torch.cat([network.decode(x.float()).sample for x in latents.split(DECODE_BATCH)])
    pixels = decoded.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)  # (N, 3, H, W)
    images = [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]
    captions = [shards.meta(record)["captions"][0] for record in records.tolist()]
    labelled_grid(images, captions).save(out)
    is_same = fingerprint(network) == manifest.vae.sha256
    warning = "" if is_same else "; its weights differ from those of the VAE that encoded them"
    return f"{out}: {len(records)} images, decoded with {name}{warning}"


def draw_sheets(
    folder: Path, num: int, *, view: int = 0, vae: str | None, out: Path
) -> Iterator[str]:
    """Draws the sheet of a set, or one sheet per bucket, and yields a line for each."""
    if not holds_buckets(folder):
        yield draw_sheet(open_shards(folder, verify="none"), num, view=view, vae=vae, out=out)
        return
    shards = open_buckets(folder, verify="none")
    for bucket, part in zip(shards.buckets.buckets, shards.sets, strict=True):
        yield draw_sheet(
            part, num, view=view, vae=vae, out=out.with_stem(f"{out.stem}-{bucket.name}")
        )


def main() -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.contact_sheet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder with manifest.json or buckets.json")
    parser.add_argument("--num", type=int, default=16, help="records to draw (default: 16)")
    parser.add_argument(
        "--out", type=Path, default=Path("sheet.png"), help="output file (default: sheet.png)"
    )
    parser.add_argument(
        "--view", type=int, default=0, help="view to draw: crop 0, crop 0 flipped, ... (default: 0)"
    )
    parser.add_argument("--vae", help="VAE folder or repository (default: the manifest's)")
    arguments = parser.parse_args()
    if arguments.num < 1:
        parser.error(f"--num: expected at least 1, found {arguments.num}")
    try:
        for line in draw_sheets(
            arguments.folder,
            arguments.num,
            view=arguments.view,
            vae=arguments.vae,
            out=arguments.out,
        ):
            print(printable(line))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
