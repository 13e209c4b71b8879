"""The whole pipeline on real photographs with the embedded encoders."""

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
def test_photographs_to_samples(coco_mini: Path, tmp_path: Path, size_px: int) -> None:
    captions = coco_mini / "annotations" / "captions_val2017.json"
    shards = tmp_path / "shards"
    build(
        PipelineConfig(
            name="photographs",
            split="val",
            vae=str(ENCODERS / "vae"),
            text_encoder=str(ENCODERS / "clip"),
            image_size_px=size_px,
            source=SourceConfig(images=str(coco_mini / "val2017"), captions=str(captions)),
            out=str(shards),
        )
    )
    check_with_stock_webdataset(shards, captions, size_px)
    bundle = train(
        TrainConfig(
            name="photographs",
            shards=(str(shards),),
            out=str(tmp_path / "run"),
            batch_size=8,
            num_steps=3,
            mixed_precision="no",
            model=DENOISER,
        )
    )
    out = tmp_path / "out"
    prompts = ("a man on a horse",)
    grid = sample(SampleConfig(bundle=str(bundle), prompts=prompts, num_steps=2, out=str(out)))
    assert grid.is_file()
    with Image.open(out / "samples" / "000000.png") as image:
        assert image.size == (size_px, size_px)
        assert np.asarray(image).std() > 0


def check_with_stock_webdataset(shards: Path, captions: Path, size_px: int) -> None:
    """Checks that every image has all its captions, and every caption its states."""
    expected: dict[str, list[str]] = {}
    for annotation in json.loads(captions.read_text())["annotations"]:
        key = f"{annotation['image_id']:012d}"
        expected.setdefault(key, []).append(annotation["caption"].strip())
    found = {}
    for record in read_stock(shards):
        texts = record["json"]["captions"]
        assert record["latent.npy"].shape == (1, 16, size_px // 8, size_px // 8)
        assert record["text.npy"].shape == (len(texts), 77, 128)
        assert np.isfinite(record["text.npy"].astype(np.float32)).all()
        found[record["__key__"]] = sorted(text.strip() for text in texts)
    assert found == {key: sorted(texts) for key, texts in expected.items()}
