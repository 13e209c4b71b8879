"""Draws a folder in a new process, started quickly from the fork server of tests/conftest.py."""

from pathlib import Path

from latent_t2i.sample import pictures
from latent_t2i.sample.config import SampleConfig


def draw(config: SampleConfig) -> None:
    """Runs the command."""
    pictures.sample(config)


def names_and_bytes(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
