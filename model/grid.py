"""Image files: PNGs that carry their settings, grids with a label per image, and tables of images.

Labels use Pillow's embedded font, so a grid looks the same on every machine. That font has Latin,
Greek and Cyrillic letters only; other scripts appear as boxes.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

SETTINGS_CHUNK = "latent-t2i"
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError),
    *(ZeroDivisionError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises for files that are damaged or no images."""
CELL_PX = 192
MIN_COLUMN_PX = 128  # room for the label of a narrow image
PADDING_PX = 12
FONT_PX = 14  # at least
INK, PAPER = (30, 30, 34), (250, 250, 248)


class DamagedImageError(ValueError):
    """A file that Pillow does not read, such as a cut one."""


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG with its prompt, and all settings as JSON, in text chunks."""
    image.save(path, pnginfo=settings_chunks(settings))


def settings_chunks(settings: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """Returns the text chunks of `save_png`."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("Description", str(settings.get("prompt", "")))
    chunks.add_itxt(SETTINGS_CHUNK, json.dumps(dict(settings), ensure_ascii=False))
    return chunks


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings that `save_png` stored.

    Raises ValueError if there are none, and its subclass DamagedImageError if the file is not a
    whole image.
    """
    try:
        with Image.open(path) as image:
            image.load()  # a cut file still has its text chunks
            text = getattr(image, "text", {}).get(SETTINGS_CHUNK)
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise DamagedImageError(f"{path}: not a whole image: {error}") from error
    try:
        settings = json.loads(text or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: no {SETTINGS_CHUNK} text chunk with settings")
    return settings


def labelled_grid(
    images: Sequence[Image.Image], labels: Sequence[str], *, num_columns: int | None = None
) -> Image.Image:
    """Returns the images in rows, each with its label wrapped below it.

    Images may have different sizes. Small ones are enlarged without smoothing by one whole factor.
    The type grows with the images, as in `comparison_grid`.
    """
    assert len(images) == len(labels) > 0, (len(images), len(labels))
    columns = num_columns or min(len(images), 4)
    factor = _factor(images)
    cells = [_enlarged(image, factor) for image in images]
    cell_width = max(MIN_COLUMN_PX, *(cell.width for cell in cells))
    cell_height = max(cell.height for cell in cells)
    font, line_px = _load_font(max(cell.width for cell in cells), cell_height)
    texts = [_wrap(label, font, cell_width) for label in labels]
    label_px = max(len(text) for text in texts) * line_px + 6
    rows = -(-len(images) // columns)
    step_x, step_y = cell_width + PADDING_PX, cell_height + label_px + PADDING_PX
    size = (columns * step_x + PADDING_PX, rows * step_y + PADDING_PX)
    grid = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(grid)
    for number, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        x = PADDING_PX + number % columns * step_x
        y = PADDING_PX + number // columns * step_y
        grid.paste(cell, (x, y))
        for line_number, line in enumerate(lines):
            pen.text((x, y + cell.height + 4 + line_number * line_px), line, fill=INK, font=font)
    return grid


def label_seeds(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Returns the prompts as labels, with the seed in front of those that occur several times.

    A long prompt is cut at its end, so the seed would be lost there.
    """
    return [
        f"seed {seed}: {prompt}" if prompts.count(prompt) > 1 else prompt
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def comparison_grid(
    images: Sequence[Sequence[Image.Image]], *, rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Returns a table of images with a header per row, on the left, and per column, on top.

    `images` is a list of rows. There is no column of headers if all are empty. The type grows with
    the images, so it stays legible if a large table is scaled down to a page. Images are enlarged
    as in `labelled_grid`.
    """
    assert len(images) == len(rows) > 0, (len(images), len(rows))
    assert all(len(row) == len(columns) > 0 for row in images), columns
    cells = [[_enlarged(image, _factor([image])) for image in row] for row in images]
    width = max(cell.width for row in cells for cell in row)
    height = max(cell.height for row in cells for cell in row)
    font, line_px = _load_font(width, height)
    header_px = max(MIN_COLUMN_PX, width * 3 // 4) if any(rows) else 0
    tops = [_wrap(label, font, width, max_lines=3) for label in columns]
    top_px = max(len(lines) for lines in tops) * line_px
    step_x, step_y = width + PADDING_PX, height + PADDING_PX
    left = header_px + (2 if header_px else 1) * PADDING_PX
    top = top_px + 2 * PADDING_PX
    grid = Image.new("RGB", (left + len(columns) * step_x, top + len(rows) * step_y), PAPER)
    pen = ImageDraw.Draw(grid)
    for number, lines in enumerate(tops):
        for index, line in enumerate(lines):
            x = left + number * step_x + width // 2
            pen.text((x, PADDING_PX + index * line_px), line, fill=INK, font=font, anchor="ma")
    for number, label in enumerate(rows):
        y = top + number * step_y
        lines = _wrap(label, font, header_px, max_lines=max(1, height // line_px))
        for index, line in enumerate(lines):
            pen.text((PADDING_PX, y + index * line_px), line, fill=INK, font=font)
        for column, cell in enumerate(cells[number]):
            grid.paste(cell, (left + column * step_x, y))
    return grid


def _load_font(width: int, height: int) -> tuple["Font", int]:
    """Returns the font for images of at most this size, and the height of its lines."""
    font_px = max(FONT_PX, min(width, height) // 12)
    return ImageFont.load_default(font_px), font_px * 5 // 4


def _factor(images: Sequence[Image.Image]) -> int:
    """Returns the whole factor by which small images are enlarged."""
    return max(1, CELL_PX // max(max(image.size) for image in images))


def _enlarged(image: Image.Image, factor: int) -> Image.Image:
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrap(label: str, font: Font, width_px: int, *, max_lines: int = 4) -> list[str]:
    """Breaks a label into lines of at most the given width; an ellipsis marks what is left out."""
    lines = list(_lines(label, font, width_px))
    if len(lines) <= max_lines:
        return lines or [""]
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last} …") > width_px:
        last = last[:-1].rstrip()
    return [*lines[: max_lines - 1], f"{last} …".lstrip()]


def _lines(label: str, font: Font, width_px: int) -> Iterator[str]:
    line = ""
    for word in label.split():
        if line and font.getlength(f"{line} {word}") <= width_px:
            line += f" {word}"
            continue
        if line:
            yield line
        line = word
        while len(line) > 1 and font.getlength(line) > width_px:
            end = next(n for n in range(len(line) - 1, 0, -1) if _fits(line[:n], font, width_px))
            yield line[:end]
            line = line[end:]
    if line:
        yield line


def _fits(text: str, font: Font, width_px: int) -> bool:
    """Returns whether a part of a word fits; one character always does."""
    return len(text) == 1 or font.getlength(text) <= width_px
