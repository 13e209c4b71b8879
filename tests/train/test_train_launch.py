"""Runs started by accelerate's launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_t2i.model.paths import ROOT
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.setup import cpu_warnings, make_accelerator
from tests.train.conftest import MakeConfig, assert_close_metrics, metrics

SCRIPT = ROOT / "train" / "run.py"
TIMEOUT_S = 120


def flags(config: TrainConfig) -> list[str]:
    """The command-line flags for the settings that `make_config` sets."""
    model = config.model
    given: dict[str, object] = {
        "name": config.name,
        "shards": " ".join(config.shards or ()),
        "out": config.out,
        "batch-size": config.batch_size,
        "num-steps": config.num_steps,
        "mixed-precision": config.mixed_precision,
        "log-every-steps": config.log_every_steps,
        "trackers": config.trackers[0],
        "checkpoint-every-steps": config.checkpoint_every_steps,
        "ema.decay": config.ema.decay,
        "model.channels": model.channels[0],
        "model.attention": model.attention[0],
        "model.layers-per-block": model.layers_per_block,
        "model.attention-head-dim": model.attention_head_dim,
        "model.norm-num-groups": model.norm_num_groups,
    }
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def environment(**changes: str) -> dict[str, str]:
    """This environment without the path by which a script would find the project."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | changes


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(
    make_config: MakeConfig, tmp_path: Path, elsewhere: Path
) -> None:
    train(make_config(out=str(tmp_path / "one")))
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *flags(make_config())],
        env=environment(ACCELERATE_USE_CPU="1"),
        cwd=elsewhere,
        check=True,
        timeout=TIMEOUT_S,
        stderr=subprocess.DEVNULL,
    )
    assert len(metrics(tmp_path / "run")) == 3
    assert_close_metrics(tmp_path / "run", tmp_path / "one", rel=1e-5)
    assert (tmp_path / "run" / "bundle" / "model_index.json").exists()


def test_a_launcher_that_starts_one_process_of_two_is_detected() -> None:
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert "starts one process" in cpu_warnings(launched, num_processes=1)[0]
    for started, num_processes in (({}, 1), (launched | {"RANK": "0"}, 2)):
        notes = cpu_warnings(started, num_processes)
        assert not any("starts one process" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("ACCELERATE_USE_FSDP", "true", "--fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "--fsdp"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--micro-batch-size"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
    ],
)
def test_accelerates_own_settings_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, instead: str
) -> None:
    monkeypatch.setenv(name, value)
    message = f"{name}: accelerate's configuration or launcher sets it to '{value}'.*{instead}"
    with pytest.raises(ValueError, match=message):
        make_accelerator("no")


def test_the_launchers_defaults_are_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_FSDP": "false",
    }.items():
        monkeypatch.setenv(name, value)
    assert make_accelerator("bf16").mixed_precision == "bf16"
    assert "mixed_precision" not in capsys.readouterr().err


def test_another_precision_given_to_the_launcher_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert make_accelerator("bf16").mixed_precision == "bf16"
    message = "mixed_precision: accelerate's launcher was given fp16, which has no effect; the run"
    assert message in capsys.readouterr().err
