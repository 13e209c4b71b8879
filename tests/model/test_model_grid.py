"""Tables of images: headers, sizes, and how labels are wrapped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from latent_t2i.model import grid
from latent_t2i.model.grid import PADDING_PX, comparison_grid, label_seeds, labelled_grid

FONT = ImageFont.load_default(grid.FONT_PX)
LONG = "a small red star above a large blue circle on a grey background " * 4


def table(sizes: list[list[tuple[int, int]]]) -> list[list[Image.Image]]:
    return [
        [Image.new("RGB", size, (200, 20 * y, 20 * x)) for x, size in enumerate(row)]
        for y, row in enumerate(sizes)
    ]


@pytest.mark.parametrize(("side", "shown"), [(8, 192), (64, 192), (200, 200)])
def test_a_table_shows_every_image_whole_beside_its_headers(side: int, shown: int) -> None:
    rows, columns = ["one", LONG], ["guidance scale 1", "guidance scale 2.5", LONG]
    images = table([[(side, side)] * 3] * 2)
    pixels = np.asarray(comparison_grid(images, rows=rows, columns=columns))
    for y in range(2):
        for x in range(3):
            ys, xs = np.nonzero((pixels == (200, 20 * y, 20 * x)).all(-1))
            assert len(ys) == shown**2
            assert (np.ptp(ys) + 1, np.ptp(xs) + 1) == (shown, shown)
            dark_left = pixels[ys.min() : ys.max() + 1, : xs.min() - x * (shown + PADDING_PX)] < 128
            dark_top = pixels[: ys.min() - y * (shown + PADDING_PX), xs.min() : xs.max() + 1] < 128
            assert dark_left.all(-1).any()
            assert dark_top.all(-1).any()
    # No letter touches an image or the border.
    assert (pixels[:, : PADDING_PX - 2] > 128).all()
    assert (pixels[-PADDING_PX:] > 128).all()


@pytest.mark.parametrize("labelled", [True, False])
def test_the_type_grows_with_the_images(labelled: bool) -> None:
    def height_of_letters(side: int) -> int:
        images = table([[(side, side)]])
        pixels = np.asarray(
            labelled_grid(images[0], ["H"])
            if labelled
            else comparison_grid(images, rows=[" "], columns=["H"])
        )
        above = (pixels < 128).all(-1)
        return int(np.ptp(np.nonzero(above)[0])) + 1

    assert height_of_letters(960) > 3 * height_of_letters(192)
    assert height_of_letters(192) >= 9


def test_labels_of_a_repeated_prompt_start_with_the_seed() -> None:
    assert label_seeds(["a", "b", "a"], [1, 2, 3]) == ["seed 1: a", "b", "seed 3: a"]


def test_a_table_accepts_images_of_several_sizes() -> None:
    made = comparison_grid(table([[(64, 64), (256, 128)]]), rows=["a"], columns=["b", "c"])
    pixels = np.asarray(made)
    assert ((pixels == (200, 0, 0)).all(-1)).sum() == 192 * 192
    assert ((pixels == (200, 0, 20)).all(-1)).sum() == 256 * 128


@settings(max_examples=40)
@given(text=st.text(max_size=80), width_px=st.integers(1, 300), max_lines=st.integers(1, 5))
def test_wrapped_lines_fit_and_lose_nothing_silently(
    text: str, width_px: int, max_lines: int
) -> None:
    lines = grid._wrap(text, FONT, width_px, max_lines=max_lines)
    assert 1 <= len(lines) <= max_lines
    whole = list(grid._lines(text, FONT, width_px))
    assert all(len(line) == 1 or FONT.getlength(line) <= width_px for line in whole)
    # Spaces may become line breaks and words may be broken; no character is lost.
    assert "".join(whole).replace(" ", "") == "".join(text.split())
    assert lines == (whole or [""]) or lines[-1].endswith("…")
    limit = max(width_px, FONT.getlength("…"))
    assert all(len(line) == 1 or FONT.getlength(line) <= limit for line in lines)
