"""What the reader refuses, and that it says what was expected and found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from shards.reader import open_shards
from shards.schema import FormatError, hash_json
from tests.shard_sets import make_examples, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", [make_examples(3)])
    return tmp_path / "set"


def shard_of(folder: Path) -> Path:
    path = folder / "shard-000000.tar"
    path.chmod(0o644)
    return path


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as someone would who also puts its hash right."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    del document["sha256"]
    path.write_text(json.dumps(document | {"sha256": hash_json(document)}))


def use_shard_0(folder: Path) -> None:
    open_shards(folder).gather(np.array([0]), np.array([0.0]), np.array([0.0]))


def test_another_schema_version(folder: Path) -> None:
    change_manifest(folder, lambda document: document.update(schema_version=9))
    with pytest.raises(FormatError, match=r"manifest\.json: schema_version: expected 2, found 9"):
        open_shards(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: no such folder of shards"):
        open_shards(tmp_path / "nowhere")


def test_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"manifest\.json: missing \(no shards\)"):
        open_shards(tmp_path)


def test_unfinished_set(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "progress").mkdir()
    with pytest.raises(FormatError, match="did not finish: start the same command again"):
        open_shards(folder)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"schema_version": 2}'])
def test_not_a_manifest(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(FormatError, match=r"manifest\.json: (not|expected)"):
        open_shards(folder)


def test_altered_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("some/vae", "some/vqe"))
    with pytest.raises(FormatError, match="the manifest was altered"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(num_records=4), "num_records: expected 3, found 4"),
        (lambda d: d.update(num_source=7), "num_source: expected 3, found 7"),
        (lambda d: d["shards"][0].update(bytes=1), "bytes: expected .*, found 1"),
        (lambda d: d.update(shards=[], num_records=0, num_source=0), "shards: expected at least"),
    ],
)
def test_manifest_at_odds_with_itself(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(folder, change)
    with pytest.raises(FormatError, match=message):
        open_shards(folder)


def test_missing_shard(folder: Path) -> None:
    shard_of(folder).unlink()
    with pytest.raises(FormatError, match=r"shard-000000\.tar: missing, expected a file of \d+"):
        open_shards(folder)


@pytest.mark.parametrize(("extra", "state"), [(-1, "cut short"), (1, "too long")])
def test_wrong_size(folder: Path, extra: int, state: str) -> None:
    path = shard_of(folder)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size + min(extra, 0)] + bytes(max(extra, 0)))
    message = rf"shard-000000\.tar: {state}: expected {size} bytes, found {size + extra}"
    with pytest.raises(FormatError, match=message):
        open_shards(folder)


@pytest.mark.parametrize("name", ["empty_text.npy", "empty_tokens.npy"])
def test_missing_empty_prompt(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: missing"):
        open_shards(folder)


def test_hash_mismatch_only_when_verifying(folder: Path) -> None:
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    open_shards(folder)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256: expected \w{64}, found \w"):
        open_shards(folder, verify=True)


def test_foreign_encoders(folder: Path) -> None:
    open_shards(folder, vae_sha256="v" * 64, text_sha256="t" * 64)
    with pytest.raises(FormatError, match=f"vae: .*'some/vae' .sha256 {'v' * 64}.*{'w' * 64}"):
        open_shards(folder, vae_sha256="w" * 64)
    with pytest.raises(FormatError, match=f"text_encoder: .*{'t' * 64}.*sha256 {'u' * 64}"):
        open_shards(folder, text_sha256="u" * 64)


def test_a_tar_of_another_layout(folder: Path) -> None:
    """Right in size, and a WebDataset tar, but not strided as the manifest says."""
    path = shard_of(folder)
    size = path.stat().st_size
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        tar.write({"__key__": "a", "json": b"{}" * 1000, "latent.npy": np.zeros(3)})
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    message = r"key 'a': field latent: expected member 'a.latent.npy' at byte 1024, found '{}{}"
    with pytest.raises(FormatError, match=message):
        use_shard_0(folder)


def test_an_array_of_another_shape(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes().replace(b"(1, 8, 8, 8)", b"(1, 4, 8, 8)"))
    with pytest.raises(FormatError, match=r"field latent: expected array header .*\(1, 8, 8, 8\)"):
        use_shard_0(folder)
