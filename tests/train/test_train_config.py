"""Settings that cannot be right are refused at once, by name."""

from typing import Any

import pytest

from latent_t2i.train.config import OptimConfig, TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "num_steps, num_epochs: give exactly one, found num_steps=None and num_epochs=None"),
        ({"num_steps": 1, "num_epochs": 1}, "give exactly one, found num_steps=1"),
        ({"num_steps": 0}, "num_steps: expected more than 0, found 0"),
        ({"num_steps": 1, "batch_size": -8}, "batch_size: expected more than 0, found -8"),
        ({"num_steps": 1, "seed": -1}, "seed: expected 0 or more, found -1"),
    ],
)
def test_a_run_needs_one_length_and_counts_that_count(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(name="tiny", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1e-4}, "optim.learning_rate: expected more than 0, found -0.0001"),
        ({"max_grad_norm": 0.0}, "optim.max_grad_norm: expected above 0, found 0.0"),
        ({"betas": (0.9, 1.0)}, "optim.betas: expected 0 <= beta < 1"),
        ({"warmup_steps": -1}, "optim.warmup_steps: expected 0 or more, found -1"),
    ],
)
def test_an_impossible_optimizer_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)
