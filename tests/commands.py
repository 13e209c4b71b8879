"""The preset sections of the four commands, with their settings."""

from typing import Any

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.sample.config import SampleConfig
from latent_t2i.train.config import TrainConfig

COMMANDS: dict[str, type[Any]] = {
    "pipeline": PipelineConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluation": EvaluationConfig,
}
