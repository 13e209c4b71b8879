"""Further arrays of each record: written, declared, checked and read by stock webdataset."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.reader import map_shard, open_shards
from latent_t2i.shards.schema import (
    Example,
    FileEntry,
    FormatError,
    Manifest,
    differences,
)
from latent_t2i.shards.summary import summarise
from latent_t2i.shards.verify import verify
from latent_t2i.shards.writer import begin_set
from tests.shard_sets import (
    edit_json,
    make_examples,
    make_fields,
    make_identity,
    make_provenance,
    read_stock,
    update_hash,
    write_buckets,
    write_set,
)

FIELDS = make_fields()
SCALE = np.linspace(0.5, 1, 6, dtype=np.float32)


@pytest.fixture
def examples() -> list[Example]:
    """Five images with three captions and three with two, of which one has the longest key."""
    first, *rest = make_examples(5, num_captions=3, views=2, fields=FIELDS)
    second = make_examples(3, num_captions=2, views=2, fields=FIELDS)
    return [replace(first, key=80 * "k"), *rest, *second]


@pytest.fixture
def folder(tmp_path: Path, examples: list[Example]) -> Path:
    shards = [examples[:5], examples[5:]]
    provenance = make_provenance(fields=FIELDS)
    write_set(tmp_path / "set", shards, provenance, field_scales={"clip": SCALE})
    for path in (tmp_path / "set").iterdir():
        path.chmod(0o644)
    return tmp_path / "set"


def test_fields_round_trip(folder: Path, examples: list[Example]) -> None:
    assert not list(verify(folder))
    manifest = open_shards(folder, verify="full").manifest
    assert [replace(spec, scale=None) for spec in manifest.fields] == list(FIELDS)
    np.testing.assert_array_equal(np.load(folder / "clip_scale.npy"), SCALE)
    names = [f"{spec.name}.npy" for spec in FIELDS]
    samples = read_stock(folder)
    for example, sample in zip(examples, samples, strict=True):
        arrays = [name for name in sample if name.endswith(".npy")]
        assert arrays == ["latent.npy", "text.npy", "tokens.npy", *names]
        for name in ("latent", "text", "tokens"):
            np.testing.assert_array_equal(sample[f"{name}.npy"], getattr(example, name))
        for name, array in example.extra.items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], array, strict=True)


def test_fields_of_a_mapped_shard(folder: Path, examples: list[Example]) -> None:
    manifest = Manifest.load(folder)
    entry = manifest.shards[1]
    found = map_shard(folder / entry.name, entry, manifest.layouts[entry.layout])
    for name in examples[0].extra:
        expected = np.stack([example.extra[name] for example in examples[5:]])
        np.testing.assert_array_equal(found[name], expected, strict=True)


def test_gather_is_the_same_as_without_fields(
    folder: Path, tmp_path: Path, examples: list[Example]
) -> None:
    plain = [replace(example, extra={}) for example in examples]
    write_set(tmp_path / "plain", [plain[:5], plain[5:]])
    u = np.linspace(0, 0.99, 8)
    batches = [
        open_shards(path).gather(np.arange(8), u, u) for path in (folder, tmp_path / "plain")
    ]
    for name in ("latent", "text"):
        np.testing.assert_array_equal(*(getattr(batch, name) for batch in batches))


def test_summary_shows_fields(folder: Path) -> None:
    lines = list(summarise(folder, num_sample=9, num_captions=0))
    shown = " ".join(" ".join(lines).split())
    assert "clip int8 2 x 6 per record, scaled by clip_scale.npy, made by some/features" in shown
    assert "view box int32 6 per view, made by" in shown
    sizes = {
        line.split()[0]: line.split()[1] for line in lines if "per record" in line and "%" in line
    }
    assert sizes["pooled"] == str((5 * 3 + 3 * 2) * 5 * 2)
    (total,) = [line for line in lines if line.startswith("  total ")]
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert total.split()[1] == f"{num_bytes:,}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pooled": None},
            r"further fields: expected \['a_n+', 'clip', .*\], found \['a_n+', 'cli",
        ),
        ({"other": np.zeros(1)}, r"further fields: expected \[.*\], found \[.*'other'"),
        (
            {"clip": np.zeros((2, 7), np.int8)},
            r"field clip: expected int8 \(2, 6\), found int8 \(2, 7\)",
        ),
        (
            {"view_box": np.zeros((2, 6), np.int64)},
            r"field view_box: expected int32 \(2, 6\), found int64 \(2, 6\)",
        ),
        (
            {"pooled": np.full((3, 5), np.inf, np.float16)},
            "field pooled: expected finite values, found NaN or infinity",
        ),
    ],
)
def test_writer_rejects_other_arrays(
    tmp_path: Path, examples: list[Example], changes: dict[str, Any], message: str
) -> None:
    arrays = {**examples[1].extra, **changes}
    extra = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(FormatError, match=f"key '00-3-000001': {message}"):
        write_set(
            tmp_path,
            [[examples[0], replace(examples[1], extra=extra)]],
            make_provenance(fields=FIELDS),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "text"}, "field 'text': expected unique names .* other than json, latent, text"),
        ({"name": "pooled"}, "field 'pooled': expected unique names"),
        ({"name": "a.b"}, r"field 'a\.b': expected unique names of the form"),
        ({"name": "Big"}, "field 'Big': expected unique names of the form"),
        ({"name": 16 * "a"}, "field 'a+': expected unique names of the form"),
        ({"shape": ()}, r"shape: expected at least one axis, .* found \(\)"),
        ({"shape": (3, 0)}, r"shape: expected at least one axis, .* found \(3, 0\)"),
    ],
)
def test_fields_that_the_format_does_not_allow(
    tmp_path: Path, folder: Path, change: dict[str, Any], message: str
) -> None:
    wrong = (replace(FIELDS[0], **change), *FIELDS[1:])
    with pytest.raises(FormatError, match=message):
        begin_set(tmp_path / "new", make_provenance(fields=wrong))
    edit_json(folder / "manifest.json", lambda d: d["fields"][0].update(change))
    with pytest.raises(FormatError, match=message):
        open_shards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["fields"].pop(), r"layout 0: expected fields \[.*\], found \[.*'mask'\]"),
        (lambda d: d["fields"][1].update(shape=[6]), r"layout 0: expected .* for these shapes"),
        (lambda d: d["fields"][1].update(per="record"), "layout 0: expected .* for these shapes"),
        (lambda d: d["fields"][1].update(dtype="float64"), r"fields\[1\]\.dtype: expected 'uint8'"),
        (
            lambda d: d["fields"][1].update(scale={"name": "x.npy", "bytes": 1, "sha256": ""}),
            "scale: expected none for float16, only for int8",
        ),
        (
            lambda d: d["fields"][2]["scale"].update(name="shards.npy"),
            "unique file names of the form .*, found 'shards.npy'",
        ),
    ],
)
def test_manifest_with_other_fields(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_json(folder / "manifest.json", change)
    with pytest.raises(FormatError, match=message):
        open_shards(folder)


def test_verify_checks_fields(folder: Path) -> None:
    manifest = Manifest.load(folder)
    layout, path = manifest.layouts[0], folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    for record, name in ((1, FIELDS[0].name), (2, "pooled")):
        part = layout.fields[name]
        start = record * layout.record_bytes + part.offset_bytes
        content[start : start + part.num_bytes] = np.full(part.shape, np.nan, part.dtype).tobytes()
    content[layout.fields["clip"].offset_bytes - 1] ^= 1
    path.write_bytes(content)
    update_hash(folder, path.name)
    faults = "\n".join(verify(folder))
    assert f"key '00-3-000001': field {FIELDS[0].name}: expected finite values" in faults
    assert "key '00-3-000002': field pooled: expected finite values" in faults
    assert f"key '{80 * 'k'}': field clip: expected array header" in faults


def test_scales_of_fields(tmp_path: Path, folder: Path, examples: list[Example]) -> None:
    for scales, message in (
        ({"clip": SCALE[:5]}, r"expected float32 for int8 fields only, .* found float32 \(5,\)"),
        ({"pooled": SCALE[:5]}, "for pooled"),
        ({"clip": -SCALE}, "field_scales: clip: expected finite values above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            write_set(
                tmp_path / "other",
                [examples[:5]],
                make_provenance(fields=FIELDS),
                field_scales=scales,
            )
    np.save(folder / "clip_scale.npy", -SCALE)
    update_hash(folder, "clip_scale.npy")
    (fault,) = verify(folder)
    assert fault.endswith("clip_scale.npy: expected scales above 0, found -1.0")


def test_differences_ignore_names_and_scales_of_fields() -> None:
    ours = make_provenance(fields=FIELDS)
    scaled = replace(FIELDS[2], scale=FileEntry(name="clip_scale.npy", bytes=1, sha256="0"))
    moved = replace(FIELDS[0], made_by=replace(FIELDS[0].made_by, name="elsewhere"))
    assert not differences(make_provenance(fields=(moved, FIELDS[1], scaled, *FIELDS[3:])), ours)
    for change in ({"shape": (9,)}, {"per": "record"}, {"made_by": make_identity("x")}):
        other = make_provenance(fields=(replace(FIELDS[0], **change), *FIELDS[1:]))
        (line,) = differences(other, ours)
        assert line.startswith("fields: found [('a_n")
    assert len(differences(make_provenance(), ours)) == 1


def test_finished_set_is_kept(folder: Path) -> None:
    """The manifest has a scale that the command's fields do not have yet."""
    assert begin_set(folder, make_provenance(fields=FIELDS)) == Manifest.load(folder)


def test_buckets_have_the_same_fields(tmp_path: Path) -> None:
    sizes = {"64x64": (2,), "128x32": (1,)}
    provenance = make_provenance(fields=FIELDS)
    write_buckets(tmp_path / "set", sizes, provenance, fields=FIELDS)
    assert not list(verify(tmp_path / "set"))
    write_set(tmp_path / "set/32x128", [make_examples(1, size=(16, 4), seed=7)])
    with pytest.raises(FormatError, match="bucket 64x64: fields: expected "):
        finish_buckets(tmp_path / "set", ["32x128", *sizes], quarantined={})
