"""The four commands by their preset sections, with the settings each takes."""

from typing import Any

from evaluation.config import EvaluationConfig
from pipeline.config import PipelineConfig
from sample.config import SampleConfig
from train.config import TrainConfig

COMMANDS: dict[str, type[Any]] = {
    "pipeline": PipelineConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluation": EvaluationConfig,
}
