"""The writer: what it refuses, and what is left on disk when it is stopped."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.schema import Example, FormatError, Identity, Layout, make_layout
from shards.writer import ShardWriter, begin_set, finish_set, read_report
from tests.shard_sets import layout_of, make_examples, make_provenance, write_set


def write_shard(folder: Path, index: int, examples: list[Example], layout: Layout) -> None:
    with ShardWriter(folder, index, layout, "moments") as shard:
        for example in examples:
            shard.write(example)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, r"key 'a\.b': expected a key of the form"),
        ({"key": "00-3-000000"}, "key '00-3-000000': there are two records of this key"),
        (
            {"latent": np.zeros((1, 8, 4, 4), np.float16)},
            r"field latent: expected float16 \(1, 8, 8, 8\), found float16 \(1, 8, 4, 4\)",
        ),
        (
            {"tokens": np.zeros((3, 7), np.int64)},
            r"field tokens: expected int32 \(3, 7\), found int64 \(3, 7\)",
        ),
        (
            {"meta": {"captions": ["one"], "truncated": []}},
            "field json: expected 3 captions, found 1",
        ),
        (
            {"meta": {"captions": ["x" * 600] * 3, "truncated": []}},
            r"shard-000000\.tar: key '00-3-000001': field json: expected at most 512 bytes, found",
        ),
    ],
)
def test_examples_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    first, second = make_examples(2)
    begin_set(tmp_path / "set", make_provenance())
    with pytest.raises(FormatError, match=message):
        write_shard(tmp_path / "set", 0, [first, replace(second, **change)], layout_of([first]))
    assert names(tmp_path / "set") == ["progress/provenance.json"]


def test_nothing_has_its_name_before_it_is_whole(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard:
        shard.write(examples[0])
        assert names(tmp_path) == ["progress/provenance.json", "shard-000000.tar.part"]
    assert "shard-000000.tar" in names(tmp_path)
    assert "manifest.json" not in names(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, examples, layout_of(examples))
    assert names(tmp_path) == ["progress/provenance.json"]


def test_a_shard_without_records_leaves_its_reasons(tmp_path: Path) -> None:
    examples = make_examples(1)
    provenance = make_provenance()
    begin_set(tmp_path, provenance)
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard:
        shard.quarantine("bad", "not an image")
    assert read_report(tmp_path, 0) is not None
    empty = {"empty_text": examples[0].text[0], "empty_tokens": examples[0].tokens[0]}
    with pytest.raises(ValueError, match="no image could be written"):
        finish_set(tmp_path, provenance, num_shards=1, quarantined={}, **empty)
    write_shard(tmp_path, 1, examples, layout_of(examples))
    manifest = finish_set(
        tmp_path, provenance, num_shards=2, quarantined={"blank": "no caption"}, **empty
    )
    assert manifest.quarantined == {"blank": "no caption", "bad": "not an image"}
    assert (manifest.num_source, manifest.num_records) == (3, 1)
    assert [shard.name for shard in manifest.shards] == ["shard-000001.tar"]


def test_an_unfinished_shard_is_no_end(tmp_path: Path) -> None:
    examples = make_examples(1)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 1, examples, layout_of(examples))
    with pytest.raises(ValueError, match="shard 0 of 2 is not finished"):
        finish_set(
            tmp_path,
            make_provenance(),
            num_shards=2,
            quarantined={},
            empty_text=examples[0].text[0],
            empty_tokens=examples[0].tokens[0],
        )


def test_a_reported_shard_that_is_gone_is_not_finished(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 0, examples, layout_of(examples))
    assert read_report(tmp_path, 0) is not None
    assert read_report(tmp_path, 1) is None
    (tmp_path / "shard-000000.tar").unlink()
    assert read_report(tmp_path, 0) is None


def test_a_finished_set_is_known_again(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [make_examples(2)])
    (tmp_path / "progress").mkdir()  # as if killed just before it was removed
    assert begin_set(tmp_path, make_provenance()) == manifest
    assert not (tmp_path / "progress").exists()


def test_the_same_weights_from_elsewhere_are_the_same_set(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [make_examples(2)])
    moved = Identity(name="other/place", revision="main", sha256=manifest.vae.sha256)
    assert begin_set(tmp_path, make_provenance(vae=moved)) == manifest


def test_another_set_is_refused_with_both_values(tmp_path: Path) -> None:
    examples = make_examples(2)
    write_set(tmp_path / "finished", [examples])
    begin_set(tmp_path / "begun", make_provenance())
    write_shard(tmp_path / "begun", 0, examples, layout_of(examples))
    other = make_provenance(
        vae=Identity(name="other", revision="r1", sha256="w" * 64),
        max_tokens=5,
        preprocessing={"image_size_px": 128, "views": 1},
    )
    message = (
        rf"vae: found 'some/vae' \(sha256 {'v' * 64}\), "
        rf"asked for 'other' at r1 \(sha256 {'w' * 64}\); max_tokens: found 7, asked for 5; "
        r"preprocessing\.image_size_px: found 64, asked for 128: choose another folder"
    )
    for name in ("finished", "begun"):
        with pytest.raises(ValueError, match=message):
            begin_set(tmp_path / name, other)


def test_a_set_without_a_shard_may_be_begun_anew(tmp_path: Path) -> None:
    begin_set(tmp_path, make_provenance())
    assert begin_set(tmp_path, make_provenance(max_tokens=5)) is None


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="holds other files and no shards"):
        begin_set(tmp_path, make_provenance())


def test_data_is_aligned_for_mapping() -> None:
    layout = make_layout(latent=(1, 8, 8, 8), text=(5, 77, 768), json_bytes=1024)
    assert layout.record_bytes % 512 == 0
    assert all(field.offset_bytes % 64 == 0 for field in layout.fields.values())
