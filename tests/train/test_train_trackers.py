"""Trackers: which are chosen, what they receive, and how a resumed run continues their logs."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from latent_t2i.train import trackers
from latent_t2i.train.config import PreviewConfig
from latent_t2i.train.loop import train
from latent_t2i.train.trackers import choose, flatten, keep_id
from tests.train.conftest import MakeConfig
from tests.train.test_train_loop import metrics


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns what TensorBoard shows of a run: steps and values by tag, 0.0 for images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tracker" / "latent-t2i"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    } | {
        tag: [(event.step, 0.0) for event in events.Images(tag)] for tag in events.Tags()["images"]
    }


def missing(*names: str) -> dict[str, Callable[[], bool]]:
    """Returns AVAILABLE of a machine without these trackers."""
    return {name: (lambda name=name: name not in names) for name in trackers.AVAILABLE}


def test_tensorboard_receives_the_lines_also_after_resuming(make_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    preview = PreviewConfig(every_steps=4, prompts=("red",), num_steps=1)
    config = make_config(trackers=("tensorboard",), num_steps=8, preview=preview)
    folder = Path(str(config.out))
    train(config)
    train(replace(config, num_steps=16))
    found = scalars(folder)
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    expected = [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert found["train/loss"] == expected
    for tag in ("time_breakdown/data", "images_per_s", "skipped", "lr"):
        assert len(found[f"train/{tag}"]) == 4
    assert [step for step, _ in found["previews"]] == [4, 8, 12, 16]
    assert [path.name for path in (folder / "tracker").iterdir() if path.is_dir()] == ["latent-t2i"]


def test_what_a_killed_run_logged_after_its_checkpoint_is_hidden(make_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    config = make_config(trackers=("tensorboard",), log_every_steps=1, keep_checkpoints=9)
    folder = Path(str(config.out))
    train(config)
    for name in ("step-00000010", "step-00000009"):
        (folder / "checkpoints" / name).rename(folder / name)
    train(config)  # from step 6
    steps = [step for step, _ in scalars(folder)["train/loss"]]
    assert steps == list(range(1, 11))


def test_auto_is_tensorboard_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "AVAILABLE", missing())
    assert choose(("auto",)) == (["tensorboard"], [])
    assert choose(("wandb", "trackio")) == (["wandb", "trackio"], [])
    monkeypatch.setattr(trackers, "AVAILABLE", missing("tensorboard"))
    chosen, (note,) = choose(("auto",))
    assert chosen == []
    assert note.startswith("trackers: none, because tensorboard is not installed")
    assert choose(("none",)) == ([], [])


def test_a_tracker_that_is_not_installed_is_refused_before_the_run_starts(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "AVAILABLE", missing("wandb"))
    monkeypatch.setattr("latent_t2i.train.setup.validate", lambda *args: pytest.fail("started"))
    with pytest.raises(ValueError, match="wandb is not installed; run pip install 'wandb'"):
        train(make_config(trackers=("tensorboard", "wandb")))


def test_wandb_continues_the_run_of_the_folder(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Accelerate's tracker, with a fake wandb module that records the calls."""
    opened: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, Any]]] = []
    settings: dict[str, Any] = {}

    def log(values: dict[str, Any], step: int) -> None:
        logged.append((step, values))

    def init(**options: Any) -> Any:
        opened.append(options)
        return SimpleNamespace(log=log, finish=lambda: None)

    config_of = SimpleNamespace(update=lambda values, allow_val_change: settings.update(values))
    fake = SimpleNamespace(init=init, config=config_of)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "AVAILABLE", missing())
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    config = make_config(trackers=("wandb",), num_steps=4)
    train(config)
    train(replace(config, num_steps=8))
    assert [step for step, _ in logged] == [4, 8]
    assert logged[0][1]["train/loss"] == metrics(config.out)[0]["loss"]
    first, second = opened
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("latent-t2i", "tiny", "allow")
    assert first["id"] == keep_id(Path(str(config.out)) / "tracker")
    assert settings["optim.learning_rate"] == 1e-4


def test_lines_are_flattened_to_numbers() -> None:
    line = {
        "step": 1,
        "loss": None,
        "time_breakdown": {"data": 0.5},
        "validation": {"loss": 1.5, "w": "e"},
    }
    assert dict(flatten(line)) == {"step": 1, "time_breakdown/data": 0.5, "validation/loss": 1.5}
