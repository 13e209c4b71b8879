"""Sets with several crops per image and further fields, from images to stock webdataset."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latent_t2i.pipeline import contact_sheet, stage
from latent_t2i.pipeline.config import PipelineConfig, ViewsConfig
from latent_t2i.pipeline.images import Preprocessing, crop_boxes
from latent_t2i.pipeline.producers import registry
from latent_t2i.pipeline.producers.producer import Captions, Size
from latent_t2i.shards.access import Access, make_loader, open_set
from latent_t2i.shards.layout import Per
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example, FieldSpec, Identity, Manifest
from latent_t2i.shards.settings import ReadMode
from latent_t2i.shards.verify import verify
from latent_t2i.shards.writer import ShardWriter
from tests import tiny
from tests.coco_folders import CocoFolder, make_coco
from tests.shard_sets import collect, read_stock, run_main
from tests.stage_one import build_one, contents, make_config

NUM_VIEWS = 6
IDENTITY = nn.Identity()


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoFolder:
    return make_coco(tmp_path_factory.mktemp("coco"), [2, 2, 3, 2, 2])


def views_config(coco: CocoFolder, out: Path, **changes: Any) -> PipelineConfig:
    """Returns the settings of a set with three crops, flips and CLIP's embeddings."""
    values: dict[str, Any] = {
        "views": ViewsConfig(flip=True, crops=3),
        "producers": (f"clip_image={tiny.vision_folder('clip_image')}",),
        "text_dtype": "int8",
        "records_per_shard": 4,
    }
    return make_config(coco, out, **(values | changes))


@pytest.fixture(scope="module")
def built(coco: CocoFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with int8 text and two shards."""
    out = tmp_path_factory.mktemp("built") / "set"
    stage.build(views_config(coco, out))
    return out


def test_three_crops_round_trip_through_stock_webdataset(built: Path) -> None:
    manifest = Manifest.load(built)
    assert list(verify(built)) == []
    assert manifest.num_views == NUM_VIEWS
    fields = {spec.name: (spec.dtype, spec.shape, spec.per) for spec in manifest.fields}
    assert fields == {
        "view_box": ("int32", (6,), "view"),
        "clip_image": ("float16", (16,), "view"),
    }
    samples = read_stock(built)
    assert len(samples) == 5
    for sample in samples:
        latents, boxes = sample["latent.npy"], sample["view_box.npy"]
        assert latents.shape == (NUM_VIEWS, 8, 8, 8) and boxes.shape == (NUM_VIEWS, 6)
        assert sample["clip_image.npy"].shape == (NUM_VIEWS, 16)
        assert sample["text.npy"].dtype == np.int8
        assert np.array_equal(boxes[::2], boxes[1::2])  # a crop and the flipped crop
        assert len({latent.tobytes() for latent in latents}) == NUM_VIEWS
        check_boxes(sample["__key__"], sample["json"], boxes[::2])


def check_boxes(key: str, meta: dict[str, Any], boxes: Any) -> None:
    """Compares boxes with those of the crops, and checks that they lie in the image."""
    size = tuple(meta["source_size_px"])
    assert (boxes[:, 4:] == size).all()
    crops = crop_boxes(size, Preprocessing(size_px=(64, 64), crops=3), key)
    assert np.abs(boxes[:, :2] - np.array(crops)[:, :2]).max() <= 0.51
    assert np.abs(boxes[:, :2] + boxes[:, 2:4] - np.array(crops)[:, 2:]).max() <= 0.51
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:4] <= size).all()
    left, top, right, bottom = meta["crop_px"]
    assert boxes[0, :4].tolist() == [left, top, right - left, bottom - top]


def test_the_first_crop_is_that_of_a_set_with_one(
    built: Path, coco: CocoFolder, tmp_path: Path
) -> None:
    stage.build(views_config(coco, tmp_path / "set", views=ViewsConfig(flip=True), producers=()))
    for three, one in zip(read_stock(built), read_stock(tmp_path / "set"), strict=True):
        assert three["latent.npy"][:2].tobytes() == one["latent.npy"].tobytes()
        assert three["text.npy"].tobytes() == one["text.npy"].tobytes()
        assert three["json"] == one["json"] and "view_box.npy" not in one


@pytest.mark.parametrize("read", ["map", "pread"])
def test_fields_of_a_batch_belong_to_the_same_view(built: Path, read: ReadMode) -> None:
    stored = {sample["__key__"]: sample for sample in read_stock(built)}
    names = ("latent", "text", "view_box", "clip_image")
    shards = open_shards(built, fields=names, read=read)
    records = np.arange(len(shards))
    for view in range(NUM_VIEWS):
        u = np.full(len(records), view / NUM_VIEWS + 0.01)
        batch = shards.gather(records, u * 0, u)
        assert [*batch.extra] == ["view_box", "clip_image"]
        for position, key in enumerate(shards.keys(records)):
            for name in ("latent", "view_box", "clip_image"):
                item = batch.gathered[name][position].numpy()
                assert np.array_equal(item, stored[key][f"{name}.npy"][view])


def test_stream_access_delivers_all_views(built: Path) -> None:
    stored = {sample["__key__"]: sample["latent.npy"] for sample in read_stock(built)}
    access = Access(kind="stream")
    streamed = open_set(str(built), access)
    order = streamed.order(batch_size=5, seed=0)
    loader = make_loader(streamed, order, rank=0, num_processes=1, access=access)
    views = [latent.numpy().tobytes() for batch in collect(loader, 0, 9) for latent in batch.latent]
    assert {*views} < {view.tobytes() for latent in stored.values() for view in latent}
    assert len({*views}) > 20  # of 30


def test_crops_in_buckets(tmp_path: Path) -> None:
    wide = make_coco(tmp_path / "coco", [2, 2, 2])
    for number in (2, 3):
        path = wide.images / f"{number:012d}.png"
        Image.open(path).resize((140, 70)).save(path)
    out = tmp_path / "set"
    config = views_config(wide, out, buckets=True, bucket_multiple_px=16)
    manifests = stage.build(config)
    assert [*manifests] == ["64x64", "80x48"] and list(verify(out)) == []
    for name, manifest in manifests.items():
        assert manifest.num_views == NUM_VIEWS
        assert [spec.name for spec in manifest.fields] == ["view_box", "clip_image"]
        width, height = map(int, name.split("x"))
        for sample in read_stock(out / name):
            boxes = sample["view_box.npy"]
            assert boxes[:, 2] / boxes[:, 3] == pytest.approx(width / height, rel=0.05)


def test_a_set_that_was_interrupted_ends_with_the_same_bytes(
    built: Path, coco: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = views_config(coco, tmp_path / "set")
    with monkeypatch.context() as patch:
        write, numbers = ShardWriter.write, itertools.count()

        def stop(writer: ShardWriter, example: Example) -> None:
            if next(numbers) == 4:
                raise KeyboardInterrupt
            write(writer, example)

        patch.setattr(ShardWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.build(config)
    assert list((tmp_path / "set").glob("*.tar"))
    for change, message in (
        ({"views": ViewsConfig(flip=True, crops=2)}, "views: found 6, expected 4"),
        ({"producers": (f"clip_image={tiny.encoders().clip}",)}, "clip_image"),
    ):
        with pytest.raises(ValueError, match=message):
            stage.build(replace(config, **change))
    stage.build(config)
    assert contents(tmp_path / "set") == contents(built)


def test_the_contact_sheet_shows_any_view(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sheets = [tmp_path / f"{view}.png" for view in (0, 5)]
    for view, sheet in zip((0, 5), sheets, strict=True):
        flags = ["--view", str(view), "--out", sheet]
        assert run_main(contact_sheet, monkeypatch, built, *flags) == 0
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    capsys.readouterr()
    assert run_main(contact_sheet, monkeypatch, built, "--view", "6") == 2
    assert capsys.readouterr().err == "error: --view: expected 0 to 5, found 6\n"


@dataclass(frozen=True)
class Mean:
    """A producer of views: each channel's mean."""

    per: ClassVar[Per] = "view"
    network: nn.Module = IDENTITY

    def fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        maker = Identity(name="mean", revision=None, sha256="0" * 64)
        return (FieldSpec(name="mean", dtype="float32", shape=(3,), per="view", made_by=maker),)

    def encode(self, batch: Tensor) -> tuple[Tensor]:
        return (batch.mean((2, 3)),)


@dataclass(frozen=True)
class Lengths:
    """A producer of captions: characters and tokens."""

    per: ClassVar[Per] = "caption"
    network: nn.Module = IDENTITY

    def fields(self, size_px: Size) -> tuple[FieldSpec, ...]:
        maker = Identity(name="lengths", revision=None, sha256="1" * 64)
        return (FieldSpec(name="lengths", dtype="int32", shape=(2,), per="caption", made_by=maker),)

    def encode(self, batch: Captions) -> tuple[Tensor]:
        return (torch.tensor([[len(caption), len(ids)] for caption, ids in batch.items()]),)


def test_another_producer_is_a_class_and_a_line(
    coco: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.FURTHER, "mean", lambda name, revision: Mean())
    monkeypatch.setitem(registry.FURTHER, "lengths", lambda name, revision: Lengths())
    producers = ("lengths=x", "mean=x")
    build_one(make_config(coco, tmp_path / "set", producers=producers, text_dtype="int8"))
    assert list(verify(tmp_path / "set")) == []
    for sample in read_stock(tmp_path / "set"):
        assert sample["mean.npy"].shape == (1, 3) and abs(sample["mean.npy"]).max() < 0.1
        expected = [len(caption) for caption in sample["json"]["captions"]]
        assert sample["lengths.npy"][:, 0].tolist() == expected


def test_a_field_that_is_not_finite_quarantines_its_record(
    coco: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiled(Mean):
        def encode(self, batch: Tensor) -> tuple[Tensor]:
            (means,) = super().encode(batch)
            means[0, 1] = torch.inf
            return (means,)

    monkeypatch.setitem(registry.FURTHER, "mean", lambda name, revision: Spoiled())
    config = make_config(coco, tmp_path / "set", producers=("mean=x",), max_quarantined=1.0)
    manifest = build_one(config)
    reasons = manifest.read_quarantined()
    assert {*reasons.values()} == {"mean is not finite in float32"}
    assert (len(reasons), manifest.num_records) == (3, 2)  # the first of each shard


def test_repeated_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = make_coco(tmp_path / "coco", [2, 2, 3])
    copy = coco.images / "000000000003.png"
    copy.write_bytes((coco.images / "000000000001.png").read_bytes())
    build_one(make_config(coco, tmp_path / "set"))
    lines = capsys.readouterr().out.splitlines()
    assert "duplicate   000000000003 = 000000000001" in lines
    assert "duplicates  1 record repeats the image of another" in lines
