"""`python -m shards.verify` finds what is wrong, and nothing where nothing is."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import verify
from tests.shard_sets import make_examples, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", [make_examples(3), make_examples(2, num_captions=2)])
    for path in (tmp_path / "set").iterdir():
        path.chmod(0o644)
    return tmp_path / "set"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["verify", str(folder)])
    return verify.main()


def faults_after_flip(path: Path, position: int, folder: Path) -> list[str]:
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[position] ^= 1 << (position % 8)
    path.write_bytes(flipped)
    faults = list(verify.verify(folder))
    path.write_bytes(content)
    return faults


def test_sound_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folder) == 0
    assert capsys.readouterr().out == f"{folder}: 5 records in 2 shards, no fault\n"


def test_a_fault_is_printed_and_exits_with_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "shard-000000.tar").unlink()
    assert run(monkeypatch, folder) == 1
    assert "fault: " in (out := capsys.readouterr().out) and "shard-000000.tar: missing" in out


def test_missing_folder_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "no") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: no such folder\n"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("shard-000000.tar", 97),  # odd, so that headers, arrays, JSON and padding are all met
        ("empty_text.npy", 13),
        ("empty_tokens.npy", 5),
        ("manifest.json", 11),
    ],
)
def test_every_flipped_byte_is_found(folder: Path, name: str, step: int) -> None:
    path = folder / name
    for position in range(0, path.stat().st_size, step):
        assert faults_after_flip(path, position, folder), f"byte {position}"


def test_a_fault_names_shard_key_and_field(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    position = path.read_bytes().index(b"00-3-000001.text.npy")
    faults = faults_after_flip(path, position, folder)
    assert any(
        "shard-000000.tar: key '00-3-000001': field text: expected member" in fault
        for fault in faults
    )


def test_stray_file(folder: Path) -> None:
    (folder / "shard-000009.tar").touch()
    (fault,) = verify.verify(folder)
    assert "shard-000009.tar: expected only what the manifest lists" in fault


def test_what_a_wrong_writer_would_do(tmp_path: Path) -> None:
    """Faults that the hashes cannot show, since they were there when the hashes were taken."""
    first, second, third, fourth = make_examples(4)
    latent = first.latent.copy()
    latent[0, 0, 0, 0] = np.nan
    shards = [
        [replace(first, latent=latent), replace(second, text=second.text * np.float16(np.inf))],
        [replace(third, tokens=third.tokens - 100), replace(fourth, key=first.key)],
    ]
    with pytest.raises(ValueError, match="Out of range float values"):
        write_set(tmp_path / "nan", shards)
    shards[0][0] = first
    write_set(tmp_path / "set", shards)
    faults = "\n".join(verify.verify(tmp_path / "set"))
    assert f"key '{second.key}': field text: expected finite values" in faults
    assert f"key '{third.key}': field tokens: expected ids from 0" in faults
    assert f"key '{first.key}': expected once, found in" in faults
