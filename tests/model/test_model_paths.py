"""Paths are found from any directory, and folders are written completely or not at all."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    with paths.complete_or_absent(tmp_path / "final") as folder:
        (folder / "sub").mkdir()
        save_file({"weight": torch.zeros(2)}, folder / "sub" / "weights.safetensors")
        (folder / "run.sh").touch(0o700)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "final").rglob("*")
    }
    assert modes == {
        "sub": 0o777 & ~umask,
        "weights.safetensors": 0o666 & ~umask,
        "run.sh": 0o700 | 0o666 & ~umask,
    }
