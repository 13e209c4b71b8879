"""Runs as processes of their own: started as users start them, killed, and on two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from latent_t2i.model.paths import ROOT
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.setup import cpu_warnings
from tests.train.conftest import MakeConfig

SCRIPT = ROOT / "train" / "run.py"
TIMEOUT_S = 120


def flags(config: TrainConfig) -> list[str]:
    """The command-line form of the settings that `make_config` sets."""
    model = config.model
    given: dict[str, object] = {
        "name": config.name,
        "shards": config.shards,
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
    """This environment without anything that would help a script find the project."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | changes


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_one_never_killed(
    make_config: MakeConfig, tmp_path: Path, elsewhere: Path
) -> None:
    whole = train(make_config(num_steps=60, out=str(tmp_path / "whole")))
    config = make_config(num_steps=60)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags(config)],
        env=environment(ACCELERATE_USE_CPU="1"),
        cwd=elsewhere,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000009", process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "bundle").exists()
    killed = train(config)
    name = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in (killed, whole))
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    """Waits until a process has made a folder."""
    limit = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.01)


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
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "run")
    )
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-5)
    assert (tmp_path / "run" / "bundle" / "model_index.json").exists()


def test_a_launcher_that_starts_one_process_of_two_is_noticed() -> None:
    asked = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert "starts one process" in cpu_warnings(asked, num_processes=1)[0]
    for started, num_processes in (({}, 1), (asked | {"RANK": "0"}, 2)):
        notes = cpu_warnings(started, num_processes)
        assert not any("starts one process" in note for note in notes)
