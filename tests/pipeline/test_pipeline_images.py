"""Image decoding, cropping and resizing, and the reasons for files that cannot be used."""

import contextlib
import hashlib
import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from latent_t2i.pipeline import images
from latent_t2i.pipeline.images import (
    Picture,
    Preprocessing,
    UnreadableImageError,
    crop_box,
    crop_boxes,
    crop_position,
    describe,
    load,
    read_size,
    to_rgb,
    zoomed_box,
)
from tests.hostile import (
    BROKEN,
    GOOD,
    ORIENTATION,
    PNG_START,
    chunk,
    deep,
    film,
    photograph,
    saved,
    write_hostile,
)

MIN_PSNR_DB = 42.0
"""The bound in docs/benchmarks.md for JPEGs decoded at a fraction of their size."""


def to(width: int, height: int | None = None, **more: Any) -> Preprocessing:
    return Preprocessing(size_px=(width, height or width), **more)


def load_as(content: bytes, preprocessing: Preprocessing, key: str = "a") -> Picture:
    return load(content, preprocessing, key=key)


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Returns an image with a red left half and a blue right half."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


def coordinates(width: int, height: int) -> Image.Image:
    """Returns an image whose red is the column and whose green is the row."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across, down, across * 0], -1).astype(np.uint8))


def reason_of(content: bytes, preprocessing: Preprocessing | None = None) -> str:
    with pytest.raises(UnreadableImageError) as error:
        load_as(content, preprocessing or to(8))
    return str(error.value)


def psnr_db(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    error = float(np.square(first.astype(float) - second.astype(float)).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def photographs(coco_mini: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(coco_mini.glob("*2017/*.jpg"))]


# Size and crop


def test_centre_of_the_shorter_side() -> None:
    content = saved(halves(), "PNG")
    picture = load_as(content, to(8))
    assert picture.sha256 == hashlib.sha256(content).hexdigest()
    assert picture.source_size_px == (40, 20) and picture.crops_px[0] == (10, 0, 30, 20)
    assert picture.pixels[0].shape == (8, 8, 3) and picture.pixels[0].dtype == np.uint8
    assert picture.pixels[0].flags.writeable
    assert picture.pixels[0, 4, 0].tolist() == [255, 0, 0]
    assert picture.pixels[0, 4, 7].tolist() == [0, 0, 255]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 47), (5, 7)])
@pytest.mark.parametrize("target", [(8, 8), (24, 8), (8, 24), (16, 8)])
def test_centre_crop_equals_imageops_fit(size: tuple[int, int], target: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    source = Image.fromarray(noise)
    expected = np.asarray(ImageOps.fit(source, target, Image.Resampling.BICUBIC))
    assert np.array_equal(load_as(saved(source, "PNG"), to(*target)).pixels[0], expected)


def test_resize_does_not_alias() -> None:
    """Lines of one pixel become grey. Nearest or plain bilinear sampling would keep some."""
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    pixels = load_as(saved(Image.fromarray(lines), "PNG"), to(16)).pixels[0]
    assert np.ptp(pixels[:, 2:-2]) <= 2
    assert abs(float(pixels.mean()) - 127.5) < 2


def test_small_images_are_enlarged() -> None:
    assert load_as(saved(halves(size=(4, 3)), "PNG"), to(16)).pixels[0].shape == (16, 16, 3)


@given(
    st.tuples(st.integers(1, 90_000), st.integers(1, 90_000)),
    st.tuples(st.integers(1, 2048), st.integers(1, 2048)),
    st.floats(0, 1, exclude_max=True),
)
def test_crop_boxes(size: tuple[int, int], target: tuple[int, int], position: float) -> None:
    """They lie in the image, are not empty, have the target's aspect and span one side."""
    left, top, right, bottom = crop_box(size, target, position)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) * target[1] == pytest.approx((bottom - top) * target[0], rel=1e-6)
    assert (left, right) == (0, size[0]) or (top, bottom) == (0, size[1])


@given(
    st.tuples(st.integers(1, 90_000), st.integers(1, 90_000)),
    st.tuples(st.integers(1, 2048), st.integers(1, 2048)),
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
def test_further_crops(
    size: tuple[int, int], target: tuple[int, int], draws: tuple[float, float, float]
) -> None:
    """They lie in the image, have the target's aspect and 75 to 100 % of the largest box."""
    left, top, right, bottom = zoomed_box(size, target, *draws)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) * target[1] == pytest.approx((bottom - top) * target[0], rel=1e-6)
    _, _, width, height = crop_box(size, target, 0)
    scale = max((right - left) / width, (bottom - top) / height)
    assert 0.75 - 1e-9 <= scale <= 1 + 1e-9


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_the_first_of_several_crops_is_the_only_one_of_one(crop: Any) -> None:
    for content in (saved(coordinates(200, 90), "PNG"), saved(photograph((400, 300)), "JPEG")):
        one = load_as(content, to(32, 48, crop=crop))
        three = load_as(content, to(32, 48, crop=crop, crops=3))
        assert three.pixels.shape == (3, 48, 32, 3) and three.pixels.flags.c_contiguous
        assert np.array_equal(three.pixels[0], one.pixels[0])
        assert three.crops_px[0] == one.crops_px[0]
        assert len({*three.crops_px}) == 3
        two = load_as(content, to(32, 48, crop=crop, crops=2))
        assert np.array_equal(two.pixels, three.pixels[:2])


def test_random_crops_depend_on_seed_and_key_alone() -> None:
    source = saved(coordinates(200, 50), "PNG")
    preprocessing = to(50, crop="random", seed=3)
    alone = {key: load_as(source, preprocessing, key) for key in map(str, range(64))}
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda key: load_as(source, preprocessing, key), reversed(alone)))
    for picture, other in zip(alone.values(), reversed(again), strict=True):
        assert picture.crops_px[0] == other.crops_px[0]
        assert np.array_equal(picture.pixels[0], other.pixels[0])
    lefts = sorted(picture.crops_px[0][0] for picture in alone.values())
    assert lefts[0] < 15 and lefts[-1] > 135 and abs(np.mean(lefts) - 75) < 20
    other_seed = load_as(source, to(50, crop="random", seed=4), "0")
    assert other_seed.crops_px[0] != alone["0"].crops_px[0]


def test_random_crops_do_not_change_between_versions() -> None:
    """Else an interrupted set could not be resumed with another version."""
    assert crop_position(0, "000000000009") == 0.3886244898746165
    assert 0 <= crop_position(1, "é猫") < 1
    boxes = crop_boxes((640, 480), to(64, crops=3), "000000000009")
    assert np.round(boxes, 3).tolist() == [
        [80, 0, 560, 480],
        [63.557, 96.085, 439.357, 471.885],
        [41.628, 78.178, 419.073, 455.623],
    ]


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_crops_px_are_the_parts_that_pixels_show(crop: Any) -> None:
    """The image's colours are coordinates, so its centre pixels say what they show."""
    source = saved(coordinates(200, 90), "PNG")
    for key in "abcdef":
        picture = load_as(source, to(32, 48, crop=crop, crops=3), key)
        for pixels, box in zip(picture.pixels, picture.crops_px, strict=True):
            left, top, right, bottom = box
            middle = pixels[23:25, 15:17, :2].mean((0, 1))
            assert middle == pytest.approx(((left + right - 1) / 2, (top + bottom - 1) / 2), abs=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (4000, 2)])
def test_no_side_becomes_zero(size: tuple[int, int]) -> None:
    for kind in ("PNG", "JPEG"):
        content = saved(Image.new("RGB", size, "navy"), kind)
        assert load_as(content, to(24, 16)).pixels[0].mean((0, 1)) == pytest.approx(
            (0, 0, 128), abs=2
        )


def test_too_small() -> None:
    content = saved(halves(size=(40, 20)), "PNG")
    assert reason_of(content, to(8, min_size_px=21)) == (
        "40x20 px, smaller than --min-image-size-px 21"
    )
    assert load_as(content, to(8, min_size_px=20)).source_size_px == (40, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size_px": (0, 8)}, r"size_px: expected sides of at least 1, found \(0, 8\)"),
        ({"size_px": (8, 8), "crop": "corner"}, "crop: expected centre or random, found 'corner'"),
    ],
)
def test_invalid_preprocessing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**settings)


# Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int) -> None:
    """The result equals Pillow's exif_transpose, also for a JPEG decoded at half its size."""
    turned = photograph((160, 120))
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    content = saved(turned, kind, exif=tags, **({"quality": 95} if kind == "JPEG" else {}))
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    expected = np.asarray(ImageOps.fit(upright, (8, 12), Image.Resampling.BICUBIC))
    picture = load_as(content, to(8, 12))
    assert picture.source_size_px == upright.size == read_size(content)
    assert upright.size == ((160, 120) if orientation < 5 else (120, 160))
    assert psnr_db(picture.pixels[0], expected) > 38
    assert picture.pixels[0].shape == (12, 8, 3)


def test_orientation_of_a_png_behind_its_pixels() -> None:
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    content = saved(halves(), "PNG", exif=tags)
    start = content.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    end = start + 12 + length
    late = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert load_as(late, to(8)).source_size_px == (20, 40) == read_size(late)


@pytest.mark.parametrize("name", [name for name in GOOD if "exif" in name or "mpo" in name])
def test_broken_metadata_is_ignored(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    content = GOOD[name][0]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = load_as(content, to(8))
    assert not caught and picture.source_size_px == (96, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(load_as(content, to(8)).pixels[0], picture.pixels[0])
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("name", ["short-exif.jpg", "beyond-exif.jpg", "malformed-mpo.jpg"])
def test_pillow_would_warn(name: str) -> None:
    """Shows that the test above can fail."""
    with pytest.warns(UserWarning):
        Image.open(io.BytesIO(GOOD[name][0]())).getexif()


def test_other_warnings_are_not_filtered() -> None:
    load_as(GOOD["short-exif.jpg"][0](), to(8))
    with pytest.warns(UserWarning, match="^Corrupt EXIF data"):
        warnings.warn("Corrupt EXIF data, says another module", stacklevel=1)


# Modes


@pytest.mark.parametrize("fast_jpeg", [True, False])
def test_cmyk_of_adobe_is_not_inverted(fast_jpeg: bool) -> None:
    content = saved(halves("CMYK", (320, 160)), "JPEG", quality=95)
    assert b"Adobe" in content
    pixels = load_as(content, to(8, fast_jpeg=fast_jpeg)).pixels[0]
    assert np.abs(pixels[4, 0].astype(int) - [255, 0, 0]).max() <= 4
    assert np.abs(pixels[4, 7].astype(int) - [0, 0, 255]).max() <= 4


MODES = ["RGB", "L", "P", "1", "RGBA", "LA"]
TIFF_MODES = ["CMYK", "YCbCr", "PA", "LAB"]
PREMULTIPLIED = ["La", "RGBa"]


def of_mode(mode: str, value: int = 102) -> Image.Image:
    """Returns a plain grey image; Pillow converts to some modes only through another."""
    grey = Image.new("L", (16, 16), value).convert("LA" if mode == "La" else "RGB")
    through = {"PA": "P", "RGBa": "RGBA"}
    return (grey.convert(through[mode]) if mode in through else grey).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "PNG") for mode in MODES] + [(mode, "TIFF") for mode in MODES + TIFF_MODES],
)
def test_modes_become_rgb(mode: str, kind: str) -> None:
    value = 255 if mode == "1" else 102
    with Image.open(io.BytesIO(content := saved(of_mode(mode, value), kind))) as image:
        assert image.mode == mode
    pixels = load_as(content, to(8)).pixels[0]
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - value).max() <= 1


@pytest.mark.parametrize("mode", PREMULTIPLIED)
def test_premultiplied_alpha(mode: str) -> None:
    """TIFF files may have it, although Pillow does not write them."""
    assert np.abs(np.asarray(to_rgb(of_mode(mode))).astype(int) - 102).max() <= 1
    clear = Image.new("RGBA" if mode == "RGBa" else "LA", (2, 2))
    assert np.asarray(to_rgb(clear.convert(mode))).min() == 255


def test_transparency_becomes_white() -> None:
    for mode in ("RGBA", "LA"):
        clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
        assert load_as(saved(clear, "PNG"), to(8)).pixels[0].min() == 255
        assert load_as(saved(clear, "TIFF"), to(8)).pixels[0].min() == 255
    half_clear = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert load_as(saved(half_clear, "PNG"), to(8)).pixels[0, 4, 4].tolist() == [255, 127, 127]


def test_transparent_palettes() -> None:
    """PNG has one transparent index or a table, GIF has one index."""
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255] * 4)
    for options in ({"transparency": 0}, {"transparency": bytes([0, 255])}):
        assert load_as(saved(palette, "PNG", **options), to(8)).pixels[0].min() == 255
    assert load_as(saved(palette, "GIF", transparency=0), to(8)).pixels[0].min() == 255
    table = {"transparency": bytes([255, 0])}
    assert load_as(saved(palette, "PNG", **table), to(8)).pixels[0, 0, 0].tolist() == [0, 0, 255]


def test_transparent_colour_without_a_palette() -> None:
    red = saved(Image.new("RGB", (8, 8), "red"), "PNG", transparency=(255, 0, 0))
    assert load_as(red, to(8)).pixels[0].min() == 255


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits(kind: str, order: str) -> None:
    grey = np.asarray(photograph().convert("L"))
    pixels = load_as(deep(kind, order), to(96, 64)).pixels[0]
    assert np.array_equal(pixels, np.repeat(grey[..., None], 3, -1))


def test_sixteen_bits_of_colour() -> None:
    """Built by hand, because Pillow reads but does not write such a PNG."""
    colours = np.array([[[255, 0, 0], [0, 128, 0]], [[0, 0, 255], [9, 99, 199]]], np.uint16)
    rows = b"".join(b"\0" + (row * 257).astype(">u2").tobytes() for row in colours)
    content = hand_made_png((2, 2), 16, rows)
    assert np.array_equal(load_as(content, to(2)).pixels[0], colours)


def hand_made_png(size: tuple[int, int], bits: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0))
    return PNG_START + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def hand_made_tiff(bits: int, sample_format: int, content: bytes, size: tuple[int, int]) -> bytes:
    """Returns an uncompressed grey TIFF."""
    tags = {
        256: (3, size[0]),
        257: (3, size[1]),
        258: (3, bits),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8 + 2 + 9 * 12 + 4),
        277: (3, 1),
        279: (4, len(content)),
        339: (3, sample_format),
    }
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<H2x" if kind == 3 else "<I", value)
        for tag, (kind, value) in tags.items()
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + content


def test_twelve_bits_are_not_taken_for_sixteen() -> None:
    """Three bytes hold two values of twelve bits: black and white."""
    content = hand_made_tiff(12, 1, bytes([0x00, 0x0F, 0xFF]) * 2, (2, 2))
    assert load_as(content, to(2)).pixels[0, 0, :, 0].tolist() == [0, 255]


def test_sixteen_bits_of_netpbm() -> None:
    content = b"P5 2 1 65535\n" + struct.pack(">HH", 0, 65535)
    assert load_as(content, to(2, 1)).pixels[0, 0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (hand_made_tiff(32, 3, struct.pack("<f", 0.5), (1, 1)), "F"),
        (hand_made_tiff(32, 1, struct.pack("<I", 7), (1, 1)), "I"),
        (hand_made_tiff(16, 2, struct.pack("<h", 7), (1, 1)), "I"),
    ],
)
def test_modes_without_a_known_range_are_refused(content: bytes, mode: str) -> None:
    assert reason_of(content) == f"undecodable: pixels of mode {mode} have no known range"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "MPO"])
def test_first_frame_of_several(kind: str) -> None:
    first = np.asarray(photograph().resize((16, 16), Image.Resampling.BICUBIC, (16, 0, 80, 64)))
    assert psnr_db(load_as(film(kind), to(16)).pixels[0], first) > 20


def test_profiles_are_not_applied() -> None:
    plain = load_as(saved(halves(), "PNG"), to(8))
    profiled = load_as(saved(halves(), "PNG", icc_profile=b"not even a profile"), to(8))
    assert np.array_equal(plain.pixels[0], profiled.pixels[0])


# JPEG decoded at a fraction of its size


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_fast_jpeg_is_close_to_a_full_decode(options: dict[str, Any]) -> None:
    content = saved(photograph((811, 607)), "JPEG", quality=90, **options)
    fast, full = (load_as(content, to(32, fast_jpeg=fast)) for fast in (True, False))
    assert not np.array_equal(fast.pixels[0], full.pixels[0])
    assert psnr_db(fast.pixels[0], full.pixels[0]) > MIN_PSNR_DB
    assert (fast.source_size_px, fast.crops_px[0]) == (full.source_size_px, full.crops_px[0])
    assert fast.source_size_px == (811, 607)


@pytest.mark.parametrize(
    ("size", "target", "divisor"),
    [
        ((160, 160), (32, 32), 2),
        ((159, 160), (32, 32), 1),
        ((320, 500), (32, 32), 4),
        ((640, 640), (32, 32), 8),
        ((9000, 2000), (32, 32), 8),
        ((160, 80), (32, 16), 2),
        ((160, 80), (16, 32), 1),
        ((32, 32), (32, 32), 1),
        ((20, 20), (32, 32), 1),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_chosen_jpeg_fraction(
    size: tuple[int, int],
    target: tuple[int, int],
    divisor: int,
    turned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decoded image has at least 2.5 times the target size once it is upright."""
    tags = Image.Exif()
    tags[ORIENTATION] = 6 if turned else 1
    stored = size[::-1] if turned else size
    content = saved(Image.new("RGB", stored, "red"), "JPEG", exif=tags)
    decoded: list[tuple[int, int]] = []

    def to_rgb(image: Image.Image) -> Image.Image:
        decoded.append(image.size)
        return image.convert("RGB")

    monkeypatch.setattr(images, "to_rgb", to_rgb)
    assert load_as(content, to(*target)).source_size_px == size
    assert decoded == [tuple(-(-side // divisor) for side in stored)]
    load_as(content, to(*target, fast_jpeg=False))
    assert decoded[1] == stored


def test_fast_jpeg_of_mpo(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [photograph((640, 480)), photograph((640, 480)).rotate(180)]
    content = saved(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    fast, full = (load_as(content, to(32, fast_jpeg=fast)).pixels[0] for fast in (True, False))
    assert not np.array_equal(fast, full) and psnr_db(fast, full) > MIN_PSNR_DB


@pytest.mark.parametrize("size_px", [32, 64, 128])
def test_fast_jpeg_of_photographs(coco_mini: Path, size_px: int) -> None:
    compared = []
    for content in photographs(coco_mini):
        fast, full = (load_as(content, to(size_px, fast_jpeg=fast)) for fast in (True, False))
        if not np.array_equal(fast.pixels[0], full.pixels[0]):
            compared.append(psnr_db(fast.pixels[0], full.pixels[0]))
    assert len(compared) > (100 if size_px < 128 else 0)
    assert min(compared) > MIN_PSNR_DB


def test_description_has_all_that_changes_the_pixels() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"height": 32},
        {"crop": "random"},
        {"crop": "random", "seed": 1},
        {"fast_jpeg": False},
        {"min_size_px": 9},
        {"crops": 2},
        {"crops": 3},
        {"crops": 3, "seed": 1},
    ]
    described = [describe(to(64, **change)) for change in changes]
    assert all(described.count(one) == 1 for one in described)
    assert describe(to(64, seed=1)) == describe(to(64)), "a centre crop has no seed"
    assert described[0] == {
        "size_px": [64, 64],
        "resize": "shorter side, Pillow bicubic",
        "crop": "centre",
        "min_size_px": 1,
        "jpeg": "scaled DCT, at least 2.5 times the size",
        "max_pixels": 89478485,
    }


# Reasons


@pytest.mark.parametrize("min_size_px", [1, 3])
def test_each_hostile_file(
    tmp_path: Path, min_size_px: int, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = write_hostile(tmp_path, min_size_px=min_size_px)
    assert len({Path(name).stem for name in expected}) == len(expected)
    assert {path.name for path in tmp_path.iterdir()} == set(expected)
    for name, reason in expected.items():
        content = (tmp_path / name).read_bytes()
        assert len(content) < 40_000
        try:
            picture = load_as(content, to(16, 24, min_size_px=min_size_px))
        except UnreadableImageError as error:
            assert reason is not None, f"{name}: {error}"
            begins = reason.endswith(": ") and str(error).startswith(reason)
            assert begins or str(error) == reason, name
        else:
            assert reason is None, name
            assert picture.pixels[0].shape == (24, 16, 3)
            assert picture.source_size_px == read_size(content)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", BROKEN)
def test_reasons_are_the_same_each_time(name: str) -> None:
    """They are in the manifest, which must not change: no addresses, no folders."""
    content = BROKEN[name][0]()
    reason = reason_of(content)
    assert reason == reason_of(bytes(bytearray(content)))
    assert " at 0x" not in reason and "\n" not in reason


@pytest.mark.parametrize("num_pixels", [images.MAX_PIXELS, images.MAX_PIXELS + 1])
def test_decompression_bombs_are_not_decoded(
    num_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(image: Image.Image) -> None:
        raise OSError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    content = saved(Image.new("RGB", (8, 8)), "BMP")
    size = (num_pixels, 1)
    content = content[:18] + struct.pack("<ii", *size) + content[26:]
    expected = "undecodable: decoded" if num_pixels <= images.MAX_PIXELS else "more than "
    assert reason_of(content).startswith(expected)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries do
    assert reason_of(content).startswith(expected)


def with_chunk(name: bytes, content: bytes) -> bytes:
    """Returns a PNG with a chunk behind its pixels."""
    plain = saved(photograph(), "PNG")
    return plain[:-12] + chunk(name, content) + plain[-12:]


def zeroed(content: bytes, name: bytes, start: int, length: int) -> bytes:
    """Returns a file with zeros from `start` bytes behind a name."""
    first = content.index(name) + start
    return content[:first] + bytes(length) + content[first + length :]


@pytest.mark.parametrize(
    ("error", "make", "reason"),
    [
        (OSError, BROKEN["half.jpg"][0], "truncated file"),
        (SyntaxError, lambda: with_chunk(b"iCCP", b"a\0\x0e"), "undecodable: Unknown compress"),
        (ValueError, lambda: with_chunk(b"gAMA", b"x"), "truncated file"),
        (IndexError, lambda: with_chunk(b"iCCP", b"a\0"), "undecodable: index out of range"),
        (
            TypeError,
            lambda: hand_made_tiff(8, 1, bytes(4), (2, 2)).replace(b"\x11\x01\4", b"\x11\x01\2"),
            "undecodable: 'str' object cannot be interpreted as an integer",
        ),
        (
            RuntimeError,
            lambda: zeroed(saved(photograph(), "AVIF"), b"mdat", 4, 40),
            "undecodable: Failed to decode",
        ),
        (
            ZeroDivisionError,
            lambda: zeroed(film("AVIF"), b"mdhd", 24, 4),
            "undecodable: division by zero",
        ),
        (struct.error, lambda: saved(photograph(), "WEBP", exif=b"Exif\0\0MM\0*"), None),
    ],
)
def test_each_error_of_pillow(
    error: type[Exception], make: Callable[[], bytes], reason: str | None
) -> None:
    """Shows that Pillow raises the error, and what becomes of it."""
    if "AVIF" not in images.FORMATS and error in (RuntimeError, ZeroDivisionError):
        pytest.skip("this Pillow reads no AVIF")
    content = make()
    with warnings.catch_warnings(), pytest.raises(error) as raised:
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            image.getexif()
            image.load()
    assert type(raised.value) is error
    if reason:
        assert reason_of(content).startswith(reason)
    else:
        assert load_as(content, to(8)).source_size_px == (96, 64)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "undecodable: not enough memory"),
        (OSError("image file is truncated (3 bytes not processed)"), "truncated file"),
        (Image.DecompressionBombError("huge"), f"more than {images.MAX_PIXELS} pixels"),
    ],
)
def test_reasons_of_errors(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert reason_of(saved(halves(), "BMP")) == reason


@pytest.mark.parametrize(
    ("start", "plugin", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif", "HEIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "pillow-heif", "HEIF"),
        (b"\xff\x0a\xfa\x7f\x01\x90\x08\x06", "pillow-jxl-plugin", "JXL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "pillow-jxl-plugin", "JXL"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "'pillow>=11.3'", "AVIF"),
    ],
)
def test_formats_that_need_a_plugin(
    start: bytes, plugin: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tuple(kind for kind in images.FORMATS if kind not in ("HEIF", "JXL", name))
    monkeypatch.setattr(images, "FORMATS", others)
    assert reason_of(start + bytes(100)).endswith(f" image: to read it, pip install {plugin}")


@pytest.mark.parametrize("kind", ["HEIF", "JXL"])
def test_plugins_are_used_if_installed(kind: str) -> None:
    if kind not in images.FORMATS:
        pytest.skip(f"no plugin for {kind}")
    content = saved(photograph(), kind, quality=95)
    assert load_as(content, to(8)).source_size_px == (96, 64) == read_size(content)
    for size in range(12, len(content), 7):
        with contextlib.suppress(UnreadableImageError):
            load_as(content[:size], to(8))


def test_our_own_errors_are_not_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(image: Image.Image) -> None:
        raise AttributeError("a slip")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(AttributeError, match="a slip"):
        load_as(saved(halves(), "BMP"), to(8))


SOUND = [
    *(saved(photograph((24, 16)), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM")),
    *(film(kind) for kind in ("GIF", "PNG", "WEBP", "MPO")),
    GOOD["beyond-exif.jpg"][0](),
    saved(photograph((24, 16)), "TIFF"),
]


@given(st.data())
def test_a_damaged_file_is_decoded_or_quarantined(data: st.DataObject) -> None:
    """Damaged files raise nothing else, and no warning."""
    content = bytearray(data.draw(st.sampled_from(SOUND)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(content), 700) - 1))
        content[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    for read in (read_size, lambda given: load_as(given, to(8))):
        try:
            read(bytes(content))
        except UnreadableImageError as error:
            assert str(error)


def test_a_broken_tiff_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow logs an error, which logging would print without a handler."""
    content = saved(photograph(), "TIFF").replace(
        struct.pack("<HHIH", 277, 3, 1, 3), struct.pack("<HHIH", 277, 3, 1, 9)
    )
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        assert reason_of(content) == "undecodable: broken header"
    finally:
        root.handlers = handlers
    assert capfd.readouterr() == ("", "")


# Size alone


def test_size_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [saved(halves(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    tags = Image.Exif()
    tags[ORIENTATION] = 8
    turned = [saved(halves(), kind, exif=tags) for kind in ("JPEG", "WEBP", "TIFF", "PNG")]

    def decode(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert [read_size(content) for content in contents] == [(40, 20)] * 6
    assert [read_size(content) for content in turned] == [(20, 40)] * 4


def test_size_of_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(halves(), "JPEG"))
    with path.open("rb") as file:
        assert read_size(file) == (40, 20)


@pytest.mark.parametrize("name", ["empty.jpg", "letter.jpg", "start.jpg", "bomb.png"])
def test_size_of_unreadable_images(name: str) -> None:
    content, reason = BROKEN[name]
    with pytest.raises(UnreadableImageError) as error:
        read_size(content())
    assert str(error.value) == reason


def test_threads_decode_equal_images() -> None:
    contents = [make() for make, _ in GOOD.values()] * 3
    one_by_one = [load_as(content, to(32)).pixels[0] for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together: list[NDArray[np.uint8]] = list(
            pool.map(lambda content: load_as(content, to(32)).pixels[0], contents)
        )
    assert all(map(np.array_equal, one_by_one, together))


def test_reasons_in_threads() -> None:
    """All threads share the warning filters."""
    noisy: list[Callable[[], bytes]] = [GOOD[name][0] for name in ("short-exif.jpg", "pair.mpo")]
    contents = [make() for make in noisy] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(lambda content: load_as(content, to(8)), contents))) == 40
