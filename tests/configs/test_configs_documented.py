"""Documented commands work: their flags parse, and their make targets and presets exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from latent_t2i.cli import COMMANDS as COMMANDS_OF_CLI
from latent_t2i.configs.cli import parse
from latent_t2i.configs.presets import PRESETS_DIR
from tests.commands import COMMANDS

ROOT = PRESETS_DIR.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(PRESETS_DIR.glob("*.yaml")),
]
TARGETS = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))

# The module of each subcommand of `latent-t2i`.
INSTALLED = {name: module for name, (module, _) in COMMANDS_OF_CLI.items()}


def commands(page: Path) -> Iterator[list[str]]:
    """Returns the words of each shell command on a line of its own."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        line = line.removeprefix("#").strip()
        line = re.sub(r"^[A-Z_]+=\S+ ", "", line)
        if re.match(
            r"(make [a-z]|python -m [a-z_0-9.]+\.run |accelerate launch |latent-t2i )", line
        ):
            yield shlex.split(line, comments=True)


def settings(words: list[str]) -> tuple[str, list[str]]:
    """Returns the section and the flags of a command line."""
    for index, word in enumerate(words):
        word = INSTALLED.get(word, word) if words[0] == "latent-t2i" else word
        found = re.fullmatch(r"(?:latent_t2i\.)?([a-z]+)(\.run|/run\.py)", word)
        if found:
            return found[1], words[index + 1 :]
    raise AssertionError(f"unknown command: {words}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_parse(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make":
            arguments = [word.partition("=") for word in words[1:]]
            assert {name for name, equals, _ in arguments if not equals} <= TARGETS, words
            configs = [value for name, _, value in arguments if name == "CONFIG"]
            assert all((ROOT / config).is_file() for config in configs), words
        elif words[0] != "latent-t2i" or INSTALLED[words[1]].endswith(".run"):
            section, flags = settings(words)
            # A run's config.json is a preset, but exists only after the run.
            flags = [re.sub(r"^runs/(\w+)/config\.json$", r"\1", flag) for flag in flags]
            assert parse(COMMANDS[section], section, flags), words


def test_the_readme_shows_each_command() -> None:
    shown = {settings(words)[0] for words in commands(PAGES[0]) if words[0] != "make"}
    assert shown == set(COMMANDS)
