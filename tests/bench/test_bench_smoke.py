"""What the smoke test of bench/gpu.sh accepts as trained and as a picture."""

import json
from typing import Any

import pytest
from PIL import Image

from bench.steps.smoke import check_losses, is_flat


def lines(*rows: tuple[float | None, int]) -> str:
    """The metrics of steps with these losses and numbers of skipped steps so far."""
    found: list[dict[str, Any]] = [{"loss": loss, "skipped": num} for loss, num in rows]
    return "\n".join(map(json.dumps, [*found, {"validation": {}}]))


def test_steps_that_fp16_skips_have_no_loss() -> None:
    check_losses(lines((None, 1), (0.5, 1), (0.4, 1)), 3)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(0.5, 0), (0.4, 0)], "2 lines of 3 steps"),
        ([(None, 0), (0.5, 0), (0.4, 0)], "2 losses, 0 skipped"),
        ([(None, 1), (None, 2), (None, 3)], r"losses \[\]"),
        ([(0.5, 0), (float("inf"), 0), (0.4, 0)], r"losses \[0.5, inf"),
    ],
)
def test_missing_losses_are_a_failure(rows: list[Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"found {found}"):
        check_losses(lines(*rows), 3)


def test_a_picture_of_one_color_is_flat() -> None:
    black = Image.new("RGB", (4, 4))
    assert is_flat(black)
    black.putpixel((1, 2), (0, 3, 0))
    assert not is_flat(black)
