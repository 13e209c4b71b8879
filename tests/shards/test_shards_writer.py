"""The writer: errors, and the files on disk after an interruption."""

import errno
import json
import os
import re
import string
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards import writer
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import (
    Example,
    FormatError,
    Identity,
    LatentKind,
    Layout,
    Manifest,
    make_layout,
)
from latent_t2i.shards.shard_sums import read_sums, sums_of
from latent_t2i.shards.verify import verify
from latent_t2i.shards.writer import (
    FoundScale,
    ShardReport,
    ShardWriter,
    begin_set,
    finish_set,
    keep_text_scale,
    read_report,
    read_text_scale,
)
from tests.shard_sets import (
    TEXT_WIDTH,
    layout_of,
    make_examples,
    make_provenance,
    make_scale,
    read_stock,
    write_set,
)


def write_shard(folder: Path, index: int, examples: list[Example], layout: Layout) -> None:
    with ShardWriter(folder, index, layout, "moments") as shard:
        for example in examples:
            shard.write(example)


def finish(folder: Path, *examples: Example, **changes: Any) -> Manifest:
    """Finishes a set of one shard."""
    first = examples[0]
    settings = {"num_shards": 1, "quarantined": {}, "empty_text": first.text[0].astype(np.float16)}
    provenance = make_provenance(text_dtype=first.text.dtype.name)
    values = settings | {"provenance": provenance, "empty_tokens": first.tokens[0]} | changes
    return finish_set(folder, **values)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, r"key 'a\.b': expected a key of the form"),
        ({"key": "00-3-000000"}, "key '00-3-000000': expected unique keys, found this one twice"),
        (
            {"latent": np.zeros((1, 8, 4, 4), np.float16)},
            r"field latent: expected float16 \(1, 8, 8, 8\), found float16 \(1, 8, 4, 4\)",
        ),
        (
            {"tokens": np.zeros((3, 7), np.int64)},
            r"field tokens: expected int32 \(3, 7\), found int64 \(3, 7\)",
        ),
        (
            {"text": np.zeros((3, 7, 32), np.int8)},
            r"field text: expected float16 \(3, 7, 32\), found int8 \(3, 7, 32\)",
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
def test_write_rejects_bad_examples(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    first, second = make_examples(2)
    begin_set(tmp_path / "set", make_provenance())
    with pytest.raises(FormatError, match=message):
        write_shard(tmp_path / "set", 0, [first, replace(second, **change)], layout_of([first]))
    assert names(tmp_path / "set") == ["progress/provenance.json"]


def test_final_names_are_for_complete_files_only(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard:
        shard.write(examples[0])
        _, temporary = names(tmp_path)
        assert re.fullmatch(r"shard-000000\.tar\.\d+(-[0-9a-f]{8}){2}\.part", temporary)
    assert "shard-000000.tar" in names(tmp_path)
    assert "manifest.json" not in names(tmp_path)


def test_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, examples, layout_of(examples))
    assert names(tmp_path) == ["progress/provenance.json"]


def test_shard_without_records_keeps_its_reasons(tmp_path: Path) -> None:
    examples = make_examples(1)
    begin_set(tmp_path, make_provenance())
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard:
        shard.quarantine("bad", "not an image")
    assert read_report(tmp_path, 0) is not None
    with pytest.raises(ValueError, match="no image was written"):
        finish(tmp_path, *examples)
    write_shard(tmp_path, 1, examples, layout_of(examples))
    manifest = finish(tmp_path, *examples, num_shards=2, quarantined={"blank": "no caption"})
    assert manifest.read_quarantined() == {"blank": "no caption", "bad": "not an image"}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["shard"] for line in lines] == [None, 0]
    assert (manifest.num_source, manifest.num_records) == (3, 1)
    assert [shard.name for shard in manifest.shards] == ["shard-000001.tar"]


def test_files_of_a_killed_finish_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the files that the manifest hashes and the manifest."""
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 0, examples, layout_of(examples))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "dump", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(tmp_path, *examples, quarantined={"a": "first"})
    assert {"quarantine.jsonl", "shards.npy", "shard_sums.npy"} < {*names(tmp_path)}
    assert "manifest.json" not in names(tmp_path)
    begin_set(tmp_path, make_provenance())
    manifest = finish(tmp_path, *examples, quarantined={"b": "second", "c": "third"})
    assert manifest.read_quarantined() == {"b": "second", "c": "third"}
    assert not list(verify(tmp_path))


def test_sums_are_kept_by_planned_shard(tmp_path: Path) -> None:
    """Also for a planned shard without records, whose images were all quarantined."""
    examples = make_examples(3)
    begin_set(tmp_path, make_provenance())
    for index, part in ((0, examples[:1]), (2, examples[1:])):
        write_shard(tmp_path, index, part, layout_of(examples))
    with ShardWriter(tmp_path, 1, layout_of(examples), "moments") as shard:
        shard.quarantine("bad", "not an image")
    reports = [read_report(tmp_path, index) for index in range(3)]
    manifest = finish(tmp_path, *examples, num_shards=3)
    rows = read_sums(tmp_path, manifest)
    assert [sums_of(row) for row in rows] == [report.sums for report in reports if report]
    assert rows["captions"].tolist() == [3, 0, 6]
    assert rows["truncated"].sum() == manifest.num_truncated
    assert not list(verify(tmp_path))


def test_finish_rejects_missing_shard(tmp_path: Path) -> None:
    examples = make_examples(1)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 1, examples, layout_of(examples))
    with pytest.raises(ValueError, match="shard 0 of 2 is not finished"):
        finish(tmp_path, *examples, num_shards=2)


def test_report_of_deleted_shard_is_ignored(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 0, examples, layout_of(examples))
    assert read_report(tmp_path, 0) is not None
    assert read_report(tmp_path, 1) is None
    (tmp_path / "shard-000000.tar").unlink()
    assert read_report(tmp_path, 0) is None


def test_begin_returns_manifest_of_finished_set(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [make_examples(2)])
    (tmp_path / "progress").mkdir()  # as if killed before its removal
    assert begin_set(tmp_path, make_provenance()) == manifest
    assert not (tmp_path / "progress").exists()


def test_encoders_are_compared_by_hash(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [make_examples(2)])
    moved = Identity(name="other/place", revision="main", sha256=manifest.vae.sha256)
    assert begin_set(tmp_path, make_provenance(vae=moved)) == manifest


def test_begin_rejects_another_set_with_both_values(tmp_path: Path) -> None:
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
        rf"expected 'other' at r1 \(sha256 {'w' * 64}\); max_tokens: found 7, expected 5; "
        r"preprocessing\.image_size_px: found 64, expected 128: choose another folder"
    )
    for name in ("finished", "begun"):
        with pytest.raises(ValueError, match=message):
            begin_set(tmp_path / name, other)


def test_begin_replaces_set_without_shards(tmp_path: Path) -> None:
    begin_set(tmp_path, make_provenance())
    assert begin_set(tmp_path, make_provenance(max_tokens=5)) is None


def test_begin_rejects_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="contains files but no shards"):
        begin_set(tmp_path, make_provenance())


def test_fields_are_aligned() -> None:
    layout = make_layout(latent=(1, 8, 8, 8), text=(5, 77, 768), json_bytes=1024)
    assert layout.record_bytes % 512 == 0
    assert all(field.offset_bytes % 64 == 0 for field in layout.fields.values())


@st.composite
def sets_of_one_shard(draw: st.DrawFn) -> tuple[LatentKind, list[Example]]:
    """Examples of any shape that the format allows, for all kinds of latents and text."""
    kind: LatentKind = draw(st.sampled_from(["moments", "plain"]))
    views, channels, height, breadth = draw(st.tuples(st.integers(1, 2), *[st.integers(1, 5)] * 3))
    latent = (views, 2 * channels if kind == "moments" else channels, height, breadth)
    captions, tokens = draw(st.integers(1, 7)), draw(st.integers(1, 77))
    text = (captions, tokens, draw(st.integers(1, 9)))
    dtype = draw(st.sampled_from(["float16", "int8"]))
    most = 127 if dtype == "int8" else 60000
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    keys = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=80)
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    more = st.dictionaries(words, st.none() | st.integers() | words, max_size=2)
    return kind, [
        Example(
            key=key,
            latent=(rng.choice([-1, 1], latent) * 2.0 ** rng.uniform(-24, 15, latent)).astype(
                np.float16
            ),
            text=rng.uniform(-most, most, text).astype(dtype),
            tokens=rng.integers(-(2**31), 2**31, (captions, tokens)).astype(np.int32),
            meta={"captions": [draw(words) for _ in range(captions)], "truncated": []}
            | {"more": draw(more)},
        )
        for key in draw(st.lists(keys, min_size=1, max_size=3, unique=True))
    ]


@settings(max_examples=50)
@given(made=sets_of_one_shard())
def test_all_shapes_and_dtypes_round_trip(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[LatentKind, list[Example]]
) -> None:
    """Compares every caption and view, read by our reader and by stock WebDataset."""
    kind, examples = made
    latents, texts = examples[0].latent, examples[0].text
    folder = tmp_path_factory.mktemp("set")
    changes = {"max_tokens": texts.shape[1], "text_dtype": texts.dtype.name}
    manifest = write_set(folder, [examples], make_provenance(kind, **changes))
    assert manifest.layouts == (layout_of(examples),)
    assert (manifest.num_views, manifest.latent_shape) == (len(latents), latents.shape[1:])
    shards = open_shards(folder, fields=("latent", "text", "tokens"), verify="full")
    samples = read_stock(folder)
    assert len(shards) == len(samples) == len(examples)
    for record, (example, sample) in enumerate(zip(examples, samples, strict=True)):
        assert shards.meta(record) == sample["json"] == example.meta
        for name in ("latent", "text", "tokens"):
            assert sample[f"{name}.npy"].dtype == getattr(example, name).dtype
            np.testing.assert_array_equal(sample[f"{name}.npy"], getattr(example, name))
        for caption, view in np.ndindex(len(texts), len(latents)):
            u = (np.array([(caption + 0.5) / len(texts)]), np.array([(view + 0.5) / len(latents)]))
            batch = shards.gather(np.array([record]), *u)
            assert batch.text.numpy().dtype == example.text.dtype
            np.testing.assert_array_equal(batch.text[0], example.text[caption])
            np.testing.assert_array_equal(batch.extra["tokens"][0], example.tokens[caption])
            np.testing.assert_array_equal(batch.latent[0], example.latent[view])


def test_int8_text_round_trips_with_its_scale(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, [make_examples(3, text_dtype="int8")])
    assert manifest.text_dtype == "int8" and manifest.text_scale is not None
    assert (manifest.text_scale.relative_error, manifest.text_scale.num_captions) == (0.01, 9)
    shards = open_shards(tmp_path, verify="full")
    assert shards.text_scale is not None
    np.testing.assert_array_equal(shards.text_scale, make_scale().scale)
    assert shards.empty_text.dtype.itemsize == 2  # the empty prompt is not quantized
    assert Manifest.load(tmp_path) == manifest
    assert "text_scale.npy" in names(tmp_path)


def test_stored_scale_is_bit_exact(tmp_path: Path) -> None:
    provenance = make_provenance(text_dtype="int8")
    begin_set(tmp_path, provenance)
    assert read_text_scale(tmp_path) is None
    scale = np.random.default_rng(0).lognormal(0, 9, 768).astype(np.float32)
    keep_text_scale(tmp_path, FoundScale(scale, 0.1 + 0.2, 7))
    assert begin_set(tmp_path, provenance) is None
    found = read_text_scale(tmp_path)
    assert found is not None and found[1:] == (0.1 + 0.2, 7)
    assert found.scale.tobytes() == scale.tobytes()


def test_stored_scale_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_set(tmp_path, make_provenance(text_dtype="int8"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            keep_text_scale(tmp_path, make_scale())
    assert read_text_scale(tmp_path) is None


def test_scale_of_another_set_is_discarded(tmp_path: Path) -> None:
    begin_set(tmp_path, make_provenance(text_dtype="int8"))
    keep_text_scale(tmp_path, make_scale())
    begin_set(tmp_path, make_provenance(text_dtype="int8", max_tokens=5))
    assert read_text_scale(tmp_path) is None


def test_begin_rejects_shards_without_scale(tmp_path: Path) -> None:
    examples = make_examples(2, text_dtype="int8")
    provenance = make_provenance(text_dtype="int8")
    begin_set(tmp_path, provenance)
    write_shard(tmp_path, 0, examples, layout_of(examples))
    with pytest.raises(ValueError, match=r"text_scale\.json: missing, but finished shards depend"):
        begin_set(tmp_path, provenance)


def test_begin_rejects_progress_of_another_release(tmp_path: Path) -> None:
    examples = make_examples(1)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 0, examples, layout_of(examples))
    noted = tmp_path / "progress/provenance.json"
    noted.write_text(noted.read_text().replace('"text_dtype"', '"text_kind"'))
    with pytest.raises(ValueError, match=r"provenance\.json: written by another release"):
        begin_set(tmp_path, make_provenance())


@pytest.mark.parametrize(
    ("stored", "changes", "message"),
    [
        ("int8", {"text_scale": None}, "text_scale: expected one for int8 .* found none for int8"),
        ("float16", {"text_scale": make_scale()}, "none for float16, found one for float16"),
        (
            "float16",
            {"provenance": make_provenance(text_dtype="int8"), "text_scale": make_scale()},
            "text_dtype: found 'float16', expected 'int8'",
        ),
        (
            "int8",
            {"text_scale": make_scale(TEXT_WIDTH + 1)},
            r"text_scale: expected float32 \(32,\), found float32 \(33,\)",
        ),
        (
            "int8",
            {"text_scale": FoundScale(np.zeros(TEXT_WIDTH, np.float32), 0.01, 9)},
            "text_scale: expected finite values above 0",
        ),
    ],
)
def test_finish_rejects_mismatched_text_and_scale(
    tmp_path: Path, stored: Any, changes: dict[str, Any], message: str
) -> None:
    examples = make_examples(2, text_dtype=stored)
    begin_set(tmp_path, make_provenance(text_dtype=stored))
    write_shard(tmp_path, 0, examples, layout_of(examples))
    with pytest.raises(ValueError, match=message):
        finish(tmp_path, *examples, **changes)
    assert not (tmp_path / "manifest.json").exists()


def write_twice(folder: Path, first: list[Example], second: list[Example]) -> None:
    """Writes one shard by two writers that are open at the same time."""
    begin_set(folder, make_provenance())
    writers = [ShardWriter(folder, 0, layout_of(first), "moments").__enter__() for _ in range(2)]
    for shard, examples in zip(writers, (first, second), strict=True):
        for example in examples:
            shard.write(example)
    for shard in writers:
        shard.__exit__(None, None, None)


@pytest.mark.parametrize("has_links", [True, False])
def test_two_writers_of_one_shard_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:

        def fail(source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("os.link", fail)
    examples = make_examples(4)
    manifest = write_set(tmp_path / "whole", [examples])
    write_twice(tmp_path / "set", examples, examples)
    content = (tmp_path / "set/shard-000000.tar").read_bytes()
    assert content == (tmp_path / "whole/shard-000000.tar").read_bytes()
    report = read_report(tmp_path / "set", 0)
    assert report is not None and report.sha256 == manifest.shards[0].sha256
    assert finish(tmp_path / "set", *examples).shards == manifest.shards
    assert not list((tmp_path / "set").rglob("*.part"))


def test_first_of_two_different_shards_is_kept(tmp_path: Path) -> None:
    first, second = make_examples(4), make_examples(4, seed=1)
    with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256: .* another process wrote"):
        write_twice(tmp_path / "set", first, second)
    manifest = write_set(tmp_path / "whole", [first])
    assert finish(tmp_path / "set", *first).shards == manifest.shards
    assert not list((tmp_path / "set").rglob("*.part"))


@pytest.mark.parametrize("is_reported", [False, True])
def test_a_late_report_of_a_shard_that_another_host_has_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_reported: bool
) -> None:
    """It deleted the shard of the first host, which had no report yet, and wrote other bytes."""
    first, second = make_examples(4), make_examples(4, seed=1)
    begin_set(tmp_path / "set", make_provenance())
    original = writer._publish_report

    def late(folder: Path, index: int, report: ShardReport) -> None:
        monkeypatch.setattr(writer, "_publish_report", original)
        begin_set(folder, make_provenance())
        if not is_reported:  # the second host is as late as the first
            monkeypatch.setattr(
                writer,
                "_publish_report",
                lambda *rest: (original(folder, index, report), original(*rest)),
            )
        write_shard(folder, 0, second, layout_of(second))
        original(folder, index, report)

    monkeypatch.setattr(writer, "_publish_report", late)
    write_shard(tmp_path / "set", 0, first, layout_of(first))
    finish(tmp_path / "set", *second)
    assert list(verify(tmp_path / "set")) == []


def test_a_shard_that_fits_no_report_is_an_error(tmp_path: Path) -> None:
    examples = make_examples(4)
    begin_set(tmp_path, make_provenance())
    write_shard(tmp_path, 0, examples, layout_of(examples))
    report = read_report(tmp_path, 0)
    assert report is not None
    (tmp_path / "shard-000000.tar").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"shard-000000\.tar: sha256: expected 0+, found 2d71"):
        writer._publish_report(tmp_path, 0, replace(report, sha256="0" * 64))


def test_bytes_that_change_before_publishing_are_noticed(tmp_path: Path) -> None:
    examples = make_examples(8)
    begin_set(tmp_path, make_provenance())
    with (
        pytest.raises(OSError, match="the disk returns other bytes than were written"),
        ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard,
    ):
        for example in examples:
            shard.write(example)
        (path,) = tmp_path.glob("*.part")
        shard._file.sync()
        with path.open("r+b") as file:
            file.write(b"X")
    assert names(tmp_path) == ["progress/provenance.json"]


def test_begin_deletes_temporary_files_of_killed_processes_only(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard:
        (path,) = tmp_path.glob("*.part")
        stale = path.with_name(path.name.replace("shard-000000", "shard-000001"))
        stale.touch()
        (tmp_path / "movie.part").touch()
        shard.write(examples[0])
        begin_set(tmp_path, make_provenance())
        assert not stale.exists()
        assert (tmp_path / "movie.part").exists()
    assert read_report(tmp_path, 0) is not None


def test_temporary_files_of_another_host_are_deleted_after_an_hour(tmp_path: Path) -> None:
    """Its lock may not be visible: NFS with nolock and Lustre with localflock lock locally."""
    begin_set(tmp_path, make_provenance())
    path = tmp_path / "shard-000001.tar.123-0123abcd-0123abcd.part"
    path.touch()
    begin_set(tmp_path, make_provenance())
    assert path.exists()
    os.utime(path, (time.time() - 3700,) * 2)
    begin_set(tmp_path, make_provenance())
    assert not path.exists()
    path.touch()
    write_shard(tmp_path, 0, make_examples(2), layout_of(make_examples(2)))
    finish(tmp_path, *make_examples(2))
    assert not path.exists()


def test_a_shard_that_ends_after_its_set_is_finished_changes_nothing(tmp_path: Path) -> None:
    """One rank started twice, on hosts that do not see each other's locks."""
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as late:
        for example in examples:
            late.write(example)
        write_shard(tmp_path, 0, examples, layout_of(examples))
        manifest = finish(tmp_path, *examples)
        whole = names(tmp_path)
    assert begin_set(tmp_path, make_provenance()) == manifest
    assert [name for name in whole if ".part" not in name] == names(tmp_path)


def test_finish_rejects_folder_that_another_command_has_begun(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance())
    begin_set(tmp_path, make_provenance(records_per_shard=9))
    write_shard(tmp_path, 0, examples, layout_of(examples))
    with pytest.raises(ValueError, match="records_per_shard: found 9, expected 4"):
        finish(tmp_path, *examples)


def test_unreported_shard_of_another_set_is_replaced(tmp_path: Path) -> None:
    examples = make_examples(2)
    begin_set(tmp_path, make_provenance(records_per_shard=9))
    (tmp_path / "shard-000000.tar").write_bytes(b"x")
    begin_set(tmp_path, make_provenance())
    assert names(tmp_path) == ["progress/provenance.json"]
    write_shard(tmp_path, 0, examples, layout_of(examples))
    finish(tmp_path, *examples)


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("num_reported", [0, 1])
def test_begin_deletes_shards_without_a_report_unless_in_use(
    tmp_path: Path, num_reported: int, in_use: bool
) -> None:
    """A process was killed between a shard's link and its report."""
    begin_set(tmp_path, make_provenance())
    layout = layout_of(make_examples(2))
    for index in range(num_reported + 1):
        write_shard(tmp_path, index, make_examples(2), layout)
    (tmp_path / "progress" / f"shard-{num_reported:06d}.json").unlink()
    begin_set(tmp_path, make_provenance(), in_use=in_use)
    shards = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert shards == [f"shard-{index:06d}.tar" for index in range(num_reported + in_use)]
