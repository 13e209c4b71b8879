"""Bucketed sets: their list, and batches that each come from one bucket."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards import summary, verify
from latent_t2i.shards.access import Access, make_loader, open_set
from latent_t2i.shards.buckets import BucketedShards, Buckets, finish_buckets, open_buckets
from latent_t2i.shards.loader import NUM_BUFFERS, BucketLoader, batches
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.remote.transport import RemoteError
from latent_t2i.shards.schema import FormatError, Manifest
from tests.servers import QUICK, Server, serve
from tests.shard_sets import (
    assert_batches_equal,
    collect,
    concatenate,
    edit_json,
    make_examples,
    make_identity,
    make_provenance,
    run_main,
    update_hash,
    write_buckets,
    write_set,
)

SIZES = {"64x64": (10, 7), "96x40": (9,), "40x96": (5, 4), "48x80": (3,)}
MAP = Access(kind="map")
BATCH = 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four buckets, one of them smaller than a batch."""
    folder = tmp_path_factory.mktemp("bucketed") / "train"
    write_buckets(folder, SIZES, quarantined={"bad": "not an image"}, views=2)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of the set that tests may damage."""
    copied = shutil.copytree(sound, tmp_path / "train")
    for path in copied.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copied


@pytest.fixture
def server(sound: Path) -> Iterator[Server]:
    """A server of the set."""
    with serve(sound) as served:
        yield served


def opened(location: Path | str, access: Access = MAP) -> BucketedShards:
    shards = open_set(str(location), access, retry=QUICK)
    assert isinstance(shards, BucketedShards)
    return shards


def loader_of(
    shards: BucketedShards,
    access: Access = MAP,
    *,
    rank: int = 0,
    num_processes: int = 1,
    **changes: Any,
) -> BucketLoader:
    order = shards.order(**({"batch_size": BATCH, "seed": 5} | changes))
    loader = make_loader(shards, order, access, rank=rank, num_processes=num_processes)
    assert isinstance(loader, BucketLoader)
    return loader


def change_list(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder / "buckets.json", change)


# The list


def test_list_round_trips_with_its_totals(tmp_path: Path) -> None:
    written = write_buckets(
        tmp_path / "set", {"64x64": (3,), "128x32": (2,), "32x128": (1,)}, quarantined={"a": "b"}
    )
    assert Buckets.load(tmp_path / "set") == written
    assert [bucket.name for bucket in written.buckets] == ["32x128", "64x64", "128x32"]
    assert [bucket.records for bucket in written.buckets] == [1, 3, 2]
    assert (written.num_source, written.num_records) == (7, 6)
    assert not list(tmp_path.rglob("*.part"))


def test_quarantined_images_of_a_bucket_count(tmp_path: Path) -> None:
    write_set(tmp_path / "64x64", [make_examples(2)], quarantined={"x": "broken", "y": "broken"})
    found = finish_buckets(tmp_path, ["64x64"], quarantined={"z": "too small"})
    assert (found.num_source, found.num_records, found.buckets[0].quarantined) == (5, 2, 2)
    assert found.read_quarantined() == {"z": "too small"}
    assert not list(verify.verify(tmp_path))


def test_list_does_not_depend_on_the_order_of_names(folder: Path) -> None:
    before = (folder / "buckets.json").read_bytes()
    finish_buckets(folder, [*SIZES][::-1], quarantined={"bad": "not an image"})
    assert (folder / "buckets.json").read_bytes() == before


def test_each_bucket_opens_as_a_set(sound: Path) -> None:
    for name in SIZES:
        shards = open_set(str(sound / name), MAP)
        assert isinstance(shards, ShardSet)
        width, height = (int(side) // 8 for side in name.split("x"))
        assert shards.manifest.latent_shape == (8, height, width)


def test_main_set_is_the_square_or_largest_bucket(sound: Path, tmp_path: Path) -> None:
    shards = open_buckets(sound)
    assert shards.manifest.latent_shape == (8, 8, 8)
    assert len(shards) == 38
    assert sorted(shards.latent_shapes) == [(8, 5, 12), (8, 8, 8), (8, 10, 6), (8, 12, 5)]
    assert torch.equal(shards.empty_text, shards.main.empty_text)
    write_buckets(tmp_path / "set", {"48x80": (2,), "80x48": (3,)})
    assert open_buckets(tmp_path / "set").manifest.latent_shape == (8, 6, 10)


def test_hash_changes_with_a_set(sound: Path, tmp_path: Path) -> None:
    first = open_buckets(sound).sha256
    second = write_buckets(tmp_path / "set", {**SIZES, "48x80": (4,)}, views=2).sha256
    assert first != second


def different(**changes: Any) -> Callable[[Path], object]:
    """Writes a bucket beside a square one, of another provenance."""
    text_dtype = changes.get("text_dtype", "float16")
    kind = changes.pop("kind", "moments")
    return lambda folder: write_set(
        folder,
        [make_examples(1, seed=9, size=(4, 16), text_dtype=text_dtype, kind=kind)],
        make_provenance(kind, **changes),
    )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (different(vae=make_identity("other")), "vae: expected v{64} as in 64x64, found o{64}"),
        (different(text_encoder=make_identity("x")), "text_encoder: expected t{64}"),
        (different(tokenizer=make_identity("x")), "tokenizer: expected t{64}"),
        (different(kind="plain"), "latent_kind: expected moments as in 64x64, found plain"),
        (different(text_dtype="int8"), "text_dtype: expected float16 .* found int8"),
        (different(max_tokens=6), "layout 0: expected latents, tokens"),
    ],
)
def test_finish_rejects_buckets_that_differ(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write_set(tmp_path / "64x64", [make_examples(1)])
    with pytest.raises(FormatError, match=message):
        write(tmp_path / "128x32")
        finish_buckets(tmp_path, ["64x64", "128x32"], quarantined={})
    assert not (tmp_path / "buckets.json").exists()


def test_finish_rejects_buckets_of_other_shapes(tmp_path: Path) -> None:
    long = [
        replace(e, text=np.repeat(e.text, 2, 1), tokens=np.repeat(e.tokens, 2, 1))
        for e in make_examples(1, seed=1)
    ]
    wide = [replace(e, text=np.repeat(e.text, 2, 2)) for e in make_examples(1, seed=2)]
    more = [replace(e, latent=np.repeat(e.latent, 2, 1)) for e in make_examples(1, seed=3)]
    views = make_examples(1, seed=4, views=2)
    cases = {
        "long": (long, make_provenance(max_tokens=14), "max_tokens: expected 7 .* found 14"),
        "wide": (wide, None, "text_width: expected 32 as in 64x64, found 64"),
        "more": (more, None, "latent_channels: expected 4 as in 64x64, found 8"),
        "views": (views, None, "num_views: expected 1 as in 64x64, found 2"),
        "flat": (make_examples(1, seed=5), None, "latents of 65x64 px over 8, .* found 8 x 8"),
    }
    for name, (examples, provenance, message) in cases.items():
        write_set(tmp_path / name / "64x64", [make_examples(1)])
        write_set(tmp_path / name / "65x64", [examples], provenance)
        with pytest.raises(FormatError, match=f"{name}: bucket 65x64: .*{message}"):
            finish_buckets(tmp_path / name, ["64x64", "65x64"], quarantined={})


def test_finish_rejects_different_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_buckets(tmp_path / "set", {"64x64": (2,), "128x32": (2,)}, text_dtype="int8")
    assert open_buckets(tmp_path / "set").text_scale is not None
    from tests import shard_sets

    scale = shard_sets.make_scale()
    monkeypatch.setattr(shard_sets, "make_scale", lambda width: scale._replace(scale=scale[0] * 2))
    write_set(tmp_path / "set" / "32x128", [make_examples(1, size=(16, 4), text_dtype="int8")])
    with pytest.raises(FormatError, match=r"bucket 64x64: text_scale: expected \w{64} as in 32x12"):
        finish_buckets(tmp_path / "set", ["64x64", "128x32", "32x128"], quarantined={})


@pytest.mark.parametrize("name", ["64", "064x64", "64x64/..", "64X64", "0x64"])
def test_finish_rejects_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="expected a bucket named WIDTHxHEIGHT, found '"):
        finish_buckets(tmp_path, [name], quarantined={})


def test_finish_rejects_unfinished_bucket(folder: Path) -> None:
    (folder / "48x80" / "manifest.json").unlink()
    with pytest.raises(FormatError, match=r"48x80/manifest.json: missing"):
        finish_buckets(folder, [*SIZES], quarantined={})
    with pytest.raises(FormatError, match="expected at least one, found none"):
        finish_buckets(folder, [], quarantined={})


def test_open_rejects_folder_without_list(folder: Path) -> None:
    (folder / "buckets.json").unlink()
    for attempt in (lambda: open_set(str(folder), MAP), lambda: open_shards(folder)):
        with pytest.raises(FormatError, match=r"missing \(stage one did not finish"):
            attempt()


def test_open_shards_explains_bucketed_sets(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"manifest.json: missing \(a bucketed set: open it with"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=3), "schema_version: expected 2 or 1, found 3"),
        (lambda d: d.update(num_source=40), "num_source: expected 39, found 40"),
        (lambda d: d.update(num_records=40), "num_records: expected 38, found 40"),
        (lambda d: d.update(buckets=[]), "buckets: expected at least one, found none"),
        (lambda d: d.pop("num_quarantined"), "missing key 'num_quarantined'"),
        (lambda d: d["buckets"][0].update(extra=1), r"buckets\[0\]: unknown key 'extra'"),
        (
            lambda d: d["buckets"][0].update(records="a"),
            r"buckets\[0\]\.records: expected an integer, found 'a'",
        ),
        (
            lambda d: d["buckets"][0].update(width_px=41),
            "bucket '40x96': expected the name '41x96' for its size",
        ),
        (
            lambda d: d["buckets"][0].update(d["buckets"][1]),
            "bucket '48x80': expected once, found twice",
        ),
        (
            lambda d: d["buckets"][0].update(sha256="0" * 64),
            "bucket 40x96: manifest.json: sha256: expected 0{64}, found",
        ),
        (
            lambda d: d.update(num_source=40) or d["buckets"][0].update(quarantined=1),
            "bucket 40x96: quarantined: expected 1, found 0",
        ),
    ],
)
def test_wrong_list_is_rejected(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_list(folder, change)
    with pytest.raises(FormatError, match=message):
        open_set(str(folder), MAP)
    assert list(verify.verify(folder))


def test_altered_list_is_rejected(folder: Path) -> None:
    path = folder / "buckets.json"
    path.write_text(path.read_text().replace('"num_source": 39', '"num_source": 38'))
    with pytest.raises(FormatError, match="the file was altered after it was written"):
        open_set(str(folder), MAP)


# verify and summary


def test_verify_passes_sound_set(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(verify, monkeypatch, sound) == 0
    assert capsys.readouterr().out == f"{sound}: 38 records in 4 buckets, no faults\n"


@pytest.mark.parametrize("name", SIZES)
def test_verify_finds_fault_in_any_set(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / name / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert run_main(verify, monkeypatch, folder, "--quiet") == 1
    assert f"fault: {path}: " in capsys.readouterr().out


def test_verify_finds_each_changed_byte_of_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_buckets(folder, {"64x64": (1,), "128x32": (1,)}, quarantined={"ä": "not an image"})
    path = folder / "buckets.json"
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert list(verify.verify(folder)), f"byte {place}"
    path.write_bytes(content)
    assert not list(verify.verify(folder))


@pytest.mark.parametrize("spoil", ["removed", "other", "reformatted"])
def test_verify_compares_manifests_with_the_list(folder: Path, tmp_path: Path, spoil: str) -> None:
    path = folder / "48x80" / "manifest.json"
    if spoil == "removed":
        path.unlink()
    elif spoil == "reformatted":
        path.write_text(json.dumps(json.loads(path.read_text())))
    else:
        shutil.rmtree(path.parent)
        write_set(path.parent, [make_examples(4, seed=77, views=2, size=(10, 6))])
    faults = "\n".join(verify.verify(folder))
    expected = {
        "removed": "manifest.json: missing",
        "reformatted": "bucket 48x80: manifest.json: sha256: expected",
        "other": "bucket 48x80: records: expected 3, found 4",
    }
    assert expected[spoil] in faults


def test_verify_finds_stray_files_and_duplicate_keys(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "8x8").mkdir()
    shutil.rmtree(folder / "48x80")
    write_set(folder / "48x80", [make_examples(3, views=2, size=(10, 6))])
    finish_buckets(folder, [*SIZES], quarantined={"00-3-000009": "twice"})
    faults = list(verify.verify(folder))
    for fault in ("notes.txt: not listed", "8x8: not listed", "a unique key, found it in"):
        assert any(fault in line for line in faults)
    assert "key '00-3-000009': expected no record of a quarantined image" in faults[-1]


def test_summary_describes_the_list_and_each_set(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(summary, monkeypatch, sound) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(sound)
    assert "  records         38 in 4 buckets, 1 quarantined" in lines
    table = [" ".join(line.split()) for line in lines[:12]]
    assert "48x80 3 7.89% 0 quarantined latents 6 x 10" in table
    assert "quarantined before bucketing: 1 images" in table
    for name in SIZES:
        assert str(sound / name) in lines
    assert max(len(line) for line in lines if str(sound) not in line) <= 80


def test_summary_of_unfinished_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "buckets.json").unlink()
    assert run_main(summary, monkeypatch, folder) == 2
    assert "buckets.json: missing (stage one did not finish" in capsys.readouterr().err


# Batches


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_ranks_of_bucketed_set_share_global_batches(sound: Path, num_processes: int) -> None:
    shards = open_buckets(sound)
    whole = collect(loader_of(shards), 0, 30)
    parts = [
        collect(loader_of(shards, rank=rank, num_processes=num_processes), 0, 30)
        for rank in range(num_processes)
    ]
    for step, batch in enumerate(whole):
        assert_batches_equal([concatenate([part[step] for part in parts])], [batch])


@given(
    seed=st.integers(0, 2**30),
    batch_size=st.integers(1, 12),
    last_batch=st.sampled_from(["fill", "drop"]),
    cut=st.integers(0, 40),
)
@settings(max_examples=25)
def test_resumed_bucketed_run_is_identical(
    sound: Path, seed: int, batch_size: int, last_batch: str, cut: int
) -> None:
    shards = open_buckets(sound)
    settings_ = {"seed": seed, "batch_size": batch_size, "last_batch": last_batch}
    loader = loader_of(shards, **settings_)
    whole = collect(loader, cut, cut + 4)
    again = loader_of(shards, **settings_)
    start = again.order.step(loader.order.cursor(cut))
    assert_batches_equal(collect(again, start + 2, start + 4), whole[2:])


@given(seed=st.integers(0, 2**30), batch_size=st.integers(1, 20), epoch=st.integers(0, 3))
@settings(max_examples=25)
def test_bucketed_epoch_has_every_record_once(
    sound: Path, seed: int, batch_size: int, epoch: int
) -> None:
    """Identifies records by their latents, and compares them with the order."""
    shards = open_buckets(sound)
    loader = loader_of(shards, seed=seed, batch_size=batch_size)
    found: dict[tuple[int, ...], list[str]] = {}
    for step, batch in enumerate(collect(loader, 0, loader.order.num_steps(epoch + 1))):
        records = loader.order.records(step)
        zeros = np.zeros(len(records))
        views = [shards.gather(records, zeros, zeros + view).latent for view in (0, 0.5)]
        same = [(batch.latent == view).flatten(1).all(1) for view in views]
        assert (same[0] | same[1]).all()
        found.setdefault(tuple(batch.latent.shape[1:]), []).extend(shards.keys(records))
    for shape, keys in found.items():
        num = len(set(keys))
        assert num == len(shards.sets[shards.latent_shapes.index(shape)])
        for start in range(0, (epoch + 1) * num, num):
            assert len(set(keys[start : start + num])) == num


def test_all_shapes_share_the_buffers(sound: Path) -> None:
    loader = loader_of(open_buckets(sound))
    places: list[int] = []
    shapes = set()
    for batch in batches(loader, start=0, stop=30):
        places.append(batch.latent.data_ptr())
        shapes.add(batch.latent.shape)
        assert batch.latent.is_contiguous()
    assert len(shapes) == len(SIZES)
    assert places == places[:NUM_BUFFERS] * 15
    assert loader.buffer().latent.shape == (BATCH, 8, 8, 8)


def test_nonfinite_keys_of_a_bucket(folder: Path) -> None:
    manifest = Manifest.load(folder / "96x40")
    layout = manifest.layouts[0]
    with (folder / "96x40" / "shard-000000.tar").open("r+b") as file:
        file.seek(2 * layout.record_bytes + layout.fields["latent"].offset_bytes)
        file.write(np.full(2 * 8 * 5 * 12, np.nan, np.float16).tobytes())
    update_hash(folder / "96x40", "shard-000000.tar")
    shards = open_buckets(folder)
    loader = loader_of(shards)
    steps = range(loader.order.num_steps(1))
    keys = {step: shards.keys(loader.order.records(step)) for step in steps}
    for step in steps:
        bad = [key for key in keys[step] if key == "10-3-000002"]
        assert loader.nonfinite_keys(step) == bad
    assert any("10-3-000002" in found for found in keys.values())


def test_gather_rejects_records_of_several_buckets(sound: Path) -> None:
    shards = open_buckets(sound)
    with pytest.raises(ValueError, match="expected records of one bucket, found 4 buckets"):
        shards.keys(np.arange(38))
    with pytest.raises(IndexError, match=r"expected records in 0\.\.37"):
        shards.keys(np.array([38]))


# Access


def cached(tmp_path: Path, cache_bytes: int = 10**9) -> Access:
    return Access(kind="cache", cache_dir=tmp_path / "cache", cache_bytes=cache_bytes)


@pytest.mark.parametrize("place", ["url", "folder"])
def test_cached_batches_equal_mapped_batches(
    sound: Path, server: Server, tmp_path: Path, place: str
) -> None:
    location = {"url": server.url, "folder": str(sound)}[place]
    access = cached(tmp_path)
    shards = opened(location, access)
    assert shards.sha256 == open_buckets(sound).sha256
    try:
        found = collect(loader_of(shards, access), 0, 25)
    finally:
        for part in shards.sets:
            part.close()  # type: ignore[attr-defined]
    assert_batches_equal(found, collect(loader_of(opened(sound)), 0, 25))
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) == 6


def test_cache_must_hold_all_buckets(server: Server, tmp_path: Path) -> None:
    access = cached(tmp_path, 100_000)
    shards = opened(server.url, access)
    with pytest.raises(
        ValueError, match=r"hold all 4 buckets of .* limited to 100000; use --data.cac"
    ):
        make_loader(shards, shards.order(batch_size=4, seed=0), access)
    assert not [name for name in server.asked if name.endswith(".tar")]
    for part in shards.sets:
        part.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["url", "folder"])
def test_bucketed_set_cannot_be_streamed(sound: Path, server: Server, place: str) -> None:
    location = {"url": server.url, "folder": str(sound)}[place]
    with pytest.raises(ValueError, match="a bucketed set, which cannot be streamed; use map"):
        open_set(location, Access(kind="stream"), retry=QUICK)


def test_remote_list_is_checked(folder: Path, tmp_path: Path) -> None:
    change_list(folder, lambda d: d.update(num_records=40))
    with (
        serve(folder) as served,
        pytest.raises(FormatError, match=rf"^{served.url}/buckets.json: num_records: exp"),
    ):
        open_set(served.url, cached(tmp_path), retry=QUICK)


def test_missing_remote_set_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=rf"^{server.url}/no/manifest.json: not found"):
        open_set(f"{server.url}/no", cached(tmp_path), retry=QUICK)


def test_bucketed_set_of_other_encoders_is_rejected(sound: Path) -> None:
    with pytest.raises(FormatError, match="vae: the shards were made with 'some/vae'"):
        open_set(str(sound), MAP, vae_sha256="0" * 64)


def test_open_verifies_every_bucket(folder: Path) -> None:
    path = folder / "40x96" / "shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"caption 1", b"caption 7"))
    open_set(str(folder), MAP)
    with pytest.raises(FormatError, match=r"40x96/shard-000001.tar: sha256"):
        open_set(str(folder), MAP, verify="full")


def test_order_has_the_sizes_of_all_shards(sound: Path) -> None:
    order = open_buckets(sound).order(batch_size=2, seed=3, shuffle="blocks", window_shards=1)
    assert [sizes.tolist() for sizes in order.sizes] == [[5, 4], [3], [10, 7], [9]]
    assert (order.batch_size, order.seed, order.shuffle, order.window_shards) == (2, 3, "blocks", 1)
