"""Folders of images: order, sizes, crops, and files that are no images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.evaluate import Evaluation
from latent_t2i.evaluation.images import batches_of, fit, list_images, read_image
from latent_t2i.evaluation.inputs import open_inputs
from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.evaluation.processes import Group
from latent_t2i.evaluation.rows import Panel


def save(folder: Path, name: str, size: tuple[int, int] = (8, 8), value: int = 0) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def items(num: int) -> list[Item]:
    return [Item(position=number, key=str(number)) for number in range(num)]


def test_images_are_found_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.jpg", ".hidden/x.png", "a/y.PNG"):
        save(tmp_path, name)
    (tmp_path / "captions.json").write_text("[]")
    found = [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path, "--images")]
    assert found == ["a/y.PNG", "a/z.jpg", "b.png"]


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_images_are_an_error(tmp_path: Path, num: int) -> None:
    for number in range(num):
        save(tmp_path, f"{number}.png")
    with pytest.raises(ValueError, match=rf"--images: .* has {num} images; expected two or more"):
        list_images(tmp_path, "--images")
    with pytest.raises(ValueError, match=r"--images: .*absent is not a folder"):
        list_images(tmp_path / "absent", "--images")


def test_broken_images_are_named(tmp_path: Path) -> None:
    whole = save(tmp_path, "whole.png", (64, 64), 9).read_bytes()
    for name, content in {"cut.png": whole[:60], "text.png": b"no image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: not a readable image: "):
            read_image(tmp_path / name)


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    paths = [save(tmp_path, "a.png", (8, 8)), save(tmp_path, "b.png", (16, 8))]
    with pytest.raises(ValueError, match=r"b.png has 16 x 8 pixels and .*a.png 8 x 8; .* --size"):
        list(batches_of(paths, items(2), batch_size=1))
    (batch,) = batches_of(paths, items(2), batch_size=2, size=(4, 4))
    assert batch.images.shape == (2, 4, 4, 3)


def test_sizes_that_alternate_between_processes(tmp_path: Path) -> None:
    """Each of two processes sees one size only; the second's is not that of the first image."""
    for number in range(4):
        save(tmp_path, f"{number}.png", (16 if number % 2 else 8, 8))
    config = EvaluationConfig(name="tests", images=str(tmp_path), reference=str(tmp_path))
    inputs = open_inputs(config)
    assert inputs.images is not None and inputs.reals is not None
    panel = Panel(config=config, device="cpu", inputs=inputs.available)
    for rank in range(2):
        group = Group(rank=rank, world_size=2)
        run = Evaluation(config=config, inputs=inputs, group=group, panel=panel)
        for flag, batches in (
            ("--images", run.batches(inputs.images, inputs.items)),
            ("--reference", inputs.reals.batches(group, 2)),
        ):
            if rank == 0:
                assert len(list(batches)) == 1
            else:
                message = rf"{flag}: .*1\.png has 16 x 8 pixels and .*0\.png 8 x 8"
                with pytest.raises(ValueError, match=message):
                    list(batches)


def test_the_crop_comes_before_the_resize() -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255  # the centre
    fitted = np.asarray(fit(Image.fromarray(pixels), (2, 2)))
    assert (fitted == 255).all()
    tall = np.asarray(fit(Image.fromarray(pixels.transpose(1, 0, 2)), (8, 8)))
    assert (tall == 255).all()


def test_images_are_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (8, 4, 3)


def test_batches_cover_all_images_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path, f"{n}.png", value=n) for n in range(5)]
    found = list(batches_of(paths, items(5), batch_size=2))
    assert [len(batch.items) for batch in found] == [2, 2, 1]
    assert np.concatenate([batch.images[:, 0, 0, 0] for batch in found]).tolist() == list(range(5))
