"""Evaluations in forked processes, as the launcher starts them."""

import os

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.evaluate import evaluate


def work(config: EvaluationConfig, rank: int, world_size: int, port: int) -> None:
    """Runs one process of an evaluation."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    evaluate(config)
