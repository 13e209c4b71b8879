"""Images from files to squares of pixels: upright, RGB, resized with antialiasing, cropped.

The shorter side is resized and the centre kept, with Pillow's bicubic filter, which widens with
the scale and so does not alias. Transparent pictures are laid on white. A file that cannot be read
gives a reason instead of pixels, one without a machine's path, as it ends up in the manifest.
"""

import struct
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.record import Record

RESIZE = "shorter side, Pillow bicubic"
CROP = "centre"

# Pillow only warns of a picture between its limit and twice its limit; here the limit is the limit.
warnings.simplefilter("error", Image.DecompressionBombWarning)

DECODE_ERRORS = (OSError, SyntaxError, ValueError, IndexError, OverflowError, struct.error)
"""What Pillow's plugins raise on broken files."""


class UnreadableImageError(Exception):
    """An image that has to be left out; the text is the reason."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image ready for the VAE, and how large it was (width, height), the right way up."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    source_size_px: tuple[int, int]


def load(path: Path, size_px: int) -> Picture:
    """Reads an image and makes it a square of `size_px`. Raises UnreadableImageError."""
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            square = ImageOps.fit(to_rgb(upright), (size_px, size_px), Image.Resampling.BICUBIC)
            return Picture(np.asarray(square), upright.size)
    except FileNotFoundError:
        raise UnreadableImageError("missing file") from None
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise UnreadableImageError(f"more than {limit} pixels") from None
    except DECODE_ERRORS as error:
        reason = str(error).replace(str(path), path.name)
        raise UnreadableImageError(f"undecodable: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image as RGB: transparency on white, 16 bits scaled down to 8."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image) // 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def load_all(
    records: Sequence[Record], size_px: int, pool: Executor, *, num_ahead: int
) -> Iterator[tuple[Record, Picture | UnreadableImageError]]:
    """Yields each record with its picture, or with why there is none, in order.

    At most `num_ahead` images are decoded ahead of use, which bounds the memory.
    """
    running: deque[tuple[Record, Future[Picture]]] = deque()
    for record in records:
        running.append((record, pool.submit(load, record.path, size_px)))
        if len(running) > num_ahead:
            yield _result(*running.popleft())
    while running:
        yield _result(*running.popleft())


def missing_files(records: Iterable[Record]) -> list[Record]:
    """Returns the records whose files are not there; lists each folder once, opening none."""
    folders: dict[Path, list[Record]] = defaultdict(list)
    for record in records:
        folders[record.path.parent].append(record)
    missing = []
    for folder, members in folders.items():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        missing += [record for record in members if record.path.name not in names]
    return missing


def _result(
    record: Record, future: Future[Picture]
) -> tuple[Record, Picture | UnreadableImageError]:
    try:
        return record, future.result()
    except UnreadableImageError as error:
        return record, error
