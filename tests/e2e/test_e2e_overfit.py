"""The objective at work: eight scenes learned by heart come back from their captions."""

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
    """Draws scenes with a caption each, as a folder source has them."""
    world = WORLDS["easy"]
    chosen = [
        (scene, captions(scene, world, rng)[0].text)
        for scene, rng in itertools.islice(stream(world, "train", 0), NUM_SCENES)
    ]
    assert len({text for _, text in chosen}) == NUM_SCENES
    pictures = render([scene for scene, _ in chosen])
    folder.mkdir()
    lines = []
    for number, (picture, (_, text)) in enumerate(zip(pictures, chosen, strict=True)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return [(*each, picture) for each, picture in zip(chosen, pictures, strict=True)]


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal to noise of two pictures of bytes."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(10 * np.log10(255**2 / error))


def settings(shards: Path, out: Path) -> TrainConfig:
    """A small denoiser with a fast memory."""
    return TrainConfig(
        name="overfit",
        shards=str(shards),
        out=str(out),
        batch_size=16,
        num_steps=300,
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
def test_eight_scenes_are_learned_by_heart(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "pictures")
    source = SourceConfig(kind="folder", images=str(tmp_path / "pictures"))
    shards = tmp_path / "shards"
    build(PipelineConfig(name="overfit", source=source, max_tokens=24, out=str(shards), **ENCODERS))
    AcceleratorState._reset_state(True)
    bundle = train(settings(shards, tmp_path / "run"))
    drawn = sampler.draw(
        sampler.load(bundle, device="cpu"),
        [text for _, text, _ in scenes],
        list(range(NUM_SCENES)),
        guidance_scale=1.0,
        num_steps=20,
    )
    pictures = np.stack([np.asarray(image) for image in drawn])
    readings = oracle.detect(pictures)
    for (scene, text, wanted), picture, reading in zip(scenes, pictures, readings, strict=True):
        assert psnr_db(picture, wanted) > MIN_PSNR_DB, text
        verdict = oracle.check(scene, reading)
        assert verdict["all"], (text, verdict)
