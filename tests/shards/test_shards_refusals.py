"""Damaged sets that the reader rejects, with what was expected and found."""

import gc
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from latent_t2i.shards import checks
from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import BLOCK_BYTES, MEMBERS, FormatError, Manifest
from latent_t2i.shards.settings import Verify
from tests.shard_sets import edit_json, edit_table, make_examples, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", [make_examples(3)])
    return tmp_path / "set"


def shard_of(folder: Path) -> Path:
    path = folder / "shard-000000.tar"
    path.chmod(0o644)
    return path


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder / "manifest.json", change)


def use_shard_0(folder: Path, verify: Verify = "none") -> None:
    open_shards(folder, verify=verify).gather(np.array([0]), np.array([0.0]), np.array([0.0]))


def test_other_schema_version(folder: Path) -> None:
    change_manifest(folder, lambda document: document.update(schema_version=9))
    with pytest.raises(
        FormatError, match=r"manifest\.json: schema_version: expected 3 or 2, found 9"
    ):
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
    with pytest.raises(FormatError, match="did not finish: run the same command again"):
        open_shards(folder)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"schema_version": 2}'])
def test_not_a_manifest(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(FormatError, match=r"manifest\.json: (not JSON|expected|missing key)"):
        open_shards(folder)


def test_altered_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("some/vae", "some/vqe"))
    with pytest.raises(FormatError, match="the file was altered"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(num_records=4), "num_records: expected 3, found 4"),
        (lambda d: d.update(num_source=7), "num_source: expected 3, found 7"),
        (
            lambda d: d["shard_table"].update(name="../shards.npy"),
            r"expected unique file names of the form .*, found '\.\./shards\.npy'",
        ),
        (
            lambda d: d["quarantine"].update(name="shard-000000.tar"),
            r"expected unique file names of the form .*, found 'shard-000000\.tar'",
        ),
        (lambda d: d.update(shard_sums=None), "shard_sums: expected files, found null"),
        (lambda d: d.update(num_quarantined=-1), "num_quarantined: expected 0, found -1"),
        (
            lambda d: d["shard_table"].update(bytes=1),
            r"shards\.npy: expected 1 bytes, found 240",
        ),
        (
            lambda d: d["shard_table"].update(sha256="0" * 64),
            r"shards\.npy: sha256: expected 0{64}, found .*: the file changed",
        ),
        (
            lambda d: d["empty_text"].update(name="empty_tokens.npy"),
            r"expected unique file names of the form .*, found 'empty_tokens\.npy'",
        ),
        (
            lambda d: d.update(text_dtype="int8"),
            r"layout 0: expected .*'int8'.* for these shapes, found .*'float16'",
        ),
        (
            lambda d: d.update(max_tokens=8),
            r"layout 0: expected .*\(\(1, 8, 8, 8\), 8, 32\), found \(\(1, 8, 8, 8\), 7, 32\)",
        ),
        (
            lambda d: d["layouts"][0]["fields"]["text"].update(offset_bytes=512),
            r"layout 0: expected .*offset_bytes.* for these shapes, found .*offset_bytes=512",
        ),
        (
            lambda d: d["layouts"][0]["fields"]["latent"].update(shape=[8, 8, 8]),
            r"layout 0: expected latent \(views, channels, h, w\).*, found \(8, 8, 8\)",
        ),
    ],
)
def test_inconsistent_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(folder, change)
    with pytest.raises(FormatError, match=message):
        open_shards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["records"].fill(0), "records: expected at least 1, found 0"),
        (lambda t: t["layout"].fill(1), "layout: expected 0 to 0, found 1"),
        (lambda t: np.repeat(t, 2), "number: expected ascending numbers, found 0"),
        (lambda t: t["records"].fill(2**63), r"expected fewer than \d+ bytes, found more"),
        (lambda t: t["records"].fill(4), "num_records: expected 4, found 3"),
        (lambda t: t[:0], r"shards\.npy: expected array header .* at least one row"),
        (lambda t: t["number"].copy(), r"shards\.npy: expected array header .*'shape': \(0,\)"),
        (lambda t: t["sha256"].fill(b"x"), r"shard-000000\.tar: sha256: expected 78"),
    ],
)
def test_inconsistent_table(folder: Path, change: Callable[[Any], object], message: str) -> None:
    edit_table(folder, change)
    with pytest.raises(FormatError, match=message):
        open_shards(folder, verify="full")


def test_missing_table(folder: Path) -> None:
    (folder / "shards.npy").unlink()
    with pytest.raises(FormatError, match=r"shards\.npy: missing, expected a file of 240 bytes"):
        open_shards(folder)


def test_quarantine_is_read_only_when_asked_for(folder: Path) -> None:
    path = folder / "quarantine.jsonl"
    path.write_bytes(b'{"key": "a", "reason": "b", "shard": null}\n')
    manifest = open_shards(folder).manifest
    with pytest.raises(FormatError, match=r"quarantine\.jsonl: sha256: expected \w{64}, found"):
        manifest.read_quarantined()
    path.write_bytes(b'{"key": "a", "reason": "b"}\n')
    with pytest.raises(FormatError, match=r"quarantine\.jsonl: line 1: missing key 'shard'"):
        manifest.read_quarantined()
    path.unlink()
    with pytest.raises(FormatError, match=r"quarantine\.jsonl: missing, expected a file of 0"):
        manifest.read_quarantined()


def test_missing_shard(folder: Path) -> None:
    shard_of(folder).unlink()
    open_shards(folder)  # a shard is checked when it is first used
    for verify in ("none", "full"):
        with pytest.raises(FormatError, match=r"shard-000000\.tar: missing, expected a file of \d"):
            use_shard_0(folder, verify)


@pytest.mark.parametrize(("extra", "state"), [(-1, "truncated"), (1, "too long")])
def test_wrong_size(folder: Path, extra: int, state: str) -> None:
    path = shard_of(folder)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size + min(extra, 0)] + bytes(max(extra, 0)))
    message = rf"shard-000000\.tar: {state}: expected {size} bytes, found {size + extra}"
    for verify in ("none", "full"):
        with pytest.raises(FormatError, match=message):
            use_shard_0(folder, verify)


@pytest.mark.parametrize("name", ["empty_text.npy", "empty_tokens.npy"])
def test_missing_empty_prompt(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: missing"):
        open_shards(folder)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_wrong_hash_is_found_by_verify(folder: Path) -> None:
    flip(shard_of(folder), 2000)
    use_shard_0(folder)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256: expected \w{64}, found \w"):
        open_shards(folder, verify="full")


def test_lazy_verification_finds_flipped_byte_after_first_use(folder: Path) -> None:
    flip(shard_of(folder), 2000)
    shards = open_shards(folder)
    shards.finish_verification()
    shards.keys(np.array([0]))
    for _ in range(2):
        with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256: expected \w{64}, fou"):
            shards.finish_verification()
        with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256"):
            shards.gather(np.array([0]), np.array([0.0]), np.array([0.0]))


@pytest.mark.parametrize("shuffle", ["full", "none"])
def test_lazy_verification_ends_with_the_epoch(tmp_path: Path, shuffle: str) -> None:
    folder = tmp_path / "set"
    write_set(folder, [make_examples(3, seed=seed) for seed in range(4)])
    flip(folder / "shard-000003.tar", 9000)
    shards = open_shards(folder)
    loader = MapLoader(shards=shards, order=shards.order(batch_size=2, seed=0, shuffle=shuffle))
    out = loader.buffer()
    with pytest.raises(FormatError, match=r"shard-000003\.tar: sha256"):
        for step in range(7):  # an epoch has six
            loader.fill(step, out)


def test_verification_thread_ends_with_its_set(folder: Path) -> None:
    before = set(threading.enumerate())
    shards = open_shards(folder)
    shards.keys(np.array([0]))
    shards.finish_verification()
    (thread,) = set(threading.enumerate()) - before
    del shards
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_unreadable_file_is_reported_by_lazy_verification(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, entry: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checks, "check_hash", fail)
    shards = open_shards(folder)
    shards.keys(np.array([0]))
    with pytest.raises(FormatError, match=r"shard-000000\.tar: cannot be read: Input/output error"):
        shards.finish_verification()


def test_manifest_of_another_set(tmp_path: Path, folder: Path) -> None:
    """Other sizes are found on the first use, otherwise equal sets by their hashes."""
    write_set(tmp_path / "other", [make_examples(3, seed=1)])
    write_set(tmp_path / "longer", [make_examples(4)])
    for name in ("manifest.json", "shards.npy"):
        shutil.copy(tmp_path / "longer" / name, folder / name)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: truncated: expected \d+ bytes"):
        use_shard_0(folder)
    shutil.copy(tmp_path / "other" / "manifest.json", folder / "manifest.json")
    with pytest.raises(FormatError, match=r"shards\.npy: expected 240 bytes|shards\.npy: sha256"):
        open_shards(folder)
    shutil.copy(tmp_path / "other" / "shards.npy", folder / "shards.npy")
    open_shards(folder)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256: expected \w{64}, found"):
        open_shards(folder, verify="full")


def test_other_encoders(folder: Path) -> None:
    open_shards(folder, vae_sha256="v" * 64, text_sha256="t" * 64)
    with pytest.raises(FormatError, match=f"vae: .*'some/vae' .sha256 {'v' * 64}.*{'w' * 64}"):
        open_shards(folder, vae_sha256="w" * 64)
    with pytest.raises(FormatError, match=f"text_encoder: .*{'t' * 64}.*sha256 {'u' * 64}"):
        open_shards(folder, text_sha256="u" * 64)


def test_tar_of_another_layout(folder: Path) -> None:
    """A WebDataset tar of the right size with another layout."""
    path = shard_of(folder)
    size = path.stat().st_size
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        tar.write({"__key__": "a", "json": b"{}" * 1000, "latent.npy": np.zeros(3)})
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    message = r"key 'a': field latent: expected member 'a.latent.npy' at byte 1024, found '{}{}"
    with pytest.raises(FormatError, match=message):
        use_shard_0(folder)


def test_array_of_another_shape(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes().replace(b"(1, 8, 8, 8)", b"(1, 4, 8, 8)"))
    with pytest.raises(FormatError, match=r"field latent: expected array header .*\(1, 8, 8, 8\)"):
        use_shard_0(folder)


def test_tar_without_fixed_layout(folder: Path) -> None:
    """The table has the tar's number of records, but record sizes differ."""
    path = shard_of(folder)
    size = path.stat().st_size
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number in range(3):
            latent = np.zeros((1, 8, 8, 8 + number), np.float16)
            tar.write({"__key__": f"k{number}", "json": {}, "latent.npy": latent})
    found = path.stat().st_size
    message = rf"shard-000000\.tar: (truncated|too long): expected {size} bytes, found {found}"
    with pytest.raises(FormatError, match=message):
        use_shard_0(folder)


@pytest.mark.parametrize("record", [0, 2])
@pytest.mark.parametrize("missing", MEMBERS)
def test_missing_member(folder: Path, missing: str, record: int) -> None:
    """In the first or last record; `shards.verify` finds it in the others."""
    (layout,) = Manifest.load(folder).layouts
    path = shard_of(folder)
    content = path.read_bytes()
    bounds = [
        part.offset_bytes - part.header_bytes - BLOCK_BYTES for part in layout.fields.values()
    ]
    bounds.append(layout.record_bytes)
    number = list(MEMBERS).index(missing)
    start, end = (record * layout.record_bytes + bound for bound in bounds[number : number + 2])
    path.write_bytes((content[:start] + content[end:]).ljust(len(content), b"\0"))
    key = f"00-3-00000{record}"
    following = [*MEMBERS.values(), MEMBERS["json"]][number + 1]
    found = "" if (record, missing) == (2, "tokens") else rf".*\.{following}"
    message = (
        rf"shard-000000\.tar: key '{key}': field {missing}: expected member "
        rf"'{key}\.{MEMBERS[missing]}' at byte \d+, found '{found}'"
    )
    with pytest.raises(FormatError, match=message):
        use_shard_0(folder)


def test_shard_truncated_after_opening(folder: Path) -> None:
    shards = open_shards(folder)
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"shard-000000\.tar: truncated"):
        shards.keys(np.array([0]))


def test_damaged_record_json(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes().replace(b'"caption 1 of 1"', b'"caption 1 of 1 '))
    shards = open_shards(folder, verify="none")
    assert shards.meta(0)
    message = r"shard-000000\.tar: key '00-3-000001': field json: not JSON: "
    with pytest.raises(FormatError, match=message):
        shards.meta(1)


@pytest.mark.parametrize("name", ["empty_text.npy", "empty_tokens.npy", "text_scale.npy"])
def test_damaged_arrays_beside_the_shards(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set"
    write_set(folder, [make_examples(2, text_dtype="int8")])
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'<", b"'>"))
    with pytest.raises(FormatError, match=rf"{name}: expected array header .*, found .*'>"):
        open_shards(folder)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(FormatError, match=rf"{name}: expected array header .*NUMPY.*, found b'xx"):
        open_shards(folder)


def test_missing_text_scale(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_set(folder, [make_examples(2, text_dtype="int8")])
    change_manifest(folder, lambda document: document.update(text_scale=None))
    with pytest.raises(FormatError, match=r"text_scale: expected one for int8 text .*, found None"):
        open_shards(folder)
