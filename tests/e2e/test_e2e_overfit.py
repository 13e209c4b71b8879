"""Overfitting: a model trained on eight scenes reproduces them from their captions."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.ema import EMAConfig
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.stage import build
from latent_t2i.sample import sampler
from latent_t2i.scenes import oracle
from latent_t2i.scenes.captions import captions
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import WORLDS, Scene, stream
from latent_t2i.train.config import OptimConfig, TrainConfig
from latent_t2i.train.loop import train

ENCODERS = {"vae": "scenes/encoders/vae", "text_encoder": "scenes/encoders/clip"}
NUM_SCENES = 8
MIN_PSNR_DB = 18.0


def write_scenes(folder: Path) -> list[tuple[Scene, str, np.ndarray]]:
    """Writes scenes with one caption each as a folder source; returns scene, caption and image."""
    world = WORLDS["easy"]
    chosen = [
        (scene, captions(scene, world, rng)[0].text)
        for scene, rng in itertools.islice(stream(world, "train", 0), NUM_SCENES)
    ]
    assert len({text for _, text in chosen}) == NUM_SCENES
    images = render([scene for scene, _ in chosen])
    folder.mkdir()
    lines = []
    for number, (image, (_, text)) in enumerate(zip(images, chosen, strict=True)):
        Image.fromarray(image).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return [(*each, image) for each, image in zip(chosen, images, strict=True)]


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(10 * np.log10(255**2 / error))


def settings(shards: Path, out: Path) -> TrainConfig:
    """A small denoiser that overfits within 500 steps.

    300 steps of 16 take as long, but left tints in one scene's background that the oracle may take
    for an object.
    """
    return TrainConfig(
        name="overfit",
        shards=(str(shards),),
        out=str(out),
        batch_size=8,
        num_steps=500,
        mixed_precision="no",
        log_every_steps=100,
        checkpoint_every_steps=1000,
        model=DenoiserConfig(
            channels=(64, 64),
            attention=(True, True),
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=16,
        ),
        objective=ObjectiveConfig(prediction="v", caption_dropout=0.0),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=20, schedule="cosine"),
        ema=EMAConfig(decay=0.95),
        **ENCODERS,
    )


@pytest.mark.slow
def test_eight_scenes_are_reproduced(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "images")
    source = SourceConfig(kind="folder", images=str(tmp_path / "images"))
    shards = tmp_path / "shards"
    build(PipelineConfig(name="overfit", source=source, max_tokens=24, out=str(shards), **ENCODERS))
    AcceleratorState._reset_state(True)
    bundle = train(settings(shards, tmp_path / "run"))
    samples = sampler.draw(
        sampler.load(bundle, device="cpu"),
        [text for _, text, _ in scenes],
        list(range(NUM_SCENES)),
        guidance_scale=1.0,
        num_steps=20,
    )
    images = np.stack([np.asarray(image) for image in samples])
    detections = oracle.detect(images)
    for (scene, text, true), image, detected in zip(scenes, images, detections, strict=True):
        assert psnr_db(image, true) > MIN_PSNR_DB, text
        checks = oracle.check(scene, detected)
        assert checks["all"], (text, checks)
