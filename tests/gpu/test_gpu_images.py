"""Stage one and sampling on a GPU. Without a GPU every test is skipped."""

from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from tests import on_device

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Other drivers and versions warn about other things.
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_killed_set_ends_with_the_same_bytes(
    tmp_path: Path, forks: ForkServerContext, compiled: bool
) -> None:
    on_device.check_that_a_killed_set_ends_with_the_same_bytes(
        tmp_path, forks, "cuda", compiled=compiled
    )


def test_pictures_in_float16_are_not_flat(tmp_path: Path) -> None:
    on_device.check_that_float16_pictures_are_not_flat(tmp_path, "cuda")
