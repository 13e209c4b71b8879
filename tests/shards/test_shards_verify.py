"""`python -m shards.verify` finds all faults, and none in a sound set.

test_shards_faults.py flips every byte of a set.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.shards import verify
from latent_t2i.shards.schema import FormatError, Manifest
from tests.shard_sets import (
    edit_json,
    make_examples,
    make_provenance,
    read_stock,
    run_main,
    update_hash,
    write_set,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", [make_examples(3), make_examples(2, num_captions=2)])
    for path in (tmp_path / "set").iterdir():
        path.chmod(0o644)
    return tmp_path / "set"


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file and stores the matching hashes, like a faulty writer."""
    (folder / name).chmod(0o644)
    (folder / name).write_bytes(content)
    update_hash(folder, name)


def test_sound_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(verify, monkeypatch, folder) == 0
    assert capsys.readouterr().out == f"{folder}: 5 records in 2 shards, no faults\n"


def test_fault_is_printed_with_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "shard-000000.tar").unlink()
    assert run_main(verify, monkeypatch, folder) == 1
    assert "fault: " in (out := capsys.readouterr().out) and "shard-000000.tar: missing" in out


def test_missing_folder_gives_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(verify, monkeypatch, tmp_path / "no") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: no such folder\n"


def test_fault_names_shard_key_and_field(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"00-3-000001.text.npy", b"10-3-000001.text.npy"))
    faults = "\n".join(verify.verify(folder))
    assert "shard-000000.tar: key '00-3-000001': field text: expected member" in faults


def test_stray_file(folder: Path) -> None:
    (folder / "shard-000009.tar").touch()
    (fault,) = verify.verify(folder)
    assert "shard-000009.tar: not listed in manifest.json" in fault


def test_faults_of_a_wrong_writer(tmp_path: Path) -> None:
    """Hashes cannot find these faults, because they were there when the hashes were computed."""
    first, second, third, fourth = make_examples(4)
    latent = first.latent.copy()
    latent[0, 0, 0, 0] = np.nan
    shards = [
        [replace(first, latent=latent), replace(second, text=second.text * np.float16(np.inf))],
        [replace(third, tokens=third.tokens - 100), replace(fourth, key=first.key)],
    ]
    with pytest.raises(FormatError, match="field latent: expected finite values, found NaN or inf"):
        write_set(tmp_path / "nan", shards)
    shards[0][0] = first
    write_set(tmp_path / "set", shards)
    faults = "\n".join(verify.verify(tmp_path / "set"))
    assert f"key '{second.key}': field text: expected finite values" in faults
    assert f"key '{third.key}': field tokens: expected ids of at least 0" in faults
    assert f"key '{first.key}': expected a unique key, found it in" in faults


@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
@pytest.mark.parametrize("kind", ["moments", "plain"])
@pytest.mark.parametrize("views", [1, 2])
def test_all_kinds_of_sets_pass_and_are_stock_tars(
    tmp_path: Path, text_dtype: Any, kind: Any, views: int
) -> None:
    """verify finds no fault, and stock webdataset reads the same arrays."""
    settings = {"views": views, "kind": kind, "text_dtype": text_dtype}
    first = make_examples(3, num_captions=3, **settings)
    second = make_examples(2, num_captions=2, **settings)
    provenance = make_provenance(kind, text_dtype=text_dtype)
    manifest = write_set(tmp_path / "set", [first, second], provenance)
    assert (manifest.text_scale is not None) == (text_dtype == "int8")
    assert not list(verify.verify(tmp_path / "set"))
    for example, sample in zip([*first, *second], read_stock(tmp_path / "set"), strict=True):
        assert sample["__key__"] == example.key
        assert sample["json"] == example.meta
        assert sample["text.npy"].dtype == text_dtype
        for name in ("latent", "text", "tokens"):
            np.testing.assert_array_equal(
                sample[f"{name}.npy"], getattr(example, name), strict=True
            )


@pytest.mark.parametrize("jobs", [1, 3, 16])
def test_threads_do_not_change_faults_or_their_order(tmp_path: Path, jobs: int) -> None:
    folder = tmp_path / "set"
    write_set(folder, [make_examples(20, seed=seed) for seed in range(8)])
    for index in (6, 1, 3):
        path = folder / f"shard-{index:06d}.tar"
        path.chmod(0o644)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"caption 1 of 7", b"caption 1 of \0"))
    read: list[int] = []
    *faults, captions, truncated = verify.verify(folder, jobs=jobs, advance=read.append)
    assert [fault.split(":")[0][-5] for fault in faults] == list("113366")
    assert all("sha256: expected" in fault for fault in faults[::2])
    assert all("07': field json: not JSON" in fault for fault in faults[1::2])
    assert captions.endswith("num_captions: expected 471, found 480")
    assert truncated.endswith("num_truncated: expected 77, found 80")
    assert sum(read) == sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_number_of_listed_faults_is_limited(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    rewrite(folder, path.name, path.read_bytes().replace(b"bigdata", b"bigDATA"))
    faults = list(verify.verify(folder))
    assert len(faults) == 3 * 4
    for name, fault in zip(["json", "latent", "text", "tokens"], faults[::3], strict=True):
        assert f"key '00-3-000000': field {name}: expected b'" in fault
    write_set(folder.parent / "more", [make_examples(9)])
    path = folder.parent / "more" / "shard-000000.tar"
    rewrite(path.parent, path.name, path.read_bytes().replace(b"bigdata", b"bigDATA"))
    *_, last = faults = list(verify.verify(path.parent))
    assert len(faults) == 21
    assert last == f"{path}: and 16 more faults"


def test_unreadable_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "shard-000001.tar"

    def fail(self: Path, mode: str) -> None:
        raise OSError(5, "Input/output error", str(path))

    expected = [f"{path}: expected a readable file, found Input/output error"]
    whole = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r": (fail if self == path else whole)(self, mode)
    )
    faults = list(verify.verify(folder))
    assert faults[:1] == expected
    assert all("manifest.json: " in fault for fault in faults[1:])  # its totals lack that shard


@pytest.mark.parametrize(
    ("meta", "fault"),
    [
        ('{"captions":["a","b","c"]}', "expected captions and truncated, found KeyError"),
        ("[]", "expected captions and truncated, found TypeError"),
        ("{", "not JSON: "),
        ('{"captions":["a","b"],"truncated":[]}', "expected 3 captions, found 2"),
        ('{"captions":"abc","truncated":[]}', "expected a list of captions, found 'abc'"),
        (
            '{"captions":["a","b","c"],"truncated":[3]}',
            r"truncated: expected indices of captions, found [3]",
        ),
        (
            '{"captions":["a","b","c"],"truncated":[[]]}',
            r"truncated: expected indices of captions, found [[]]",
        ),
    ],
)
def test_malformed_json(folder: Path, meta: str, fault: str) -> None:
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    start = Manifest.load(folder).layouts[0].fields["json"].offset_bytes
    content[start : start + 512] = meta.encode().ljust(512)
    rewrite(folder, path.name, bytes(content))
    first, *rest = verify.verify(folder)
    assert f"{path}: key '00-3-000000': field json: {fault}" in first
    assert all("manifest.json: num_captions" in line for line in rest)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: d.update(num_captions=14), "num_captions: expected 13, found 14"),
        (lambda d: d.update(num_truncated=0), "num_truncated: expected 2, found 0"),
        (
            lambda d: d["latent_statistics"].update(scaling_factor=0.18215),
            "latent_statistics: scaling_factor: expected 0.",
        ),
        (
            lambda d: d["latent_statistics"]["mean"].__setitem__(2, 0.5),
            "latent_statistics: mean: expected [",
        ),
        (
            lambda d: d["latent_statistics"]["std"].pop(),
            "channels of latent_statistics: expected [4, 4], found [4, 3]",
        ),
    ],
)
def test_wrong_totals_in_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    edit_json(folder / "manifest.json", change)
    (found,) = verify.verify(folder)
    assert fault in found


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ('{"key": "00-2-000001", "reason": "x", "shard": null}', "expected no record of a quarant"),
        ('{"key": "a", "reason": "x","shard": null}', "expected the writer's formatting"),
        (
            '{"key": "a", "reason": "x", "shard": null}\n' * 2,
            "expected 1 different keys, found 1 in 2",
        ),
        ('{"key": "a", "reason": 1, "shard": null}', "line 1: reason: expected text, found 1"),
        ('{"key": "a", "reason": "x", "shard": 1.5}', "line 1: shard: expected an integer"),
        ("{", "line 1: not JSON"),
    ],
)
def test_quarantine(folder: Path, lines: str, fault: str) -> None:
    edit_json(folder / "manifest.json", lambda d: d.update(num_quarantined=1, num_source=6))
    rewrite(folder, "quarantine.jsonl", f"{lines.strip()}\n".encode())
    (found,) = verify.verify(folder)
    assert fault in found and found.startswith(f"{folder / 'quarantine.jsonl'}: ")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda rows: rows["captions"].fill(9),
            "row 1: expected the counts (4, 1, 128), found (9,",
        ),
        (lambda rows: rows["total"].fill(9), "row 0: total: expected ("),
        (lambda rows: rows["squares"].fill(0), "row 0: squares: expected ("),
    ],
)
def test_sums(folder: Path, change: Callable[[Any], object], fault: str) -> None:
    rows = np.load(folder / "shard_sums.npy")
    change(rows)
    np.save(folder / "shard_sums.npy", rows)
    update_hash(folder, "shard_sums.npy")
    faults = list(verify.verify(folder))
    assert any(f"shard_sums.npy: {fault}" in found for found in faults)
    np.save(folder / "shard_sums.npy", rows[:1])
    update_hash(folder, "shard_sums.npy")
    assert any("a row for each planned shard, found 1" in f for f in verify.verify(folder))


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        ("text_scale.npy", np.zeros(32, np.float32), "expected scales above 0, found 0.0"),
        ("text_scale.npy", np.full(32, np.inf, np.float32), "expected finite values, found NaN"),
        ("text_scale.npy", np.ones(16, np.float64), "expected array header"),
        ("empty_text.npy", np.full((7, 32), np.nan, np.float16), "expected finite values"),
        ("empty_text.npy", np.ones((32, 7), np.float16), "expected array header"),
        ("empty_tokens.npy", np.full(7, -1, np.int32), "expected ids of at least 0, found -1"),
    ],
)
def test_arrays_beside_the_shards(
    tmp_path: Path, name: str, array: np.ndarray[Any, Any], fault: str
) -> None:
    folder = tmp_path / "set"
    write_set(folder, [make_examples(2, text_dtype="int8")])
    np.save(tmp_path / name, array)
    rewrite(folder, name, (tmp_path / name).read_bytes())
    (found,) = verify.verify(folder)
    assert found.startswith(f"{folder / name}: {fault}")


@pytest.mark.parametrize("jobs", ["0", "many"])
def test_invalid_number_of_jobs(
    folder: Path, jobs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(verify, monkeypatch, folder, "--jobs", jobs)
    assert stopped.value.code == 2
    assert "--jobs: " in capsys.readouterr().err


def test_progress_bar_counts_bytes_and_can_be_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run_main(verify, monkeypatch, folder, "--quiet") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run_main(verify, monkeypatch, folder) == 0
    last = capsys.readouterr().err.split("\r")[-1].rstrip("\n")
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert "100%" in last and f"{size / 1000:.1f}k/" in last
    assert len(last) <= 80
