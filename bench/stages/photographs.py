"""Synthetic images in COCO's layout, with the dimensions, file sizes and detail of COCO."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES_PX = ((640, 480), (640, 427), (480, 640), (640, 360))
NUM_CAPTIONS = 5
TEXT = """a man woman dog cat bus train kite plate bench sheep standing riding holding near on
under red blue large small street field table beach with and of the two several"""


def write_photographs(folder: Path, num_images: int) -> tuple[Path, Path]:
    """Writes JPEG files with five captions each; returns their folder and the captions file."""
    images, captions = folder / "images", folder / "captions.json"
    images.mkdir(parents=True)
    index, annotations = [], []
    for number in range(1, num_images + 1):
        rng = np.random.default_rng(number)
        name = f"{number:012d}.jpg"
        picture(rng, SIZES_PX[number % len(SIZES_PX)]).save(images / name, quality=90)
        index.append({"id": number, "file_name": name})
        for _ in range(NUM_CAPTIONS):
            text = " ".join(rng.choice(TEXT.split(), 10))
            annotations.append({"id": len(annotations), "image_id": number, "caption": text})
    captions.write_text(json.dumps({"images": index, "annotations": annotations}))
    return images, captions


def picture(rng: np.random.Generator, size_px: tuple[int, int]) -> Image.Image:
    """Returns colours that vary on all scales, with noise: about 130 kB as a JPEG."""
    width, height = size_px
    layers = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64):
        coarse = rng.integers(0, 256, (cells * height // width, cells, 3), np.uint8)
        fine = Image.fromarray(coarse).resize(size_px, Image.Resampling.BICUBIC)
        layers += np.asarray(fine, np.float32) / 3
    layers += rng.standard_normal((height, width, 1), np.float32) * 6
    return Image.fromarray(layers.clip(0, 255).astype(np.uint8))
