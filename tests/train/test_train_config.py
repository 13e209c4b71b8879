"""Invalid settings of training are refused by name."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from latent_t2i.configs import cli
from latent_t2i.configs.presets import PRESETS_DIR
from latent_t2i.train.config import (
    DataConfig,
    OptimConfig,
    PreviewConfig,
    TrainConfig,
    ValidationConfig,
)

SECTIONS = {
    "": TrainConfig,
    "optim.": OptimConfig,
    "data.": DataConfig,
    "validation.": ValidationConfig,
    "preview.": PreviewConfig,
}


def make(prefix: str, **changes: Any) -> Any:
    """Returns the settings of a section, `changes` applied."""
    needed = {"": {"name": "tiny", "num_steps": None if "num_epochs" in changes else 1}}
    return SECTIONS[prefix](**(needed.get(prefix, {}) | changes))


def settings_of(*kinds: type) -> list[tuple[str, str, type]]:
    """Returns section, name and type of every setting of these types, optional or not."""
    return [
        (prefix, field.name, kind)
        for prefix, section in SECTIONS.items()
        for field in fields(section)
        for kind in kinds
        if field.type is kind or kind in get_args(field.type)
    ]


@pytest.mark.parametrize(("prefix", "name", "kind"), settings_of(str))
def test_texts_are_not_empty(prefix: str, name: str, kind: type) -> None:
    if name == "prompts":
        assert make(prefix, prompts=("",)).prompts == ("",)  # the unconditional prompt
        return
    for value in ("", " "):
        with pytest.raises(ValueError, match=rf"^{prefix}{name}: expected a name or path, f"):
            make(prefix, **{name: value})


@pytest.mark.parametrize(("prefix", "name", "kind"), settings_of(int, float))
def test_numbers_are_finite_and_not_negative(prefix: str, name: str, kind: type) -> None:
    for value in (math.nan, math.inf, -1, *([1.5] if kind is int else [])):
        wrong = (value, 0.5) if name in ("betas", "weights") else value
        with pytest.raises(ValueError, match=rf"^{prefix}{name}: expected .*, found {value}$"):
            make(prefix, **{name: wrong})


@pytest.mark.parametrize(
    ("prefix", "change", "message"),
    [
        ("", {"num_steps": None}, "num_steps, num_epochs: expected exactly one of them"),
        ("", {"num_epochs": 1, "num_steps": 1}, "found num_steps=1 and num_epochs=1"),
        ("", {"num_steps": 0}, "num_steps: expected a whole number, 1 or more, found 0"),
        ("", {"batch_size": 0}, "batch_size: expected a whole number, 1 or more, found 0"),
        ("", {"max_train_s": 0}, "max_train_s: expected more than 0, found 0"),
        ("", {"seed": 2**63}, "seed: expected a whole number, 0 to .*, found 9223372036854775808"),
        ("", {"log_every_steps": 10**12}, "log_every_steps: expected .* 1 to 1000000, found"),
        ("", {"trackers": ()}, "trackers: expected auto, none, or a list .*, found nothing"),
        ("", {"trackers": ("auto", "wandb")}, "trackers: .* found auto wandb"),
        ("", {"trackers": ("wandb", "none")}, "trackers: .* found wandb none"),
        ("", {"trackers": ("wandb", "wandb")}, "trackers: .* found wandb wandb"),
        ("", {"init_allow": "partial"}, "init_allow: has no effect without init_from"),
        ("", {"model_from_init": True}, "model_from_init: has no effect without init_from"),
        ("optim.", {"learning_rate": 0.0}, "optim.learning_rate: expected more than 0, found 0.0"),
        ("optim.", {"betas": (0.9, 1.0)}, "optim.betas: expected 0 or more and less than 1"),
        ("data.", {"window_shards": 4}, "window_shards: has no effect with data.shuffle full;"),
        ("preview.", {"every_steps": 4}, "preview.prompts: expected prompts for .* found none"),
        ("preview.", {"guidance_scale": 0.5}, "guidance_scale: expected 1 or more, found 0.5"),
        ("preview.", {"seed": 2**63 - 1, "prompts": ("a", "b")}, "preview.seed: expected .* 0 to "),
    ],
)
def test_invalid_settings_are_refused(prefix: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(prefix, **change)


def test_a_flag_for_the_runs_length_replaces_the_presets() -> None:
    def parse(*argv: str) -> tuple[int | None, int | None]:
        config = cli.parse(TrainConfig, "train", argv)
        return config.num_steps, config.num_epochs

    assert parse("--config", "coco64") == (None, 4)
    assert parse("--config", "coco64", "--num-steps", "5") == (5, None)
    assert parse("--config", "demo", "--num-epochs", "2") == (None, 2)
    with pytest.raises(cli.ConfigError, match=r"expected (exactly )?one of them"):
        parse("--config", "coco64", "--num-steps", "5", "--num-epochs", "2")


@pytest.mark.parametrize("path", sorted(PRESETS_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_compile_where_they_use_channels_last(path: Path) -> None:
    """Without compilation, group normalisation converts every activation back."""
    config = cli.parse(TrainConfig, "train", ["--config", str(path)])
    assert config.compile or not config.channels_last


def test_the_presets_heads() -> None:
    """Flash attention pads heads to a width of 64; weights of Stable Diffusion 1 need eight."""
    large, tuned = (
        cli.parse(TrainConfig, "train", ["--config", name]) for name in ("coco512", "finetune-sd")
    )
    widths = zip(large.model.channels, large.model.heads, strict=True)
    assert {channels // heads for channels, heads in widths} == {64}
    assert not large.gradient_checkpointing
    assert (tuned.model.attention_head_dim, tuned.model.heads) == (8, ())
