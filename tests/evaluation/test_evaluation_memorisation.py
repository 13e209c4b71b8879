"""Memorisation: planted copies come first, held-out and flat images do not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.evaluate import evaluate
from latent_t2i.evaluation.metrics import metric_class
from latent_t2i.evaluation.metrics.memorisation import (
    NUM_NEIGHBOURS,
    NUM_PAIRS,
    Bank,
    Memorisation,
    against,
    extra_items,
)
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, MissingWeights, RowName
from latent_t2i.evaluation.processes import Group
from latent_t2i.evaluation.training_set import TrainingSet, choose
from latent_t2i.model.encoders import load_vae
from latent_t2i.shards.schema import Manifest
from tests import tiny
from tests.bundles import make_bundle

Images = NDArray[np.uint8]
SIDE = 8
NUM_TRAIN = 60


class Colours:
    """Features: the image's pixels at a quarter of its size, without their mean colour's sign."""

    dim = 3 * (SIDE // 2) ** 2

    def features(self, batch: Batch) -> NDArray[np.float32]:
        return self.extract(batch.images)

    def extract(self, images: Images) -> NDArray[np.float32]:
        small = images.reshape(len(images), SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
        return np.asarray(small.reshape(len(images), -1) + 1, np.float32)

    def identity(self) -> dict[str, str]:
        return {"network": "colours"}


@dataclass
class Train:
    """Training images in memory, in place of decoded shards."""

    pictures: Images
    sha256: str = "0" * 64
    num_records: int = 1000

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self) -> Iterator[tuple[Any, Images]]:
        for start in range(0, len(self), 16):
            part = np.arange(start, min(start + 16, len(self)))
            yield part, self.pictures[part]

    def image(self, number: int) -> Images:
        return self.pictures[number]

    def key(self, number: int) -> str:
        return f"train-{number}"

    def caption(self, number: int) -> str:
        return f"caption {number}"


def noise(num: int, seed: int) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (num, SIDE, SIDE, 3), dtype=np.uint8)


def flat(num: int, seed: int) -> Images:
    """Flat grey pictures, which are close to each other."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(100, 156, (num, 1, 1, 1)) + rng.integers(-3, 4, (num, SIDE, SIDE, 3))
    return levels.astype(np.uint8)


def near(images: Images, seed: int) -> Images:
    """Copies with a little noise, as a model that has memorised them would draw."""
    change = np.random.default_rng(seed).integers(-4, 5, images.shape)
    return np.clip(images.astype(int) + change, 0, 255).astype(np.uint8)


def context(train: Images, out: Path | None = None) -> Context:
    config = EvaluationConfig(name="x", weights=WeightsConfig(features="colours"))
    key = ("extractor", "colours", config.weights.inception, config.resize)
    return Context(
        config=config, training=lambda: Train(train), out=out,  # type: ignore[arg-type,return-value]
        shared={key: Colours()},
    )  # fmt: skip


def feed(
    here: Context, row: RowName, images: Images, batch_size: int = 8, **item: Any
) -> Memorisation:
    metric = Memorisation(replace(here, row=row))
    for start in range(0, len(images), batch_size):
        numbers = range(start, min(start + batch_size, len(images)))
        items = [Item(position=n, key=f"{n}.png", **item) for n in numbers]
        metric.update(Batch(images=images[start : start + batch_size], items=items))
    metric.gather(Group())
    return metric


def test_planted_copies_come_first_and_flat_pictures_do_not(tmp_path: Path) -> None:
    train = np.concatenate([noise(NUM_TRAIN, 0), flat(20, 1)])
    here = context(train, tmp_path)
    held_out = feed(here, "reconstruction", np.concatenate([noise(80, 2), flat(80, 3)]))
    copied = [3, 17, 42]
    samples = np.concatenate([near(train[copied], 4), noise(30, 5), flat(30, 6)])
    metric = feed(here, "samples", samples, captions=("a prompt",))
    figures = metric.compute()
    pairs = metric.details()["pairs"]
    assert {p["position"] for p in pairs[:3]} == {0, 1, 2}
    assert {p["train_key"] for p in pairs[:3]} == {f"train-{n}" for n in copied}
    assert pairs[2]["ratio"] < 0.3 < pairs[3]["ratio"]
    # Flat pictures are as close to flat training images as these to each other.
    assert np.mean([metric.values[p]["memorisation/ratio"] for p in range(33, 63)]) > 0.5
    assert 3 / 63 <= figures["memorisation/tail"] <= 6 / 63
    assert held_out.compute().keys() == {"memorisation/ratio"}
    assert len(pairs) == NUM_PAIRS


def test_held_out_images_look_like_held_out_images() -> None:
    here = context(noise(NUM_TRAIN, 0))
    feed(here, "reconstruction", noise(100, 1))
    figures = feed(here, "samples", noise(100, 2)).compute()
    assert figures["memorisation/closer"] == pytest.approx(0.5, abs=0.12)
    assert figures["memorisation/tail"] < 0.05


def test_repeated_training_images_are_found_by_their_copies() -> None:
    train = noise(NUM_TRAIN, 0)
    train[: NUM_NEIGHBOURS + 5] = train[0]
    metric = feed(context(train), "samples", near(train[:1], 1))
    assert metric.compute()["memorisation/ratio"] < 0.3


def test_an_exact_copy_has_ratio_zero() -> None:
    train = noise(NUM_TRAIN, 0)
    numbers, ratios = Bank(Colours().extract(train)).nearest(Colours().extract(train[5:7]))
    assert numbers.tolist() == [5, 6] and ratios.max() < 1e-6


def test_ratio_is_distance_over_the_neighbours_own_mean_distance() -> None:
    angles = np.array([0.0, 0.1, 0.3, 1.0])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    query = np.array([[np.cos(0.15), np.sin(0.15)]], np.float32)
    number, ratio = Bank(rows).nearest(7 * query)

    def chord(angle: float) -> float:
        return float(2 * np.sin(angle / 2))

    assert number.tolist() == [1]
    expected = chord(0.05) / np.mean([chord(0.1), chord(0.2), chord(0.9)])
    assert ratio[0] == pytest.approx(expected, rel=1e-4)


def test_figures_do_not_depend_on_batches_or_processes(tmp_path: Path) -> None:
    train, samples = noise(NUM_TRAIN, 0), noise(20, 1)
    whole = feed(context(train, tmp_path), "samples", samples)
    here = context(train)
    parts = [Memorisation(here) for _ in range(2)]
    for rank, part in enumerate(parts):
        for n in range(rank, 20, 2):
            item = Item(position=n, key=f"{n}.png")
            part.update(Batch(images=samples[[n]], items=[item]))

    class Two(Group):
        def gather(self, value: Any) -> list[Any]:
            kind = 0 if isinstance(value, dict) else 1
            return [(part.values, (part._groups, part._pairs))[kind] for part in parts]

    merged = Memorisation(replace(here, out=tmp_path))
    merged.gather(Two())
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-5)
    found, expected = merged.details(), whole.details()
    assert [p["position"] for p in found["pairs"]] == [p["position"] for p in expected["pairs"]]


def test_pairs_are_written_as_pictures(tmp_path: Path) -> None:
    train = noise(NUM_TRAIN, 0)
    leftover = tmp_path / "memorisation" / "samples-99.png"
    leftover.parent.mkdir()
    leftover.write_bytes(b"")
    metric = feed(context(train, tmp_path), "samples", train[:3])
    metric.compute()
    details = json.loads(json.dumps(metric.details()))
    files = [pair["file"] for pair in details["pairs"]]
    assert sorted(p.name for p in leftover.parent.iterdir()) == [Path(f).name for f in files]
    first = details["pairs"][0]
    pixels = np.asarray(Image.open(tmp_path / first["file"]))
    assert pixels.shape == (SIDE, 2 * SIDE, 3)
    np.testing.assert_array_equal(pixels[:, :SIDE], pixels[:, SIDE:])
    assert first["train_caption"] == f"caption {first['position']}"
    assert (details["num_train_images"], details["num_train_records"]) == (NUM_TRAIN, 1000)


def test_further_groups_are_compared_with_held_out_images() -> None:
    train = noise(NUM_TRAIN, 0)
    here = context(train)
    main = feed(here, "samples", noise(10, 1), group="single")
    feed(here, "reconstruction", noise(50, 2))
    parts = extra_items([Item(position=0, key="0", captions=("x",))] * 4, Train(train), 4.0)  # type: ignore[arg-type]
    assert {item.group for item in parts[4.0]} == {"train_prompts@g4"}
    assert {item.group for item in parts[1.0]} == {"train_prompts@g1", "prompts@g1"}
    items = [item for part in parts.values() for item in part]
    assert len({item.position for item in items}) == len(items)
    # The training captions draw their own images; the other prompts draw something new.
    numbers = [int(i.key.removeprefix("train-")) if "-" in i.key else None for i in items]
    images = np.stack([noise(1, 3)[0] if n is None else train[n] for n in numbers])
    extra = Memorisation(replace(here, row="memorisation"))
    extra.update(Batch(images=images, items=items))
    extra.gather(Group())
    assert extra.compute() == {}
    main.compute()
    groups = main.details()["groups"]
    assert groups.keys() == {
        "single", "held_out", "train_prompts@g4", "train_prompts@g1", "prompts@g1",
    }  # fmt: skip
    assert groups["train_prompts@g1"]["own_image"] == 1
    assert groups["train_prompts@g1"]["tail"] == groups["train_prompts@g1"]["closer"] == 1
    assert groups["single"]["own_image"] == 0
    assert sum(groups["held_out"]["histogram"]) == groups["held_out"]["num"] == 50
    assert [*extra_items([Item(position=0, key="0", captions=("x",))], Train(train), 1.0)] == [1.0]  # type: ignore[arg-type]


def test_place_among_held_out_images() -> None:
    held_out = np.arange(1.0, 101.0)
    assert against(0.5, held_out) == {"memorisation/closer": 1, "memorisation/tail": 1}
    assert against(50.5, held_out) == {"memorisation/closer": 0.5, "memorisation/tail": 0}
    assert against(200, held_out)["memorisation/closer"] == 0


@pytest.mark.parametrize("num", [1, 4])
def test_a_training_set_of_one_image_is_refused(num: int) -> None:
    with pytest.raises(ValueError, match="training images, all the same; expected at least two"):
        Bank(np.ones((num, 5), np.float32))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_shards(tmp_path_factory.mktemp("train") / "set", sizes=(6, 3))


def test_training_images_are_decoded_from_the_shards(shards: Path) -> None:
    vae = load_vae(tiny.encoders().vae)
    training = TrainingSet([shards], vae)
    assert (len(training), training.num_records) == (9, 9)
    numbers, images = zip(*training.batches(), strict=True)
    assert np.concatenate(numbers).tolist() == list(range(9))
    assert images[0].shape == (9, 64, 64, 3) and images[0].dtype == np.uint8
    # Batches of another size may differ in rounding.
    np.testing.assert_allclose(training.image(7), images[0][7].astype(float), atol=1)
    part = TrainingSet([shards], vae, most=4)
    chosen = choose(9, 4)
    assert [part.key(n) for n in range(4)] == [training.key(n) for n in chosen.tolist()]
    np.testing.assert_array_equal(part.image(2), training.image(int(chosen[2])))
    assert training.caption(1) == "caption 0 of 1"
    assert len(TrainingSet([shards, shards], vae)) == 18
    # Another VAE, as a bundle with half of the digits has, is not used.
    other = load_vae(tiny.encoders().vae)
    torch.nn.init.zeros_(other.post_quant_conv.weight)
    np.testing.assert_array_equal(TrainingSet([shards], other).image(7), training.image(7))


def test_an_unavailable_vae_is_reported_before_anything_is_drawn(
    shards: Path, tmp_path: Path
) -> None:
    manifest = Manifest.load(shards)
    moved = tmp_path / "set"
    moved.mkdir()
    for path in shards.iterdir():
        (moved / path.name).symlink_to(path)
    (moved / "manifest.json").unlink()
    gone = replace(manifest, vae=replace(manifest.vae, name=str(tmp_path / "gone")))
    (moved / "manifest.json").write_text(gone.dump())
    here = replace(context(noise(2, 0)), training=lambda: TrainingSet([moved]))
    with pytest.raises(MissingWeights, match="the VAE that encoded them is not available: --vae"):
        Memorisation(here)
    assert metric_class("memorisation") is Memorisation
    with pytest.raises(ValueError, match=r"manifest\.json"):
        TrainingSet([tmp_path])


def test_the_command_compares_with_the_shards(shards: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    evaluate(EvaluationConfig(
        name="x", bundle=str(bundle), out=str(tmp_path / "out"), train_shards=(str(shards),),
        metrics=("memorisation",), num_prompts=2, num_steps=1, guidance_scales=(4.0,),
    ))  # fmt: skip
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["rows"]["samples"].keys() == {
        "memorisation/ratio", "memorisation/closer", "memorisation/tail",
    }  # fmt: skip
    details = found["details"]["memorisation"]["samples"]
    assert details["groups"].keys() == {
        "single", "pair", "held_out", "train_prompts@g4", "train_prompts@g1", "prompts@g1",
    }  # fmt: skip
    assert all((tmp_path / "out" / pair["file"]).is_file() for pair in details["pairs"])
