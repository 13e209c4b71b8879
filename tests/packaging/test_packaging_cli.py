"""The console command: help, unknown commands, the doctor, shell completion."""

import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from latent_t2i import __version__, cli, completion, doctor, sizes
from latent_t2i.configs.presets import PRESETS_DIR

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "tyro"}


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "latent_t2i", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def imported(importtime: str) -> set[str]:
    """The top-level modules in the output of `-X importtime`."""
    rows = [line.rpartition("|")[2] for line in importtime.splitlines() if "import time:" in line]
    return {row.strip().partition(".")[0] for row in rows}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["evalaute"]])
def test_help_and_typos_import_nothing_heavy(arguments: list[str]) -> None:
    found = imported(run_module(*arguments).stderr)
    assert "latent_t2i" in found
    assert not found & HEAVY


def test_help_names_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert "accelerate launch" in text
    assert max(map(len, text.splitlines())) <= 88


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"latent-t2i {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["evalaute"], "unknown command 'evalaute', did you mean evaluate?"),
        (["pipeline"], "unknown command 'pipeline', did you mean encode?"),
        (["frobnicate"], "unknown command 'frobnicate' (see"),
        ([], "no command given, expected one of encode, train"),
    ],
)
def test_unknown_command_is_one_line(
    argv: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {error}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_shows_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i"])
    try:
        assert cli.main([name, "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    assert f"usage: latent-t2i {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_run_without_a_program_name(name: str) -> None:
    """`python -m MODULE` calls the same `main`, without arguments."""
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert inspect.signature(module.main).parameters["prog"].default is None


def test_settings_errors_pass_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--config", "nowhere"])
    assert "nowhere" in capsys.readouterr().err


@pytest.fixture
def only_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the doctor one preset to estimate."""
    (tmp_path / "demo.yaml").write_bytes((PRESETS_DIR / "demo.yaml").read_bytes())
    monkeypatch.setattr(doctor, "PRESETS_DIR", tmp_path)


@pytest.mark.usefixtures("only_demo")
def test_doctor_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i doctor"])
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"latent-t2i          {__version__} on Python 3.")
    assert lines[-1].startswith("demo            6.1 M     64  ")


@pytest.mark.usefixtures("only_demo")
def test_doctor_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i doctor"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(
        doctor, "OPTIONAL", (("reports", ("json", "no_such_module"), "latent-t2i[x]"),)
    )
    monkeypatch.setattr(doctor, "available_bytes", lambda device: 1_000_000)
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "reports             missing no_such_module: pip install '.[x]'\n" in text
    assert "--compile needs C compiler, C++ compiler" in text
    assert "too large: lower --micro-batch-size" in text
    assert max(map(len, text.splitlines())) <= 80


def test_doctor_names_extras_that_exist() -> None:
    project = tomllib.loads((PRESETS_DIR.parent / "pyproject.toml").read_text(encoding="utf-8"))
    named = {extra for _, _, text in doctor.OPTIONAL for extra in re.findall(r"\[(\w+)\]", text)}
    assert named
    assert named <= set(project["project"]["optional-dependencies"])


def test_doctor_describes_gpus() -> None:
    gpu = {"name": "NVIDIA X", "free_bytes": 20 * 10**9, "total_bytes": 24 * 10**9}
    lines = list(doctor.describe(doctor.inspect_machine() | {"gpus": [gpu, gpu]}))
    text = "NVIDIA X, 20.0 GB of 24.0 GB free"
    assert f"GPU                 {text}; {text[:8]}" in "\n".join(lines)


@pytest.mark.usefixtures("only_demo")
def test_doctor_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i doctor", "--json"])
    assert doctor.main() == 0
    found = json.loads(capsys.readouterr().out)
    (demo,) = found["presets"]
    assert demo["memory_bytes"] == sizes.size_preset("demo", device=demo["device"])["memory_bytes"]
    assert found["num_cpu_cores"] >= 1
    assert found["disk_bytes"] > 0


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i completion", shell])
    with pytest.raises(SystemExit) as stop:
        completion.main()
    assert not stop.value.code
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert all(flag in script for flag in ("source.num-images", "checkpoint-every-steps", "config"))


def test_completion_refuses_another_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i completion", "powershell"])
    assert completion.main() == 2
    assert "expected one of bash, zsh, fish, found powershell" in capsys.readouterr().err


def test_bash_completes_commands_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent-t2i completion", "bash"])
    with pytest.raises(SystemExit):
        completion.main()
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    for words, expected in (
        ("latent-t2i ev", "evaluate"),
        ("latent-t2i train --num-st", "--num-steps"),
    ):
        shell = (
            f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
            "_tyro_latent_t2i; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        assert expected in found.stdout.split()
