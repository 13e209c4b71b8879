"""Image files: PNGs that carry their settings, and labelled grids."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

SETTINGS_CHUNK = "latent-t2i"
CELL_PX = 192
MIN_COLUMN_PX = 128  # room for the label of a narrow image
PADDING_PX = 12
FONT_PX = 14
LINE_PX = FONT_PX + 4
INK, PAPER = (30, 30, 34), (250, 250, 248)


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG with its prompt, and all settings as JSON, in text chunks."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("Description", str(settings.get("prompt", "")))
    chunks.add_itxt(SETTINGS_CHUNK, json.dumps(dict(settings), ensure_ascii=False))
    image.save(path, pnginfo=chunks)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings that `save_png` stored; raises ValueError if there are none."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(SETTINGS_CHUNK)
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
    """
    assert len(images) == len(labels) > 0, (len(images), len(labels))
    columns = num_columns or min(len(images), 4)
    font = ImageFont.load_default(FONT_PX)
    factor = max(1, CELL_PX // max(max(image.size) for image in images))
    cells = [_enlarged(image, factor) for image in images]
    cell_width = max(MIN_COLUMN_PX, *(cell.width for cell in cells))
    cell_height = max(cell.height for cell in cells)
    texts = [_wrap(label, font, cell_width) for label in labels]
    label_px = max(len(text) for text in texts) * LINE_PX + 6
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
            pen.text((x, y + cell.height + 4 + line_number * LINE_PX), line, fill=INK, font=font)
    return grid


def _enlarged(image: Image.Image, factor: int) -> Image.Image:
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _wrap(
    label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int
) -> list[str]:
    """Breaks a label into at most four lines of about the given width."""
    mean_px = font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27
    lines = textwrap.wrap(label, max(8, int(width_px / mean_px)), max_lines=4, placeholder=" …")
    return lines or [""]
