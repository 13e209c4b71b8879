"""The documented commands of docs/pictures.md parse, and each module runs as a command."""

import importlib
import re
import shlex
from typing import Any

import pytest

from latent_t2i.configs.cli import parse
from latent_t2i.model.paths import ROOT
from latent_t2i.sample import settings

CONFIGS: dict[str, type[Any]] = {
    "app": settings.AppConfig,
    "edit": settings.EditConfig,
    "export": settings.ExportConfig,
    "grid": settings.GridConfig,
    "interpolate": settings.InterpolateConfig,
}
PAGE = (ROOT / "docs/pictures.md").read_text("utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^    python -m sample\.(\w+) (.*)$", PAGE, re.M)


def test_the_page_shows_each_command() -> None:
    assert {name for name, _ in COMMANDS} | {"app"} == set(CONFIGS)
    assert "    make app\n" in PAGE


@pytest.mark.parametrize(("name", "flags"), COMMANDS)
def test_documented_commands_parse(name: str, flags: str) -> None:
    assert parse(CONFIGS[name], None, shlex.split(flags), prog=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_help_names_the_command_and_no_preset(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"latent_t2i.sample.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    out = capsys.readouterr().out
    assert f"usage: python -m sample.{name}" in out
    assert "--config" not in out


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mistake_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"latent_t2i.sample.{name}")
    monkeypatch.setattr("sys.argv", [name, "--frobnicate", "1"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    error = capsys.readouterr().err
    assert error.startswith("error: unknown flag --frobnicate")
    assert error.count("\n") == 1
