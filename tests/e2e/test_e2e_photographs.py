"""The whole way on real photographs with the embedded encoders: image files in, pictures out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.paths import ROOT
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.stage import build
from latent_t2i.sample.config import SampleConfig
from latent_t2i.sample.pictures import sample
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.loop import train
from tests.shard_sets import read_stock

ENCODERS = ROOT / "scenes" / "encoders"
DENOISER = DenoiserConfig(
    channels=(16, 16), layers_per_block=1, attention=(True, True), norm_num_groups=8
)


@pytest.mark.parametrize("size_px", [64, 128])
def test_photographs_to_pictures(coco_mini: Path, tmp_path: Path, size_px: int) -> None:
    told = coco_mini / "annotations" / "captions_val2017.json"
    shards = tmp_path / "shards"
    build(
        PipelineConfig(
            name="photographs",
            split="val",
            vae=str(ENCODERS / "vae"),
            text_encoder=str(ENCODERS / "clip"),
            image_size_px=size_px,
            source=SourceConfig(images=str(coco_mini / "val2017"), captions=str(told)),
            out=str(shards),
        )
    )
    check_with_stock_webdataset(shards, told, size_px)
    bundle = train(
        TrainConfig(
            name="photographs",
            shards=str(shards),
            out=str(tmp_path / "run"),
            batch_size=8,
            num_steps=3,
            mixed_precision="no",
            model=DENOISER,
        )
    )
    grid = sample(
        SampleConfig(
            bundle=str(bundle),
            prompts=("a man on a horse",),
            num_steps=2,
            out=str(tmp_path / "out"),
        )
    )
    assert grid.is_file()
    with Image.open(tmp_path / "out" / "samples" / "0000.png") as picture:
        assert picture.size == (size_px, size_px)
        assert np.asarray(picture).std() > 0


def check_with_stock_webdataset(shards: Path, told: Path, size_px: int) -> None:
    """Every caption of every image is there, and each has its states."""
    wanted: dict[str, list[str]] = {}
    for annotation in json.loads(told.read_text())["annotations"]:
        wanted.setdefault(f"{annotation['image_id']:012d}", []).append(annotation["caption"])
    found = {}
    for record in read_stock(shards):
        captions = record["json"]["captions"]
        assert record["latent.npy"].shape == (1, 16, size_px // 8, size_px // 8)
        assert record["text.npy"].shape == (len(captions), 77, 128)
        assert np.isfinite(record["text.npy"].astype(np.float32)).all()
        found[record["__key__"]] = captions
    assert {key: sorted(text.strip() for text in texts) for key, texts in found.items()} == {
        key: sorted(text.strip() for text in texts) for key, texts in wanted.items()
    }
