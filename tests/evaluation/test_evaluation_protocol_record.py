"""The protocol's id: another input or setting that changes a figure gives another id."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_t2i.evaluation import protocol
from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.feature_stats import stats_of
from latent_t2i.evaluation.inputs import open_inputs
from tests.bundles import make_bundle

NUM = 4


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationConfig:
    """Finished images with captions, annotated objects and a folder of real images."""
    for folder, seed in (("images", 0), ("reference", 1)):
        (tmp_path / folder).mkdir()
        rng = np.random.default_rng(seed)
        for number in range(NUM):
            pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number:012d}.png")
    write_captions(tmp_path)
    write_objects(tmp_path)
    return EvaluationConfig(
        name="tests", images=str(tmp_path / "images"), out=str(tmp_path / "out"),
        captions=str(tmp_path / "captions.jsonl"), objects=str(tmp_path / "objects.json"),
        reference=str(tmp_path / "reference"),
    )  # fmt: skip


def write_captions(folder: Path, first: str = "a dog", further: str = "an animal") -> None:
    rows = [
        {"file_name": f"{number:012d}.jpg", "captions": [f"{first} {number}", further]}
        for number in range(NUM)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_objects(folder: Path, category: str = "dog") -> None:
    document = {
        "images": [{"id": 1, "file_name": f"{1:012d}.jpg", "width": 8, "height": 8}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 0}],
        "categories": [{"id": 1, "name": category}],
    }
    (folder / "objects.json").write_text(json.dumps(document))


def write_statistics(path: Path, **identity: str) -> None:
    stats = stats_of(np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32))
    stats.identity = {"resize": "legacy, 299 px", **identity}
    stats.save(path)


def id_of(config: EvaluationConfig) -> str:
    return protocol.protocol_id(record_of(config))


def record_of(config: EvaluationConfig) -> dict[str, object]:
    return protocol.record_of(
        config, open_inputs(config), num_images=NUM, drawn=None,
        identities={"fid": {"weights_sha256": "1"}},
    )  # fmt: skip


def as_jpeg(folder: Path, quality: int) -> None:
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image:
            image.load()
        path.unlink()
        image.save(path.with_suffix(".jpg"), quality=quality)


def rename(folder: Path) -> None:
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        path.rename(path.with_stem(f"image-{number}"))


def change_a_real_image(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "reference" / f"{0:012d}.png")


INPUTS: dict[str, Callable[[Path], None]] = {
    "format": lambda folder: as_jpeg(folder, 90),
    "pairing": rename,
    "prompts": lambda folder: write_captions(folder, first="a cat"),
    "reference captions": lambda folder: write_captions(folder, further="a pet"),
    "objects": lambda folder: write_objects(folder, "cat"),
    "reference": change_a_real_image,
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_id_depends_on_every_input(
    settings: EvaluationConfig, tmp_path: Path, name: str
) -> None:
    first = id_of(settings)
    assert id_of(settings) == first
    INPUTS[name](tmp_path)
    assert id_of(settings) != first


@pytest.mark.parametrize("name", ["size", "seed", "num_seed_sets", "resize", "objects"])
def test_the_id_depends_on_every_setting(settings: EvaluationConfig, name: str) -> None:
    other = {"size": 8, "seed": 1, "num_seed_sets": 4, "resize": "clean", "objects": None}
    assert id_of(replace(settings, **{name: other[name]})) != id_of(settings)


def test_the_strength_of_jpeg_is_recorded(settings: EvaluationConfig, tmp_path: Path) -> None:
    assert record_of(settings)["file_format"] == "PNG"
    as_jpeg(tmp_path, 75)
    assert record_of(settings)["file_format"] == "JPEG (quantisation 29 to 29)"
    weak = id_of(settings)
    as_jpeg(tmp_path, 10)
    assert id_of(settings) != weak


def test_statistics_state_their_images(settings: EvaluationConfig, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    settings = replace(settings, reference=str(path))
    write_statistics(path, images_count="9", images_size="8 x 8, centre crop")
    record = record_of(settings)
    assert (record["reference/count"], record["reference/crop"]) == ("9", "8 x 8, centre crop")
    assert record["reference/resize"] == "legacy, 299 px"
    write_statistics(path)
    assert record_of(settings)["reference/count"] == "not stated"
    assert protocol.protocol_id(record) != id_of(settings)


def test_drawn_images_of_another_size_are_cropped(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    config = EvaluationConfig(name="tiny", bundle=str(bundle), out=str(tmp_path / "out"))
    assert open_inputs(config).fit is None
    assert open_inputs(replace(config, size=64)).fit is None, "their own size"
    assert open_inputs(replace(config, size=32)).fit == (32, 32)
    drawn = {"seed": 0}
    ids = {
        protocol.protocol_id(
            protocol.record_of(one, open_inputs(one), num_images=9, drawn=drawn, identities={})
        )
        for one in (config, replace(config, size=32), replace(config, num_diverse_prompts=3))
    }
    assert len(ids) == 3


def test_the_protocol_id_depends_on_every_field(settings: EvaluationConfig) -> None:
    record = record_of(settings)
    first = protocol.protocol_id(record)
    assert all(protocol.protocol_id(record | {name: "other"}) != first for name in record)
    assert record["metrics/fid/weights_sha256"] == "1"
    assert protocol.hash_texts(["ab", "c"]) != protocol.hash_texts(["a", "bc"])
