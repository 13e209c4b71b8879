"""Reads folders of images as batches, each image once, in a fixed order.

Images reach the metrics as 8-bit RGB of one size. With a size, an image is first cropped around its
centre to that shape and then resized with Lanczos, which is the order of U-ViT's protocol; the
order changes FID, so the protocol record names it.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from latent_t2i.evaluation.metrics.metric import Batch, Item

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CROP = "centre crop, then Lanczos"
Size = tuple[int, int]
"""Width and height in pixels."""


def list_images(folder: Path, flag: str) -> list[Path]:
    """Returns the images of a folder and of its sub-folders, sorted by path.

    Raises ValueError unless there are at least two: no metric is defined for fewer.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag}: {folder} is not a folder; expected a folder of images")
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    paths = sorted(p for p in found if not _is_hidden(p.relative_to(folder)))
    if len(paths) < 2:
        raise ValueError(
            f"{flag}: {folder} has {len(paths)} images; expected two or more files "
            f"({', '.join(SUFFIXES)})"
        )
    return paths


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def image_size(path: Path) -> Size:
    """Returns width and height of an image as it is shown."""
    with _naming(path), Image.open(path) as image:
        return ImageOps.exif_transpose(image).size if image.getexif() else image.size


def describe_files(paths: Sequence[Path]) -> str:
    """Returns the formats of image files, of JPEG with the strength of its compression.

    That is the mean step of the luminance quantisation, from the weakest to the strongest of all
    files: 1 is the weakest compression, and Pillow's quality 75 has 29. Raises ValueError, with
    the file's name, for a file that is not an image.
    """
    steps: dict[str, set[float]] = {}
    for path in paths:
        with _naming(path), Image.open(path) as image:
            tables = getattr(image, "quantization", None)
            found = steps.setdefault(str(image.format), set())
            if tables:
                found.add(round(float(np.mean(tables[min(tables)])), 1))
    return ", ".join(
        f"{name} (quantisation {min(found):g} to {max(found):g})" if found else name
        for name, found in sorted(steps.items())
    )


def read_image(
    path: Path, size: Size | None = None, content: bytes | None = None
) -> NDArray[np.uint8]:
    """Returns an image as RGB; cropped and resized to `size` if it is given.  # (H, W, 3)

    With `content`, the file's bytes, `path` only names them.
    Raises ValueError, with the file's name, for a file that is not a readable image.
    """
    with _naming(path), Image.open(path if content is None else io.BytesIO(content)) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB")
    if size is not None:
        picture = fit(picture, size)
    return np.asarray(picture)


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Returns the image cropped around its centre to the shape of `size`, then resized to it."""
    if image.size == size:
        return image
    scale = min(image.width / size[0], image.height / size[1])
    width, height = round(size[0] * scale), round(size[1] * scale)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize(size, Image.Resampling.LANCZOS)


class _naming:
    """Turns what Pillow raises for a broken file into a ValueError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._warnings.__enter__()
        warnings.simplefilter("ignore")  # metadata; a decompression bomb is an error below

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError):
            raise ValueError(f"{self._path}: not a readable image: {error}") from error


def batches_of(
    paths: Sequence[Path],
    items: Sequence[Item],
    *,
    batch_size: int,
    size: Size | None = None,
    first: Path | None = None,
    flag: str = "--images",
) -> Iterator[Batch]:
    """Yields the images in batches; without `size`, all must have the size of the image `first`.

    That is the first of all processes' images, by default of `paths`. Raises ValueError, with both
    sizes, for an image of another size.
    """
    if not paths:
        return
    first = first or paths[0]
    width, height = size or image_size(first)
    for start in range(0, len(paths), batch_size):
        part = slice(start, start + batch_size)
        images = []
        for path in paths[part]:
            pixels = read_image(path, size)
            if pixels.shape[:2] != (height, width):
                raise ValueError(
                    f"{flag}: {path} has {pixels.shape[1]} x {pixels.shape[0]} pixels and {first} "
                    f"{width} x {height}; expected one size: give --size to crop and resize all "
                    "images to it"
                )
            images.append(pixels)
        yield Batch(images=np.stack(images), items=items[part])
