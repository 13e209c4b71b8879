"""Shards of noise and a small run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.ema import EMAConfig
from latent_t2i.train.config import TrainConfig
from tests import tiny

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 records of noise in three shards."""
    return tiny.make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture
def make_config(tmp_path: Path, shards: Path) -> MakeConfig:
    """Makes the settings of a run of ten small steps; keywords change them."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "shards": str(shards),
            "out": str(tmp_path / "run"),
            "batch_size": 4,
            "num_steps": 10,
            "mixed_precision": "no",
            "log_every_steps": 4,
            "trackers": ("none",),
            "checkpoint_every_steps": 3,
            "ema": EMAConfig(decay=0.9),
            "model": DenoiserConfig(
                channels=(8,),
                attention=(True,),
                layers_per_block=1,
                attention_head_dim=2,
                norm_num_groups=4,
            ),
        }
        return TrainConfig(**(values | changes))

    return make
