"""`sample.grid`: tables of prompts x guidance scales, seeds, steps or bundles."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_t2i.configs.cli import parse
from latent_t2i.model.bundle import INFO_FILE
from latent_t2i.model.grid import read_settings
from latent_t2i.sample import comparison, sampler
from latent_t2i.sample.settings import GridConfig
from tests.bundles import COMPUTED

pytestmark = pytest.mark.usefixtures("load_once")

PROMPTS = ("a red circle", "a blue star")


def draw(bundle: Path, out: Path, *flags: str) -> Path:
    argv = ["--bundle", str(bundle), "--prompt", *PROMPTS, "--out", str(out)]
    argv += [] if "--num-steps" in flags else ["--num-steps", "2"]
    return comparison.draw_grid(parse(GridConfig, None, [*argv, *flags], prog="grid"))


@pytest.mark.parametrize(
    ("flags", "headers", "settings"),
    [
        (
            ["--guidance-scale", "1", "2.5"],
            ["guidance 1", "guidance 2.5"],
            [{"guidance_scale": 1}, {"guidance_scale": 2.5}],
        ),
        (["--seed", "3", "4"], ["seed 3", "seed 4"], [{}, {}]),
    ],
)
def test_each_cell_is_the_image_of_its_row_and_column(
    bundle: Path,
    tmp_path: Path,
    flags: list[str],
    headers: list[str],
    settings: list[dict[str, Any]],
) -> None:
    path = draw(bundle, tmp_path / "new" / "grid.png", *flags)
    config = parse(GridConfig, None, ["--prompt", "x", *flags], prog="grid")
    assert comparison.headers(config, [bundle]) == headers
    with Image.open(path) as opened:
        table = np.asarray(opened, int)
    pipeline = sampler.load(bundle, device="auto", dtype="auto")
    seeds = config.seed if len(config.seed) > 1 else config.seed * len(settings)
    top, left = (
        table.shape[axis] - count * (192 + 12)
        for axis, count in ((0, len(PROMPTS)), (1, len(settings)))
    )
    for x, (own, seed) in enumerate(zip(settings, seeds, strict=True)):
        drawn = {"num_steps": 2} | own
        images = sampler.draw(pipeline, PROMPTS, [seed] * 2, **drawn)
        for y, image in enumerate(images):
            cell = table[top + y * 204 :, left + x * 204 :][:192, :192]
            expected = np.asarray(image.resize((192, 192), Image.Resampling.NEAREST), int)
            assert np.abs(cell - expected).max() <= 1
    assert read_settings(path)["prompts"] == list(PROMPTS)


def test_an_image_of_another_program_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    with pytest.raises(ValueError, match=r"--out: .*grid\.png .* is not a picture"):
        draw(bundle, tmp_path / "grid.png")


@pytest.mark.parametrize(
    ("flags", "headers"),
    [
        (["--num-steps", "1", "3"], ["steps 1", "steps 3"]),
        ([], ["guidance 4"]),
        (["--seed", "1234567", "1234568"], ["seed 1234567", "seed 1234568"]),
    ],
)
def test_a_column_is_named_by_what_varies(flags: list[str], headers: list[str]) -> None:
    config = parse(GridConfig, None, ["--prompt", "x", *flags], prog="grid")
    assert comparison.headers(config, [Path("x")]) == headers


def test_bundles_are_columns_named_by_run_and_step(bundle: Path, tmp_path: Path) -> None:
    later = shutil.copytree(bundle, tmp_path / "later")
    info = json.loads((later / INFO_FILE).read_text())
    info |= {"step": 12800, "ema": {"sigma_rel": 0.05}}
    (later / INFO_FILE).write_text(json.dumps(info))
    plain = shutil.copytree(bundle, tmp_path / "plain")
    (plain / INFO_FILE).unlink()
    folders = [bundle, later, plain]
    found = [comparison.describe(folder) for folder in folders]
    assert found == ["tiny, step 3", "tiny, step 12,800, EMA 0.05", "plain"]
    argv = ["--bundle", *map(str, folders[:2]), "--prompt", "x", "--num-steps", "1"]
    argv += ["--out", str(tmp_path / "grid.png")]
    path = comparison.draw_grid(parse(GridConfig, None, argv, prog="grid"))
    entries = read_settings(path)["bundles"]
    assert len({entry["bundle_sha256"] for entry in entries}) == 2
    assert all(entry.keys() >= COMPUTED for entry in entries)
    with Image.open(path) as table:
        assert table.width > 2 * 192


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"prompts": ()}, "--prompt: expected at least 1"),
        ({"seed": (1, 2), "num_steps": (1, 2)}, "--seed and --num-steps: found several values"),
        ({"guidance_scale": ()}, "--guidance-scale: expected at least one"),
        ({"guidance_scale": (0.5,)}, "--guidance-scale: expected 1 or more"),
        ({"num_steps": (0,)}, "--num-steps: expected"),
        ({"guidance_scale": (1.0,), "negative_prompt": "x"}, "--negative-prompt: has no effect"),
        ({"out": "grid.jpg"}, "--out: expected a file name that ends in .png"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        GridConfig(**{"prompts": ("x",)} | values)
