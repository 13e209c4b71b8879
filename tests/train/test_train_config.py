"""Invalid settings of training are refused by name."""

from typing import Any

import pytest

from latent_t2i.train.config import OptimConfig, PreviewConfig, TrainConfig, ValidationConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": None}, "num_steps, num_epochs: expected exactly one of them"),
        ({"num_epochs": 1}, "expected exactly one of them, found num_steps=1 and num_epochs=1"),
        ({"num_steps": 0}, "num_steps: expected more than 0, found 0"),
        ({"batch_size": -8}, "batch_size: expected more than 0, found -8"),
        ({"seed": -1}, "seed: expected 0 or more, found -1"),
        ({"trackers": ()}, "trackers: expected auto, none, or a list .*, found nothing"),
        ({"trackers": ("auto", "wandb")}, "trackers: .* found auto wandb"),
        ({"trackers": ("wandb", "none")}, "trackers: .* found wandb none"),
        ({"trackers": ("wandb", "wandb")}, "trackers: .* found wandb wandb"),
        ({"init_allow": "partial"}, "init_allow: has no effect without init_from"),
        ({"model_from_init": True}, "model_from_init: has no effect without init_from"),
    ],
)
def test_invalid_settings_of_a_run_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"name": "tiny", "num_steps": 1} | change))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (OptimConfig, {"learning_rate": -1e-4}, "learning_rate: expected more than 0, found -0.0"),
        (OptimConfig, {"max_grad_norm": 0.0}, "optim.max_grad_norm: expected more than 0, found 0"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "optim.betas: expected 0 <= beta < 1"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps: expected 0 or more, found -1"),
        (ValidationConfig, {"every_steps": 0}, "on.every_steps: expected 1 or more, found 0"),
        (ValidationConfig, {"num_examples": 0}, "num_examples: expected 1 or more, found 0"),
        (ValidationConfig, {"batch_size": 0}, "validation.batch_size: expected 1 or more, found 0"),
        (PreviewConfig, {"every_steps": 0}, "preview.every_steps: expected 1 or more, found 0"),
        (PreviewConfig, {"every_steps": 4}, "preview.prompts: expected prompts for .* found none"),
        (PreviewConfig, {"num_steps": 0}, "preview.num_steps: expected 1 or more, found 0"),
        (PreviewConfig, {"guidance_scale": 0.5}, "guidance_scale: expected 1 or more, found 0.5"),
        (PreviewConfig, {"seed": -1}, "preview.seed: expected 0 or more, found -1"),
    ],
)
def test_invalid_settings_of_a_section_are_refused(
    section: type[Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        section(**change)
