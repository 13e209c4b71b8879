"""Images from bytes to rectangles of pixels: upright, RGB, resized with antialiasing, cropped.

The largest part of the wanted shape is cut out, its centre or one drawn for the image's key, and
resized by Pillow's bicubic filter, which widens with the scale and so does not alias. What has
several frames gives its first; transparency is laid on white; colour profiles are not applied, as
in most data sets' tools. A large JPEG is decoded at a half, a quarter or an eighth of its size, at
least 2.5 times the wanted one: never under 42 dB PSNR of the full decode (COCO at 64 px: 48.6 dB or
more, 1.5 times as fast; bench/decode.py). An image that cannot be used gives a reason in place of
pixels.
"""

import hashlib
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

RESIZE = "shorter side, Pillow bicubic"
LEAST_SCALE = 2.5
"""A JPEG decoded at a fraction of its size still has so many times the wanted size."""
REDUCTIONS = (8, 4, 2)
"""What a JPEG's sides can be divided by while it is decoded."""
MAX_PIXELS = 89_478_485
"""An image of more is taken for a decompression bomb; this many take 358 MB while decoded."""

DECODE_ERRORS = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # of AVIF; RecursionError is one too
    SyntaxError,
    TypeError,  # of a read past the end
    ValueError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)
"""What Pillow's plugins raise on broken files, by their sources and by trying."""

# With all plugins there, what follows is the same in every thread. Restricted, since some formats
# are hardly told from text (TGA) and some start other programs (EPS).
Image.init()
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""The formats that are read; a JPEG may be an MPO, several JPEGs in one file."""

# Without a handler of its own, what Pillow logs of a broken TIFF would be printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_METADATA = "(Possibly corrupt|Corrupt) EXIF|Metadata Warning|Tag (offset|data)|Truncated File Read"
_FILTERS: tuple[Any, ...] = tuple(
    (action, re.compile(text, re.IGNORECASE), kind, re.compile(module))
    for action, text, kind, module in (
        ("error", "Image size", Image.DecompressionBombWarning, "PIL"),
        ("ignore", _METADATA, UserWarning, r"PIL\.(TiffImagePlugin|Image)$"),
        ("ignore", "Image appears to be a malformed MPO", UserWarning, r"PIL\.JpegImagePlugin$"),
        ("ignore", "Invalid APNG", UserWarning, r"PIL\.PngImagePlugin$"),
    )
)
"""What happens to Pillow's warnings, as the standard library's `warnings` has it."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright; from 5 on the sides change places."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


class UnreadableImageError(Exception):
    """An image that has to be left out; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to each image."""

    size_px: tuple[int, int]
    """The wanted (width, height)."""
    crop: Literal["centre", "random"] = "centre"
    """Which part is kept; random is drawn from the seed and the image's key."""
    seed: int = 0
    """Of the random crops."""
    min_size_px: int = 1
    """An image whose shorter side is less is left out."""
    fast_jpeg: bool = True
    """Whether a JPEG is decoded at a fraction of its size where that is enough."""

    def __post_init__(self) -> None:
        if min(self.size_px) < 1:
            raise ValueError(f"size_px: expected sides of at least 1, found {self.size_px}")
        if self.crop not in ("centre", "random"):
            raise ValueError(f"crop: expected centre or random, found {self.crop!r}")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image ready for the VAE, and what of which source it shows."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    source_size_px: tuple[int, int]
    """(width, height) of the whole image, the right way up."""
    crop_px: Box
    """What is shown of it, in its pixels, rounded to hundredths."""


def load(content: bytes, how: Preprocessing, *, key: str) -> Picture:
    """Decodes an image file's bytes and resizes and crops the image to `how.size_px`.

    The result depends on the arguments alone. Any number of threads may call it: decoding and
    resizing let go of the interpreter's lock. Raises UnreadableImageError.
    """
    with _reasons(), _open(io.BytesIO(content)) as image:
        size_px = image.size
        divisor = _draft(image, how) if how.fast_jpeg else 1
        image.load()
        turn = _orientation(image)
        rgb = to_rgb(image)
    size_px = size_px[::-1] if turn >= 5 else size_px
    if min(size_px) < how.min_size_px:
        size = "x".join(map(str, size_px))
        raise UnreadableImageError(f"{size} px, smaller than --min-image-size-px {how.min_size_px}")
    upright = rgb.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else rgb
    box = crop_box(size_px, how.size_px, 0.5 if how.crop == "centre" else draw(how.seed, key))
    left, top, right, bottom = (side / divisor for side in box)
    pixels = upright.resize(how.size_px, Image.Resampling.BICUBIC, (left, top, right, bottom))
    left, top, right, bottom = (round(side, 2) for side in box)
    return Picture(np.array(pixels), size_px, (left, top, right, bottom))


def read_size(source: bytes | BinaryIO) -> tuple[int, int]:
    """Returns the (width, height) of an image file, the right way up, decoding nothing.

    Takes its bytes, or a file open for reading in binary. Raises UnreadableImageError.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _reasons(), _open(file) as image:
        width, height = image.size
        if image.format == "TIFF":  # whether `size` is upright depends on Pillow's version
            tags: Any = image
            width, height = tags.tag_v2[256], tags.tag_v2[257]
        turn = _orientation(image)
        return (height, width) if turn >= 5 else (width, height)


def describe(how: Preprocessing) -> dict[str, Any]:
    """Returns what of `how` decides the content, for the provenance."""
    drawn = {"seed": how.seed} if how.crop == "random" else {}
    jpeg = f"scaled DCT, at least {LEAST_SCALE} times the size" if how.fast_jpeg else "whole"
    return {
        "size_px": list(how.size_px),
        "resize": RESIZE,
        "crop": how.crop,
        **drawn,
        "min_size_px": how.min_size_px,
        "jpeg": jpeg,
        "max_pixels": MAX_PIXELS,
    }


def crop_box(size_px: tuple[int, int], wanted_px: tuple[int, int], share: float) -> Box:
    """Returns the largest box of the wanted shape inside an image of `size_px`.

    `share` of what has to go goes on the left, or above. No side of the box is zero, however long
    and narrow the image.
    """
    (width, height), (wanted_width, wanted_height) = size_px, wanted_px
    if width * wanted_height >= height * wanted_width:
        kept = height * wanted_width / wanted_height
        left = (width - kept) * share
        return left, 0, min(left + kept, width), height
    kept = width * wanted_height / wanted_width
    top = (height - kept) * share
    return 0, top, width, min(top + kept, height)


def draw(seed: int, key: str) -> float:
    """Returns a number from 0 to 1, excluded, that depends on nothing but the arguments.

    A hash, since numpy's generators may draw otherwise in another version.
    """
    digest = hashlib.sha256(f"crop {seed} {key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # as many bits as a float has


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image as RGB: transparency on white, 16 bits scaled down to 8.

    CMYK is converted without a profile. Raises UnreadableImageError for floats and for integers of
    32 bits, which say nothing of what is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _scaled_to_8_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"undecodable: pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        rgba = straight.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Returns a grey image of up to 16 bits as one of 8; Pillow itself would clip at 255."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's, which may have 12 bits
    (bits,) = tags.get(ExifTags.Base.BitsPerSample, (16,)) if image.mode == "I;16" else (16,)
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray((values * 255 // (2**bits - 1)).astype(np.uint8))


def _draft(image: Image.Image, how: Preprocessing) -> int:
    """Has a JPEG decoded at a fraction of its size; returns what its sides are divided by."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    width, height = image.size
    wanted = how.size_px[::-1] if _orientation(image) >= 5 else how.size_px
    scale = min(width / wanted[0], height / wanted[1])
    for divisor in REDUCTIONS:
        if scale >= divisor * LEAST_SCALE:
            drafted = image.draft(None, (width // divisor, height // divisor))
            return divisor if drafted else 1
    return 1


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 if there is none that can be read or makes sense."""
    try:
        found = _exif(image).get(ExifTags.Base.Orientation)
    except DECODE_ERRORS:
        return 1
    return found if found in _UPRIGHT else 1


def _exif(image: Image.Image) -> Image.Exif:
    """Returns the EXIF; a PNG, which may have it after the pixels, is decoded only if it has."""
    file: Any = image
    if image.format == "PNG" and getattr(file, "tile", None):  # not decoded yet
        place = file.fp.tell()
        file.fp.seek(0)
        content = file.fp.read()
        file.fp.seek(place)
        if not any(name in content for name in (b"eXIf", b"Raw profile type", b"adobe.xmp")):
            return Image.Exif()
    return image.getexif()


def _open(file: BinaryIO) -> Image.Image:
    """Opens an image file and reads its header."""
    start = file.read(16)
    if not start:
        raise UnreadableImageError("empty file")
    _quieten()
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        accepts = (Image.OPEN[name][1] for name in FORMATS)
        known = any(accept is not None and accept(start) is True for accept in accepts)
        reason = "undecodable: broken header" if known else "not an image"
        raise UnreadableImageError(reason) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"more than {MAX_PIXELS} pixels")
    return image


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns what decoders raise into UnreadableImageError, with a reason."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(f"more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise UnreadableImageError("undecodable: not enough memory") from None
    except DECODE_ERRORS as error:
        said = str(error) or type(error).__name__
        truncated = "truncated" in said.lower()
        reason = "truncated file" if truncated else f"undecodable: {said}"
        raise UnreadableImageError(reason) from None


def _quieten() -> None:
    """Sees to it that Pillow's warnings about metadata neither end nor litter the run.

    Anew before each image, as whoever saves and restores the filters (each test of pytest) drops
    ours; they hold for those few messages of Pillow's modules and for nothing else.
    """
    front = tuple(entry[:4] for entry in warnings.filters[: len(_FILTERS)])
    if front != _FILTERS:
        for action, text, kind, module in reversed(_FILTERS):
            warnings.filterwarnings(action, text.pattern, kind, module.pattern)
