"""Paths are found from any directory, and folders are written completely or not at all."""

from pathlib import Path

import pytest

from latent_t2i.model import paths


def test_find_path_prefers_the_current_directory(elsewhere: Path) -> None:
    assert paths.find_path("pyproject.toml") == paths.ROOT / "pyproject.toml"
    (elsewhere / "pyproject.toml").touch()
    assert paths.find_path("pyproject.toml") == Path("pyproject.toml")
    assert paths.find_path(paths.ROOT) == paths.ROOT
    assert paths.find_path("no/such/thing") is None


def test_outputs_go_to_the_checkout_or_the_current_directory(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paths.output_root() == paths.ROOT
    monkeypatch.setattr(paths, "ROOT", elsewhere / "site-packages")
    assert paths.output_root() == elsewhere


def test_a_folder_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with paths.complete_or_absent(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), paths.complete_or_absent(final) as folder:
        (folder / "a").write_text("half")
        raise OSError("disk full")
    assert (final / "a").read_text() == "old"
    with paths.complete_or_absent(final) as folder:
        assert not (final / "b").exists()
        (folder / "b").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["final", "b"]
