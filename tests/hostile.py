"""Image files as users have them: broken, huge, unusual but valid.

All are small and made on the fly. Each comes with the reason for its quarantine, or None if it must
be read. Stems are unique and, except for one, have ASCII letters, digits and dashes only.
"""

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
UNICODE_NAME = "кот 猫 é🐈.png"
ORIENTATION = 0x0112


def write_hostile(folder: Path, *, min_size_px: int = 1) -> dict[str, str | None]:
    """Writes the files and returns each one's reason or None, by its name.

    A reason that ends with a colon and a space continues with Pillow's message.
    """
    expected: dict[str, str | None] = {}
    for name, (content, reason) in (BROKEN | GOOD).items():
        (folder / name).write_bytes(content())
        expected[name] = reason
    for name, size in SMALL.items():
        (folder / name).write_bytes(saved(photograph(size), "PNG"))
        too_small = f"{size[0]}x{size[1]} px, smaller than --min-image-size-px {min_size_px}"
        expected[name] = too_small if min(size) < min_size_px else None
    return expected


def write_special(folder: Path) -> dict[str, str]:
    """Writes files that must not be opened or read, and returns each one's reason by its name."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "sparse.jpg").touch()
    os.truncate(folder / "sparse.jpg", 30 * 10**9)  # needs no disk space
    os.mknod(folder / "socket.jpg", stat.S_IFSOCK | 0o600)
    return {
        "pipe.jpg": "a pipe or a device, expected a regular file",
        "device.jpg": "a pipe or a device, expected a regular file",
        "sparse.jpg": "30000000000 bytes, expected at most 1073741824",
        "socket.jpg": "cannot be read: No such device or address",
    }


def photograph(size_px: tuple[int, int] = (96, 64)) -> Image.Image:
    """Returns smooth colours with some noise, always the same."""
    width, height = size_px
    across = np.linspace(0, 200, width)[None, :, None]
    down = np.linspace(0, 55, height)[:, None, None] * np.array([1, 0.5, 0.2])
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray((across + down + noise).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Returns an image as the content of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(size_px: tuple[int, int], *chunks: bytes) -> bytes:
    """Returns a grey PNG whose header has this size, whatever its chunks hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size_px, 8, 0, 0, 0, 0))
    return PNG_START + header + b"".join(chunks) + chunk(b"IEND", b"")


def exif(content: bytes) -> bytes:
    """Returns a JPEG with `content` as its EXIF."""
    return saved(photograph(), "JPEG", exif=b"Exif\0\0" + content)


def oriented(orientation: int) -> bytes:
    """Returns a JPEG with an EXIF orientation, valid or not."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return saved(photograph(), "JPEG", exif=tags)


def film(kind: str) -> bytes:
    """Returns an animation of three frames."""
    frames = [photograph().rotate(90 * turn) for turn in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def deep(kind: str, order: str = "<u2") -> bytes:
    """Returns a grey image of 16 bits."""
    grey = np.asarray(photograph().convert("L"))
    values = (grey.astype(np.uint16) * 257).astype(order)
    return saved(Image.fromarray(values), kind)


def malformed_mpo() -> bytes:
    """Returns a JPEG with a broken index of further pictures."""
    content = saved(photograph(), "JPEG")
    index = b"MPF\0II*\0\x08\0\0\0" + b"\0\0" + bytes(4)
    return content[:2] + b"\xff\xe2" + struct.pack(">H", len(index) + 2) + index + content[2:]


def zeros(num_bytes: int) -> bytes:
    """Returns compressed zeros, about a thousandth of `num_bytes`."""
    return zlib.compress(bytes(num_bytes), 9)


def half(content: bytes) -> bytes:
    """Returns the first half of a file, as an interrupted download leaves it."""
    return content[: len(content) // 2]


Files = dict[str, tuple[Callable[[], bytes], str | None]]

BROKEN: Files = {
    "empty.jpg": (lambda: b"", "empty file"),
    "letter.jpg": (lambda: b"Dear Sir or Madam", "not an image"),
    "page.jpg": (lambda: b"<!doctype html><title>404</title>", "not an image"),
    "drawing.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "script.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "half.jpg": (lambda: half(saved(photograph(), "JPEG")), "truncated file"),
    "half-progressive.jpg": (
        lambda: half(saved(photograph(), "JPEG", progressive=True)),
        "truncated file",
    ),
    "half-lossless.png": (lambda: half(saved(photograph(), "PNG")), "truncated file"),
    "half-palette.gif": (lambda: half(saved(photograph(), "GIF")), "truncated file"),
    "half-modern.webp": (lambda: half(saved(photograph(), "WEBP")), "undecodable: "),
    "start.jpg": (lambda: saved(photograph(), "JPEG")[:20], "undecodable: broken header"),
    "bomb.png": (
        lambda: png((30000, 30000), chunk(b"IDAT", zeros(9))),
        "more than 89478485 pixels",
    ),
    "small-bomb.png": (
        lambda: png((10000, 10000), chunk(b"IDAT", zeros(9))),
        "more than 89478485 pixels",
    ),
    "text-bomb.png": (
        lambda: png((8, 8), chunk(b"zTXt", b"a\0\0" + zeros(9_000_000)), chunk(b"IDAT", zeros(72))),
        "undecodable: ",
    ),
    "profile-bomb.png": (
        lambda: png((8, 8), chunk(b"iCCP", b"a\0\0" + zeros(9_000_000)), chunk(b"IDAT", zeros(72))),
        "undecodable: ",
    ),
    "broken-chunk.png": (
        lambda: saved(photograph(), "PNG").replace(b"IDAT", b"IDBT", 1),
        "undecodable: broken header",
    ),
    "float.tif": (
        lambda: saved(Image.new("F", (64, 64), 0.5), "TIFF"),
        "undecodable: pixels of mode F have no known range",
    ),
}
"""Files that must be quarantined, with the reason."""

GOOD: Files = {
    "plain.jpg": (lambda: saved(photograph(), "JPEG"), None),
    "progressive.jpg": (lambda: saved(photograph(), "JPEG", progressive=True), None),
    "grey.jpg": (lambda: saved(photograph().convert("L"), "JPEG"), None),
    "cmyk.jpg": (lambda: saved(photograph().convert("CMYK"), "JPEG"), None),
    "deep.png": (lambda: deep("PNG"), None),
    "deep-big-endian.tif": (lambda: deep("TIFF", ">u2"), None),
    "film.gif": (lambda: film("GIF"), None),
    "film-png.png": (lambda: film("PNG"), None),
    "film-webp.webp": (lambda: film("WEBP"), None),
    "pair.mpo": (lambda: film("MPO"), None),
    "malformed-mpo.jpg": (malformed_mpo, None),
    "orientation-0.jpg": (lambda: oriented(0), None),
    "orientation-9.jpg": (lambda: oriented(9), None),
    "garbage-exif.jpg": (lambda: exif(b"garbage" * 9), None),
    "short-exif.jpg": (lambda: exif(b"II*\0\x08\0\0\0\x09\0\x12\x01"), None),
    "beyond-exif.jpg": (
        lambda: exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x010E, 2, 999, 9999)),
        None,
    ),
    "palette.png": (lambda: saved(photograph().convert("P"), "PNG"), None),
    "clear-palette.png": (
        lambda: saved(photograph().convert("P"), "PNG", transparency=bytes(range(256))),
        None,
    ),
    "grey-alpha.png": (lambda: saved(photograph().convert("LA"), "PNG"), None),
    "bilevel.png": (lambda: saved(photograph().convert("1"), "PNG"), None),
    "png-named.jpg": (lambda: saved(photograph(), "PNG"), None),
    UNICODE_NAME: (lambda: saved(photograph(), "PNG"), None),
}
"""Files that must be read."""

SMALL = {"one-pixel.png": (1, 1), "very-wide.png": (2000, 3), "very-tall.png": (2, 1500)}
"""Sizes of files that must be quarantined only below --min-image-size-px."""
