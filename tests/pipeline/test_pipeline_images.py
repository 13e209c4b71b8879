"""Pictures become upright RGB squares; files that cannot be read give a reason."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from pipeline.images import UnreadableImageError, load, load_all, missing_files
from pipeline.record import Record


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_centre_of_the_shorter_side(tmp_path: Path) -> None:
    picture = load(saved(halves(), tmp_path / "a.png"), 8)
    assert picture.source_size_px == (40, 20)
    assert picture.pixels.shape == (8, 8, 3) and picture.pixels.dtype == np.uint8
    assert picture.pixels[4, 0].tolist() == [255, 0, 0]
    assert picture.pixels[4, 7].tolist() == [0, 0, 255]


def test_resize_does_not_alias(tmp_path: Path) -> None:
    """Lines one pixel wide become even grey, where nearest or plain bilinear sampling would not."""
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    pixels = load(saved(Image.fromarray(lines), tmp_path / "a.png"), 16).pixels
    assert np.ptp(pixels[:, 2:-2]) <= 2
    assert abs(float(pixels.mean()) - 127.5) < 2


def test_small_images_are_enlarged(tmp_path: Path) -> None:
    assert load(saved(halves(size=(4, 3)), tmp_path / "a.png"), 16).pixels.shape == (16, 16, 3)


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    picture = load(saved(halves(), tmp_path / "a.jpg", exif=exif, quality=95), 8)
    assert picture.source_size_px == (20, 40)
    red, blue = picture.pixels[0, 4], picture.pixels[-1, 4]
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    grey = Image.new("L", (16, 16), 255 if mode == "1" else 102)
    image = grey.convert("RGB").convert(mode) if mode != "I;16" else None
    image = image or Image.fromarray(np.full((16, 16), 102 * 257, np.uint16))
    pixels = load(saved(image, tmp_path / f"a.{suffix}"), 8).pixels
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - (255 if mode == "1" else 102)).max() <= 1


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert load(saved(clear, tmp_path / "rgba.png"), 8).pixels.min() == 255
    palette = Image.new("P", (8, 8), 0)
    assert load(saved(palette, tmp_path / "p.png", transparency=0), 8).pixels.min() == 255


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path: Path) -> None:
    Image.new("1", (20000, 10000)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "missing file"),
        (lambda path: path.write_text("a letter"), "not an image"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (lambda path: path.mkdir(), "undecodable: "),
        (truncated, "undecodable: image file is truncated"),
        (bomb, "more than 89478485 pixels"),
    ],
)
def test_reasons(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "a.jpg"
    make(path)
    with pytest.raises(UnreadableImageError) as error:
        load(path, 8)
    assert str(error.value).startswith(reason)
    assert str(tmp_path) not in str(error.value)


def record_of(path: Path) -> Record:
    return Record(key=path.stem, path=path, captions=("a",), extra={})


def test_load_all_keeps_the_order_and_is_not_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [saved(halves(), tmp_path / f"{n}.png") for n in range(10)]
    paths[3].unlink()
    begun = []

    def counting_load(path: Path, size_px: int) -> images.Picture:
        begun.append(path)
        return load(path, size_px)

    monkeypatch.setattr(images, "load", counting_load)
    with ThreadPoolExecutor(2) as pool:
        loaded = load_all([record_of(path) for path in paths], 8, pool, num_ahead=2)
        first = next(loaded)
        assert len(begun) <= 3
        found = [first, *loaded]
    assert [record.path for record, _ in found] == paths
    assert [str(p) for _, p in found if isinstance(p, UnreadableImageError)] == ["missing file"]


def test_missing_files(tmp_path: Path) -> None:
    there = saved(halves(), tmp_path / "a.png")
    gone = [tmp_path / "b.png", tmp_path / "nowhere" / "c.png"]
    found = missing_files([record_of(path) for path in [there, *gone]])
    assert [record.path for record in found] == gone
