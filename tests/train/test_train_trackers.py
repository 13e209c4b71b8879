"""Trackers: which are chosen, what they receive, and how a resumed run continues their logs."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from latent_t2i.train import trackers
from latent_t2i.train.config import OptimConfig, PreviewConfig
from latent_t2i.train.loop import train
from latent_t2i.train.trackers import choose, flatten, keep_id, log_line
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


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces wandb by a module that records its calls; Accelerate's tracker is the real one."""
    calls = SimpleNamespace(opened=[], logged=[], metrics=[], settings={})

    def log(values: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        assert step is None, "W&B drops lines whose step is not above its counter"
        calls.logged.append(values)

    def init(**options: Any) -> SimpleNamespace:
        calls.opened.append(options)
        return SimpleNamespace(log=log, finish=lambda: None, define_metric=define_metric)

    def define_metric(name: str, step_metric: str) -> None:
        calls.metrics.append((name, step_metric))

    def update(values: dict[str, Any], allow_val_change: bool) -> None:
        calls.settings.update(values)

    module = SimpleNamespace(init=init, config=SimpleNamespace(update=update), Image=np.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "AVAILABLE", missing())
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    return calls


def test_wandb_continues_the_run_of_the_folder(
    make_config: MakeConfig, fake_wandb: SimpleNamespace
) -> None:
    preview = PreviewConfig(every_steps=8, prompts=("red",), num_steps=1)
    config = make_config(trackers=("wandb",), num_steps=4)
    train(config)
    train(replace(config, num_steps=8, preview=preview))
    lines = [values for values in fake_wandb.logged if "train/loss" in values]
    assert [values["step"] for values in lines] == [4, 8]
    assert lines[0]["train/loss"] == metrics(config.out)[0]["loss"]
    image, step = fake_wandb.logged[-2:]
    assert len(image["previews"]) == 1 and step == {"step": 8}
    first, second = fake_wandb.opened
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("latent-t2i", "tiny", "allow")
    assert first["id"] == keep_id(Path(str(config.out)) / "tracker")
    assert fake_wandb.settings["optim.learning_rate"] == 1e-4


def test_wandb_keeps_the_lines_of_a_run_that_went_back_to_a_checkpoint(
    make_config: MakeConfig, fake_wandb: SimpleNamespace
) -> None:
    config = make_config(trackers=("wandb",), log_every_steps=1, keep_checkpoints=9)
    train(config)
    shutil.rmtree(Path(str(config.out)) / "checkpoints" / "step-00000010")
    train(replace(config, optim=OptimConfig(learning_rate=1e-5)))  # from step 9
    assert set(fake_wandb.metrics) == {("*", "step")}
    assert [values["step"] for values in fake_wandb.logged] == [*range(1, 11), 10]
    assert fake_wandb.logged[-1]["train/lr"] == 1e-5


def test_a_run_without_checkpoint_hides_what_it_logged_before(make_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    config = make_config(trackers=("tensorboard",), log_every_steps=1, num_steps=5)
    folder = Path(str(config.out))
    train(config)
    shutil.rmtree(folder / "checkpoints")
    train(config)
    assert [step for step, _ in scalars(folder)["train/loss"]] == [1, 2, 3, 4, 5]


def test_a_validation_without_a_finite_loss_stays_under_its_name() -> None:
    logged: list[dict[str, float]] = []
    tracker = SimpleNamespace(name="trackio", log=lambda values, step: logged.append(values))
    accelerator: Any = SimpleNamespace(trackers=[tracker])
    log_line(accelerator, {"step": 3, "validation": {"loss": None, "num_examples": 9}})
    assert logged == [{"validation/num_examples": 9}]


def test_an_empty_id_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("")  # a kill between creating and writing it
    found = keep_id(tmp_path)
    assert len(found) == 8
    assert keep_id(tmp_path) == found


def test_lines_are_flattened_to_numbers() -> None:
    line = {
        "step": 1,
        "loss": None,
        "time_breakdown": {"data": 0.5},
        "validation": {"loss": 1.5, "w": "e"},
    }
    assert dict(flatten(line)) == {"step": 1, "time_breakdown/data": 0.5, "validation/loss": 1.5}
