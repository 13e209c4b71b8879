"""Measures stage one's resident memory over a source of many tiny images: a table, then JSON.

    python -m bench.stages.memory [--images 100000]

The images are PNG files of 8 x 8 px in a folder with metadata.jsonl. Memory is read after every 5 %
of the shards.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.loaders.serve import memory
from latent_t2i.pipeline import writing
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.encode import find_device
from latent_t2i.pipeline.processes import ProcessInfo
from latent_t2i.pipeline.stage import load_encoders, make_shards
from latent_t2i.shards.writer import ShardWriter

ENCODERS = Path(__file__).resolve().parents[2] / "scenes/encoders"
MB = 1e6


def main() -> None:
    """Measures the memory and prints the table."""
    parser = argparse.ArgumentParser(description="Memory of stage one over a large source.")
    parser.add_argument("--images", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        write_images(folder / "images", args.images)
        rows = run(folder, args.images)
    print(f"{'images':>9}{'seconds':>10}{'own memory':>14}{'files mapped':>15}")
    for row in rows:
        own, mapped = row["anonymous_bytes"] / MB, row["file_bytes"] / MB
        print(f"{row['images']:>9,}{row['seconds']:>10.1f}{own:>11,.0f} MB{mapped:>12,.0f} MB")
    print(json.dumps({"benchmark": "stage_memory", "rows": rows}))


def write_images(folder: Path, num_images: int) -> None:
    """Writes `num_images` files with eight distinct contents and two distinct captions each."""
    folder.mkdir()
    contents = []
    for number in range(8):
        file = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(file, "PNG")
        contents.append(file.getvalue())
    with (folder / "metadata.jsonl").open("w") as metadata:
        for number in range(num_images):
            name = f"{number:07d}.png"
            (folder / name).write_bytes(contents[number % 8])
            texts = [f"picture number {number}", f"another text of {number}"]
            metadata.write(json.dumps({"file_name": name, "text": texts}) + "\n")


def run(folder: Path, num_images: int) -> list[dict[str, Any]]:
    """Returns memory by number of images; the first row is before the source is listed."""
    config = PipelineConfig(
        name="memory",
        vae=str(ENCODERS / "vae"),
        text_encoder=str(ENCODERS / "clip"),
        source=SourceConfig(kind="folder", images=str(folder / "images")),
        image_size_px=8,
        max_tokens=12,
        records_per_shard=max(num_images // 100, 1),
        out=str(folder / "shards"),
        batch_size=64,
    )
    encoders = load_encoders(config, find_device("cpu", 0))
    began = time.perf_counter()
    rows: list[dict[str, Any]] = [{"images": 0, "seconds": 0.0, **memory()}]

    class Watched(ShardWriter):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            done = (self._index + 1) * config.records_per_shard
            if (self._index + 1) % 5 == 0:
                seconds = time.perf_counter() - began
                rows.append({"images": done, "seconds": round(seconds, 1), **memory()})

    setattr(writing, "ShardWriter", Watched)  # noqa: B010 - observe each shard
    with contextlib.redirect_stdout(io.StringIO()):
        make_shards(config, encoders, ProcessInfo())
    return rows


if __name__ == "__main__":
    main()
