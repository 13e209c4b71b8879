"""Signals from people, Slurm and containers: the run is saved, also when only its launcher dies."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latent_t2i.train.loop import train
from tests.train import process_groups
from tests.train.conftest import MakeConfig, assert_same_weights, metrics
from tests.train.test_train_kills import newest_name, wait_until
from tests.train.test_train_launch import SCRIPT, environment, flags

TIMEOUT_S = 120
OnStep = Callable[[int, Callable[[], None]], None]


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM, signal.SIGTERM),  # forwarded by the launcher, and to the whole job
        (signal.SIGINT,),
        (signal.SIGHUP,),
        (signal.SIGUSR1, signal.SIGUSR1),  # Slurm's, and the one at the launcher's death
    ],
)
def test_a_signal_saves_and_the_same_command_resumes(
    make_config: MakeConfig, on_step: OnStep, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    whole = train(make_config(out=str(tmp_path / "whole")))
    handlers = [signal.getsignal(number) for number in signals]
    on_step(5, lambda: [os.kill(os.getpid(), number) for number in signals])  # type: ignore[arg-type,return-value]
    with pytest.raises(SystemExit) as exit_:
        train(make_config())
    assert exit_.value.code == 128 + signals[0]
    assert [signal.getsignal(number) for number in signals] == handlers
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name not in ("step-00000003", "step-00000006", "step-00000010")
    assert_same_weights(train(make_config()), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_under_nohup_sighup_stays_ignored(
    make_config: MakeConfig, on_step: OnStep, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        on_step(5, lambda: os.kill(os.getpid(), signal.SIGHUP))
        train(make_config())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert newest_name(tmp_path / "run") == "step-00000010"


def start_child(program: str, *before: str, **changes: str) -> "subprocess.Popen[str]":
    """Starts a Python program in a process group of its own and waits for its first line."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", program],
        env=dict(os.environ) | changes,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


WAIT_FOR_SIGNAL = """
import signal, sys
from latent_t2i.train import stop
stop.prepare_signals()
if "--record" in sys.argv:
    signal.signal(stop.PARENT_DIED, lambda *_: (print("saved", flush=True), sys.exit()))
print("ready", flush=True)
signal.pause()
"""
LAUNCHER = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {WAIT_FOR_SIGNAL!r}, "--record"])
"""


def test_the_death_of_the_launcher_is_noticed() -> None:
    with start_child(LAUNCHER, ACCELERATE_MIXED_PRECISION="no") as launcher:
        launcher.kill()  # and not its child
        assert launcher.stdout is not None
        assert launcher.stdout.read() == "saved\n"


def test_process_1_ends_at_sigterm() -> None:
    unshare = [shutil.which("unshare") or "unshare", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make a process namespace")
    with start_child(WAIT_FOR_SIGNAL, *unshare) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_sigterm_to_accelerate_launch_saves(
    make_config: MakeConfig, tmp_path: Path, elsewhere: Path
) -> None:
    """The launcher of one process does not forward the signal."""
    run = tmp_path / "run"
    train(make_config(num_steps=500, out=str(tmp_path / "whole")))
    config = make_config(num_steps=500)
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    with subprocess.Popen(
        [sys.executable, *launch, str(SCRIPT), *flags(config)],
        env=environment(),
        cwd=elsewhere,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        wait_until(lambda: newest_name(run) != "", lambda: launcher.poll() is None)
        launcher.terminate()
        assert launcher.stderr is not None
        stderr = launcher.stderr.read()  # until the trainer, which writes to it too, has ended
    assert "stopped by SIGUSR1; run the same command to resume" in stderr
    assert "" < newest_name(run) < "step-00000500"
    train(config)
    process_groups.assert_same_end(run, tmp_path / "whole")
