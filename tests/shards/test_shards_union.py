"""Several sets as one: the order and batches of one set, weights, caches, buckets, refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards import summary, verify
from latent_t2i.shards.access import Access, make_loader, open_sets, stores_of
from latent_t2i.shards.buckets import BucketedShards, finish_buckets
from latent_t2i.shards.joining import Shards
from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.mixed_order import MixedOrder
from latent_t2i.shards.order import choices
from latent_t2i.shards.reader import RawBatch, ShardSet, open_shards
from latent_t2i.shards.remote.cache import CachedShards
from latent_t2i.shards.remote.store import locked
from latent_t2i.shards.schema import FormatError
from latent_t2i.shards.union import UnionShards
from tests.servers import Server, serve
from tests.shard_sets import (
    assert_batches_equal,
    collect,
    concatenate,
    make_examples,
    make_provenance,
    run_main,
    write_buckets,
    write_set,
)
from tests.tiny import plant_nan

SIZES = {"a": (4, 4, 2), "b": (4, 3), "c": (5,)}
MAP = Access(kind="map")


def write_sized(folder: Path, sizes: Sequence[int], first_seed: int, **changes: Any) -> None:
    """Writes a set with shards of these sizes; another first seed gives other keys."""
    shards = [make_examples(num, seed=seed) for seed, num in enumerate(sizes, start=first_seed)]
    write_set(folder, shards, make_provenance(**changes) if changes else None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets a, b and c, and all their shards as one set."""
    root = tmp_path_factory.mktemp("sets")
    for number, (name, sizes) in enumerate(SIZES.items()):
        write_sized(root / name, sizes, 10 * number)
    examples = [
        make_examples(num, seed=10 * number + shard)
        for number, sizes in enumerate(SIZES.values())
        for shard, num in enumerate(sizes)
    ]
    write_set(root / "all", examples)
    return root


def unite(root: Path, *names: str, access: Access = MAP) -> UnionShards:
    """Opens some of the sets as one."""
    shards, _ = open_sets([str(root / name) for name in names], access, access.kind)
    assert isinstance(shards, UnionShards)
    return shards


def test_without_weights_order_and_batches_are_those_of_one_set(root: Path) -> None:
    shards, whole = unite(root, *SIZES), open_shards(root / "all")
    for shuffle in ("full", "blocks", "none"):
        for last_batch in ("fill", "drop"):
            chosen = {"shuffle": shuffle, "window_shards": 2, "last_batch": last_batch}
            order = shards.order(batch_size=8, seed=3, **chosen)
            same = whole.order(batch_size=8, seed=3, **chosen)
            for step in (0, 1, 5):
                assert order.records(step).tolist() == same.records(step).tolist()
    found = collect(make_loader(shards, order, MAP), 0, 6)
    assert_batches_equal(found, collect(make_loader(whole, order, MAP), 0, 6))


def test_one_set_is_opened_as_itself(root: Path) -> None:
    shards, opened = open_sets([str(root / "a")], MAP, "auto")
    assert type(shards) is ShardSet and shards is opened[0]


def expected_batch(root: Path, order: MixedOrder, step: int) -> RawBatch:
    """Gathers a step's records one by one, each from its own set."""
    sets = [open_shards(root / name) for name in SIZES]
    starts = np.cumsum([0, *map(len, sets)])
    records, draws = order.records(step), choices(order.seed, step, order.batch_size)
    rows = []
    for row, record in enumerate(records):
        number = int(np.searchsorted(starts, record, side="right")) - 1
        local = np.array([record - starts[number]])
        rows.append(sets[number].gather(local, *(u[row : row + 1] for u in draws)))
    return concatenate(rows)


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_ranks_gather_their_rows_of_weighted_sets(root: Path, num_processes: int) -> None:
    shards = unite(root, *SIZES)
    order = shards.mixed_order((1, 0.5, 2), batch_size=40, seed=3)
    parts = [
        collect(make_loader(shards, order, MAP, rank=rank, num_processes=num_processes), 0, 2)
        for rank in range(num_processes)
    ]
    found = [concatenate(shares) for shares in zip(*parts, strict=True)]
    assert_batches_equal(found, [expected_batch(root, order, step) for step in range(2)])


@given(num=st.integers(1, 60), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_any_records_are_gathered_into_their_rows(root: Path, num: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards, whole = unite(root, *SIZES), open_shards(root / "all")
    records, draws = rng.integers(0, len(whole), num), rng.random((2, num))
    expected = [whole.gather(records, *draws)]
    assert_batches_equal([shards.gather(records, *draws)], expected)
    read = unite(root, *SIZES, access=replace(MAP, read="pread"))
    assert_batches_equal([read.gather(records, *draws)], expected)
    keys = [key.partition(" of ")[0] for key in shards.keys(records)]
    assert keys == whole.keys(records)
    assert shards.shards_of(records).tolist() == whole.shards_of(records).tolist()


def test_non_finite_records_are_named_with_their_set(root: Path, tmp_path: Path) -> None:
    write_sized(tmp_path / "bad", (4,), 50)
    plant_nan(tmp_path / "bad", shard=0, records=[2])
    locations = [str(root / "a"), str(tmp_path / "bad")]
    shards, _ = open_sets(locations, MAP, "map")
    assert isinstance(shards, UnionShards)
    for order in (
        shards.order(batch_size=14, seed=0),
        shards.mixed_order((1, 1), batch_size=14, seed=0),
    ):
        loader = MapLoader(shards=shards, order=order)
        assert loader.nonfinite_keys(0) == [f"50-3-000002 of {tmp_path / 'bad'}"]


@pytest.fixture(scope="module")
def server(root: Path) -> Any:
    """A server of all sets."""
    with serve(root) as served:
        yield served


def open_remote(
    server: Server, tmp_path: Path, cache_bytes: int, *local: Path
) -> tuple[Shards, Access]:
    access = Access(kind="cache", cache_dir=tmp_path / "cache", cache_bytes=cache_bytes)
    locations = [*(f"{server.url}/{name}" for name in SIZES), *map(str, local)]
    return open_sets(locations, access, "auto")[0], access


@pytest.mark.parametrize("weights", [(), (1, 0.5, 2)])
@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_cached_sets_give_the_batches_of_mapped_ones_within_the_bound(
    root: Path, server: Server, tmp_path: Path, shuffle: Any, weights: tuple[float, ...]
) -> None:
    chosen: dict[str, Any] = {"batch_size": 8, "seed": 3, "shuffle": shuffle, "window_shards": 1}
    mapped = unite(root, *SIZES)
    order = mapped.mixed_order(weights, **chosen) if weights else mapped.order(**chosen)
    expected = collect(make_loader(mapped, order, MAP), 0, 9)
    total = sum(part.manifest.shards[0].bytes * 99 for part in mapped.sets)
    shards, access = open_remote(server, tmp_path, total)
    with pytest.raises(ValueError, match=r"data.cache_bytes: shuffle .* = (\d+) bytes of 3 s") as e:
        make_loader(shards, order, replace(access, cache_bytes=9))
    least = int(str(e.value).partition(" = ")[2].partition(" ")[0])
    shards, access = open_remote(server, tmp_path, least)
    parts = [
        make_loader(shards, order, access, rank=rank, num_processes=2).fill for rank in range(2)
    ]
    stores = stores_of(shards)
    buffers = [shards.buffer(4) for _ in parts]  # type: ignore[union-attr]
    for step, batch in enumerate(expected):
        found = [fill(step, out) for fill, out in zip(parts, buffers, strict=True)]
        assert_batches_equal([concatenate(found)], [batch])
        for store in stores:
            with locked(store.folder):  # nothing is evicted while the files are listed
                assert store.used_bytes() <= store.room_bytes
    assert sum(store.cache_bytes for store in stores) <= least
    for part in shards.sets:
        assert isinstance(part, CachedShards)
        part.close()


def test_a_folder_and_urls_are_one(root: Path, server: Server, tmp_path: Path) -> None:
    write_sized(tmp_path / "d", (3,), 60)
    shards, access = open_remote(server, tmp_path, 10**9, tmp_path / "d")
    assert isinstance(shards, UnionShards)
    assert [type(part) for part in shards.sets] == [CachedShards] * 3 + [ShardSet]
    for order in (
        shards.order(batch_size=8, seed=3),
        shards.mixed_order((1, 1, 1, 2), batch_size=8, seed=3),
    ):
        batches = collect(make_loader(shards, order, access), 0, 4)
        loader = MapLoader(shards=unite(root, *SIZES, str(tmp_path / "d")), order=order)
        assert_batches_equal(batches, collect(loader, 0, 4))


CHANGES: dict[str, dict[str, Any]] = {
    "vae": {"vae": replace(make_provenance().vae, sha256="1" * 64)},
    "text_encoder": {"text_encoder": replace(make_provenance().vae, sha256="2" * 64)},
    "tokenizer": {"tokenizer": replace(make_provenance().vae, sha256="3" * 64)},
}


@pytest.mark.parametrize("what", [*CHANGES, "latent_kind", "latent_shape", "num_views"])
def test_sets_that_differ_are_refused_naming_both(root: Path, tmp_path: Path, what: str) -> None:
    made: dict[str, Any] = {
        "latent_kind": {"kind": "plain"},
        "latent_shape": {"size": (4, 4)},
        "num_views": {"views": 2},
    }.get(what, {})
    provenance = make_provenance(made.get("kind", "moments"), **CHANGES.get(what, {}))
    write_set(tmp_path / "x", [make_examples(3, seed=70, **made)], provenance)
    message = rf"shards: {tmp_path / 'x'}: {what}: expected .* as in {root / 'a'}, found .*"
    with pytest.raises(FormatError, match=message):
        open_sets([str(root / "a"), str(tmp_path / "x")], MAP, "map")


def test_text_of_another_dtype_or_scale_is_refused(tmp_path: Path) -> None:
    for name, seed in (("p", 0), ("q", 10)):
        write_set(tmp_path / name, [make_examples(3, seed=seed, text_dtype="int8")])
    write_set(tmp_path / "r", [make_examples(3, seed=20)])
    names = [str(tmp_path / name) for name in "pqr"]
    open_sets(names[:2], MAP, "map")
    with pytest.raises(FormatError, match=r"r: text_dtype: expected int8 as in .*p, found float16"):
        open_sets([names[0], names[2]], MAP, "map")


def test_a_copy_of_a_set_is_refused(root: Path, tmp_path: Path) -> None:
    write_sized(tmp_path / "copy", SIZES["a"], 0)
    with pytest.raises(ValueError, match=r"copy: found the same set as .*a, expected each set"):
        open_sets([str(root / "a"), str(tmp_path / "copy")], MAP, "map")


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bucketed sets with one size in common, and a plain set of another size of them."""
    root = tmp_path_factory.mktemp("bucketed")
    write_buckets(root / "p", {"48x64": (5,), "64x64": (4, 3)})
    examples = {"64x64": (8, 8), "64x48": (6, 8)}
    for number, (name, size) in enumerate(examples.items()):
        write_set(root / "q" / name, [make_examples(5, seed=70 + number, size=size)])
    finish_buckets(root / "q", list(examples), quarantined={})
    write_set(root / "plain", [make_examples(6, seed=90, size=(6, 8))])
    return root


def test_buckets_of_one_size_are_joined(bucketed: Path) -> None:
    shards, _ = open_sets([str(bucketed / name) for name in ("p", "q", "plain")], MAP, "map")
    assert isinstance(shards, BucketedShards)
    listed = {bucket.name: bucket.records for bucket in shards.buckets.buckets}
    assert listed == {"48x64": 5, "64x48": 5 + 6, "64x64": 7 + 5}
    assert len(shards) == 28 and len(shards.sets) == 5 and shards.latent_shapes[1][1:] == (6, 8)
    order = shards.order(batch_size=4, seed=1)
    keys: list[str] = []
    for step in range(order.num_steps(1)):
        keys += shards.keys(order.records(step))
    assert len(set(keys)) == 28
    assert {key.rpartition("/")[2] for key in keys} == {"48x64", "64x48", "64x64", "plain"}
    parts = [
        collect(make_loader(shards, order, MAP, rank=rank, num_processes=2), 0, 8)
        for rank in range(2)
    ]
    whole = collect(make_loader(shards, order, MAP), 0, 8)
    assert_batches_equal([concatenate(pair) for pair in zip(*parts, strict=True)], whole)


def test_joined_buckets_train_from_the_cache(bucketed: Path, tmp_path: Path) -> None:
    names = [bucketed / name for name in ("p", "plain")]
    mapped, _ = open_sets([str(name) for name in names], MAP, "map")
    access = Access(kind="cache", cache_dir=tmp_path, cache_bytes=10**8)
    cached, _ = open_sets([name.as_uri() for name in names], access, "cache")
    order = mapped.order(batch_size=4, seed=1)
    found = collect(make_loader(cached, order, access), 0, 5)
    assert_batches_equal(found, collect(make_loader(mapped, order, MAP), 0, 5))
    for part in cached.sets:
        assert isinstance(part, CachedShards)
        part.close()
    with pytest.raises(ValueError, match=r"must hold all 3 buckets of"):
        make_loader(cached, order, replace(access, cache_bytes=99))


def test_joined_buckets_of_other_encoders_are_refused(bucketed: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "x", [make_examples(3, seed=99)], make_provenance(**CHANGES["vae"]))
    with pytest.raises(FormatError, match=r"x: vae: expected v+ as in .*p/48x64, found 1+"):
        open_sets([str(bucketed / "p"), str(tmp_path / "x")], MAP, "map")


def test_verify_notes_shared_keys_and_sets_that_cannot_be_one(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(verify, monkeypatch, root / "a", root / "b") == 0
    assert "note" not in capsys.readouterr().out
    assert run_main(verify, monkeypatch, root / "a", root / "b", root / "all") == 0
    found = capsys.readouterr().out.splitlines()
    assert found[-1] == f"{root / 'all'}: 22 records in 6 shards, no faults"
    shared = f"note: {root / 'all'}: "
    assert found[0].startswith(f"{shared}10 keys are in {root / 'a'} too, such as '00-3-000000';")
    assert found[1].startswith(f"{shared}7 keys are in {root / 'b'} too, such as")
    write_set(tmp_path / "x", [make_examples(3, seed=99)], make_provenance(**CHANGES["vae"]))
    assert run_main(verify, monkeypatch, root / "a", tmp_path / "x") == 0
    note = f"note: these sets cannot be trained on as one: shards: {tmp_path / 'x'}: vae: expected"
    assert note in capsys.readouterr().out
    plant_nan(tmp_path / "x", shard=0, records=[0])
    assert run_main(verify, monkeypatch, root / "a", tmp_path / "x") == 1
    assert run_main(verify, monkeypatch, root / "a", tmp_path / "no") == 2


def test_summary_of_several_sets_begins_with_their_shares(
    root: Path,
    bucketed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(summary, monkeypatch, root / "a", bucketed / "p") == 0
    found = capsys.readouterr().out.splitlines()
    assert found[0] == "2 sets, 22 records"
    assert found[1].split() == ["10", "45.45%", str(root / "a")]
    assert found[2].split() == ["12", "54.55%", str(bucketed / "p")]
    assert str(root / "a") in found and str(bucketed / "p") in found


def test_pinned_and_plain_buffers_have_the_shapes_of_one_set(root: Path) -> None:
    buffer, one = unite(root, *SIZES).buffer(3), open_shards(root / "a").buffer(3)
    assert buffer.latent.shape == one.latent.shape and buffer.text.dtype == torch.float16
