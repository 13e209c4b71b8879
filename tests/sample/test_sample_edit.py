"""Image to image, inpainting and variations: the stock pipelines' images, masks and errors."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from latent_t2i.configs.cli import ConfigError, parse
from latent_t2i.model.bundle import sampling_scheduler
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.grid import read_settings, save_png
from latent_t2i.sample import editing
from latent_t2i.sample.schedulers import choose_scheduler
from latent_t2i.sample.schedulers import make_scheduler as make_sampler
from latent_t2i.sample.settings import EditConfig
from latent_t2i.sample.stock import load_stock
from tests.bundles import COMPUTED, make_bundle
from tests.sample import test_sample_closed_form as closed_form

pytestmark = pytest.mark.usefixtures("load_once")

PROMPT = "a red circle"
KINDS = {"v": ObjectiveConfig(prediction="v"), "flow": ObjectiveConfig(prediction="flow")}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: make_bundle(folder / name, kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def pipeline(bundles: dict[str, Path]) -> Any:
    return load_stock(config(bundles["v"]))


def config(bundle: Path, **values: Any) -> EditConfig:
    chosen: dict[str, Any] = {"init_image": "x.png", "num_steps": 3} | values
    return EditConfig(bundle=str(bundle), **chosen)


def noise_image(size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """White on the right half, from an odd column on."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2 + 3, 0, *size))
    return mask


def pixels(images: Sequence[Image.Image]) -> NDArray[np.int16]:
    return np.stack([np.asarray(image, np.int16) for image in images])


@pytest.mark.parametrize(("name", "strength"), [("v", 0.75), ("flow", 0.3)])
def test_image_to_image_is_that_of_the_stock_pipeline(
    bundles: dict[str, Path], name: str, strength: float
) -> None:
    stock = StableDiffusionImg2ImgPipeline.from_pretrained(bundles[name], local_files_only=True)
    stock.scheduler = choose_scheduler(stock.scheduler, "dpmpp")
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        prompt=PROMPT,
        image=noise_image(),
        strength=strength,
        guidance_scale=4,
        num_inference_steps=4 if strength == 0.75 else 10,
        generator=torch.Generator().manual_seed(7),
    ).images
    own = config(bundles[name], strength=strength)
    made = editing.edit_image(load_stock(own), noise_image(), None, [(PROMPT, 7)], config=own)
    assert np.abs(pixels(list(made)) - pixels(expected)).max() <= 1


def test_inpainting_is_that_of_the_stock_pipeline_in_white_and_keeps_black(
    bundles: dict[str, Path], pipeline: Any
) -> None:
    stock = StableDiffusionInpaintPipeline.from_pretrained(bundles["v"], local_files_only=True)
    stock.scheduler = choose_scheduler(stock.scheduler, "dpmpp")
    stock.set_progress_bar_config(disable=True)
    (expected,) = stock(
        prompt=PROMPT,
        image=noise_image(),
        mask_image=editing.cover(half_mask(), 8),
        width=64,
        height=64,
        strength=0.6,
        guidance_scale=4,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(7),
    ).images
    own = config(bundles["v"], strength=0.6)
    (made,) = editing.edit_image(pipeline, noise_image(), half_mask(), [(PROMPT, 7)], config=own)
    white = np.asarray(half_mask()) > 0
    difference = np.abs(pixels([made])[0] - pixels([expected])[0]).max(-1)
    assert difference[white].max() <= 1
    assert (np.asarray(made)[~white] == np.asarray(noise_image())[~white]).all()
    assert (np.asarray(made)[white] != np.asarray(noise_image())[white]).any(-1).mean() > 0.9


def test_inpainting_works_with_any_number_of_latent_channels() -> None:
    own = EditConfig(init_image="x.png", num_steps=2, strength=0.5)  # the shipped bundle has 8
    shipped = load_stock(own)
    (made,) = editing.edit_image(shipped, noise_image(), half_mask(), [(PROMPT, 0)], config=own)
    white = np.asarray(half_mask()) > 0
    assert (np.asarray(made)[~white] == np.asarray(noise_image())[~white]).all()
    assert (np.asarray(made)[white] != np.asarray(noise_image())[white]).any()
    assert shipped.unet.config.in_channels == 8


@pytest.mark.parametrize("mask", [None, half_mask()], ids=["whole", "mask"])
def test_an_image_depends_on_its_own_seed_only(
    bundles: dict[str, Path], pipeline: Any, mask: Image.Image | None
) -> None:
    own = config(bundles["v"])
    pairs = [(PROMPT, 3), ("a blue star", 4), (PROMPT, 5)]

    def draw(chosen: list[tuple[str, int]]) -> NDArray[np.int16]:
        return pixels(list(editing.edit_image(pipeline, noise_image(), mask, chosen, config=own)))

    together, alone = draw(pairs), draw(pairs[1:2])
    assert np.abs(together[1] - alone[0]).max() <= 1
    assert (together[0] != together[2]).any()


@pytest.mark.parametrize("strength", [0.11, 0.5, 1.0])
def test_the_steps_are_those_that_are_run(
    bundles: dict[str, Path], pipeline: Any, strength: float
) -> None:
    done: list[int] = []
    own = config(bundles["v"], strength=strength)
    list(
        editing.edit_image(
            pipeline,
            noise_image(),
            None,
            [(PROMPT, 0)],
            config=own,
            on_step=lambda step, latents: done.append(step),
        )
    )
    assert done == [1, 2, 3]


@settings(max_examples=50)
@given(
    num_steps=st.integers(1, 60), strength=st.floats(0, 1, exclude_min=True, allow_subnormal=False)
)
def test_the_schedule_is_the_shortest_that_runs_the_steps(num_steps: int, strength: float) -> None:
    scheduler = make_sampler(own_scheduler("v"), "dpmpp")
    try:
        steps = editing.schedule_steps(num_steps, strength, scheduler)
    except ValueError as error:
        assert int(1000 * strength) < num_steps
        assert "at most" in str(error)
    else:
        assert int(steps * strength) == num_steps
        assert steps == num_steps or int((steps - 1) * strength) < num_steps


@pytest.mark.parametrize(
    ("name", "num_steps", "strength", "steps"),
    [("ddim", 24, 0.6, 40), ("ddim", 3, 0.03, 100), ("ddim", 19, 0.152, 125), ("pndm", 5, 1.0, 5)],
)
def test_the_schedule_is_one_that_the_sampler_allows(
    name: str, num_steps: int, strength: float, steps: int
) -> None:
    scheduler = make_sampler(own_scheduler("v"), name)
    assert editing.schedule_steps(num_steps, strength, scheduler) == steps


@pytest.mark.parametrize(
    ("name", "trait", "num_steps", "strength", "error"),
    [
        (
            *("ddim", "v", 25, 0.6),
            r"--num-steps: at strength 0.6 choose from 2, 3, 4, 6, 12, 15, 24, 30, or use "
            r"--scheduler euler; found 25, of a whole schedule of 42, with which DDIMScheduler",
        ),
        ("pndm", "v", 3, 1.0, "choose from 4, 5, .* whole schedule of 3, with which PNDM"),
        ("euler", "flow shift 3", 580, 1.0, r"choose from 493, [^;e]*, 500; found 580, .* of 580"),
        ("pndm", "v", 6, 0.6, "--scheduler: PNDMScheduler cannot start in the middle"),
        ("sa-solver", "flow", 6, 0.6, "--scheduler: SASolverScheduler cannot start in the middle"),
    ],
)
def test_steps_without_a_schedule_are_refused_by_those_that_have_one(
    name: str, trait: str, num_steps: int, strength: float, error: str
) -> None:
    scheduler = make_sampler(own_scheduler(trait), name)
    with pytest.raises(ValueError, match=error):
        editing.schedule_steps(num_steps, strength, scheduler)


@functools.cache
def own_scheduler(trait: str) -> Any:
    return sampling_scheduler(make_scheduler(closed_form.OBJECTIVES[trait]))


def test_a_thin_line_of_a_mask_covers_its_latents() -> None:
    mask = Image.new("L", (64, 48))
    mask.putpixel((17, 9), 1)
    covered = np.asarray(editing.cover(mask, 8))
    assert (covered[8:16, 16:24] == 255).all()
    assert covered.sum() == 64 * 255


def test_the_command_writes_images_that_carry_their_settings(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photo.png"
    save_png(noise_image((130, 64)), source, {"prompt": PROMPT, "seed": 0})
    half_mask((130, 64)).save(tmp_path / "mask.png")
    stale = tmp_path / "edits" / "0009.png"
    stale.parent.mkdir()
    save_png(Image.new("RGB", (4, 4)), stale, {"prompt": "earlier"})
    argv = ["--bundle", str(bundles["v"]), "--init-image", str(source), "--num-steps", "2"]
    argv += ["--mask", str(tmp_path / "mask.png"), "--num-images", "2", "--out", str(tmp_path)]
    grid = editing.edit(parse(EditConfig, None, argv, prog="edit"))
    assert f"variations with the prompt of {source}: {PROMPT}" in capsys.readouterr().out
    assert grid == tmp_path / "edits.png"
    files = sorted((tmp_path / "edits").iterdir())
    assert [path.name for path in files] == ["0000.png", "0001.png"]
    found = read_settings(files[1])
    assert (found["prompt"], found["seed"], found["strength"]) == (PROMPT, 1, 0.6)
    assert (found["init_image"], found["mask"]) == ("photo.png", "mask.png")
    assert found.keys() >= COMPUTED
    assert found["batch_size"] == 2
    assert read_settings(grid).keys() >= {"versions", "dtype"}
    assert len(found["init_image_sha256"]) == len(found["bundle_sha256"]) == 64
    with Image.open(files[0]) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize("name", ["edits/photo.jpg", "edits/mine/notes.txt", "edits", "edits.png"])
def test_files_that_are_not_edits_are_never_deleted(
    bundles: dict[str, Path], tmp_path: Path, name: str
) -> None:
    noise_image().save(tmp_path / "source.png")
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes((tmp_path / "source.png").read_bytes())
    own = config(bundles["v"], init_image=str(tmp_path / "source.png"), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--out: .*/edits.* is not a picture that this project"):
        editing.edit(own)
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert found == [foreign]


def test_images_are_upright_on_white_and_cropped_to_the_middle(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    read = editing.read_image(tmp_path / "turned.png", "--init-image")
    assert read.size == (20, 40)
    assert read.getpixel((10, 2)) == (255, 255, 255)
    assert read.getpixel((10, 39)) == (0, 0, 255)
    assert editing.fit(read, (16, 16)).getpixel((8, 8)) == (0, 0, 255)
    assert editing.fit(read, (16, 16)).size == (16, 16)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"strength": 0.0}, "--strength: expected more than 0 and at most 1, found 0.0"),
        ({"strength": 1.5}, "--strength: expected"),
        ({"strength": float("nan")}, "--strength: expected"),
        ({"init_image": None}, "--init-image: required"),
        ({"init_image": None, "mask": "m.png"}, "--mask: found 'm.png' without --init-image"),
        ({"num_steps": 0}, "--num-steps: expected"),
        ({"guidance_scale": 1.0, "negative_prompt": "x"}, "--negative-prompt: has no effect"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error.replace("(", r"\(")):
        config(Path("x"), **values)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Files that are no images, and masks that do not fit."""
    noise_image().save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    Image.new("L", (32, 64), 255).save(tmp_path / "narrow.png")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ({"init_image": "text.png"}, r"--init-image: .*text\.png is not an image"),
        ({"init_image": "cut.png"}, r"--init-image: .*cut\.png is not an image"),
        ({"init_image": "none.png"}, r"--init-image: no file .*none\.png"),
        ({"init_image": "."}, "--init-image: no file"),
        ({"mask": "text.png"}, r"--mask: .*text\.png is not an image"),
        ({"mask": "narrow.png"}, r"narrow\.png has 32 x 64 px, but --init-image has 64 x 64"),
        ({"mask": "black.png"}, r"black\.png is black everywhere"),
        ({"strength": 0.001}, "--strength: at strength 0.001 at most 1 steps can be run"),
        ({"size": (60, 64)}, "--size: expected multiples of 8"),
        (
            {"scheduler": "ddim", "num_steps": 7},
            "strength 0.6 choose from .*, 6, .*; found 7, .*12",
        ),
        ({"scheduler": "pndm"}, "--scheduler: PNDMScheduler cannot start in the middle"),
        ({"dtype": "float16"}, "--dtype: found float16, in which the VAE"),
    ],
)
def test_unusable_input_is_refused_and_nothing_is_written(
    bundles: dict[str, Path], broken: Path, names: dict[str, Any], error: str
) -> None:
    files = {"init_image": "good.png"} | names
    for name in ("init_image", "mask"):
        if name in files:
            files[name] = str(broken / files[name])
    own = config(bundles["v"], out=str(broken / "out"), **files)
    with pytest.raises(ValueError, match=error):
        editing.edit(own)
    assert not (broken / "out").exists()


def test_the_command_takes_no_preset() -> None:
    with pytest.raises(ConfigError, match="--config: this command takes no preset"):
        parse(EditConfig, None, ["--config", "demo", "--init-image", "x"], prog="edit")
