"""Cache access: the batches of map access, from a bounded folder of complete shards."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_t2i.shards.access import Access, make_loader, open_set
from latent_t2i.shards.loader import MapLoader, batches
from latent_t2i.shards.order import Order
from latent_t2i.shards.reader import RawBatch, open_shards
from latent_t2i.shards.remote import cache
from latent_t2i.shards.remote.cache import CachedShards, CacheLoader, check_cache, parts
from latent_t2i.shards.remote.store import FOLDER_LOCK, default_cache_dir, locked, open_store
from latent_t2i.shards.remote.transport import RemoteError
from latent_t2i.shards.schema import FormatError, Manifest
from tests.servers import QUICK, Server, serve, serve_s3
from tests.shard_sets import assert_batches_equal, collect, make_examples, write_set

SIZES = (5, 7, 4, 6, 5, 7, 3, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of eight small shards."""
    folder = tmp_path_factory.mktemp("source") / "train"
    write_set(folder, [make_examples(size, seed=seed, views=2) for seed, size in enumerate(SIZES)])
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """A server of the set."""
    with serve(folder) as served:
        yield served


@pytest.fixture
def open_cache(tmp_path: Path, server: Server) -> Iterator[Callable[..., CachedShards]]:
    """Opens the served set through a cache and closes it after the test."""
    opened: list[CachedShards] = []

    def open_(cache_bytes: int = 10**9, location: str = "", **settings: Any) -> CachedShards:
        store = open_store(
            location or server.url, tmp_path / "cache", cache_bytes, retry=QUICK, **settings
        )
        opened.append(CachedShards(store))
        return opened[-1]

    yield open_
    for shards in opened:
        shards.close()


def least_bytes(order: Order, manifest: Manifest) -> int:
    """Returns the smallest size of a cache that is accepted."""
    low, high = 0, sum(entry.bytes for entry in manifest.files) * 2
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check_cache(order, manifest, middle)
            high = middle
        except ValueError:
            low = middle
    return high


def used_bytes(folder: Path) -> int:
    """Returns the size of all files; a file that is renamed meanwhile counts once.

    Nothing is evicted meanwhile, or a shard and the one that takes its place would both count.
    """
    sizes: dict[int, int] = {}
    with contextlib.ExitStack() as stack:
        for lock in folder.rglob(FOLDER_LOCK):
            stack.enter_context(locked(lock.parent))
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # renamed
                found = path.stat()
                if stat.S_ISREG(found.st_mode):
                    sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


ORDERS: list[dict[str, Any]] = [
    {"shuffle": "full"},
    {"shuffle": "blocks", "window_shards": 2},
    {"shuffle": "blocks", "window_shards": 3, "last_batch": "drop"},
    {"shuffle": "none"},
]


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_equal_map_access_within_the_bound(
    folder: Path,
    tmp_path: Path,
    open_cache: Callable[..., CachedShards],
    settings: dict[str, Any],
    num_processes: int,
) -> None:
    mapped = open_shards(folder)
    order = mapped.order(batch_size=8, seed=3, **settings)
    bound = least_bytes(order, mapped.manifest)
    assert settings["shuffle"] == "full" or bound < 0.7 * used_bytes(folder)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            most.append(used_bytes(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for rank in range(num_processes):
            loader = CacheLoader(
                shards=open_cache(bound), order=order, rank=rank, num_processes=num_processes
            )
            plain = MapLoader(shards=mapped, order=order, rank=rank, num_processes=num_processes)
            assert_batches_equal(collect(loader, 2, 16), collect(plain, 2, 16))
    finally:
        stop.set()
        watcher.join()
    assert 0.3 * bound < max(most) <= bound


@pytest.mark.parametrize("read", ["map", "pread"])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_fewer_slots_than_shards_in_the_cache(
    folder: Path, server: Server, tmp_path: Path, read: Any, num_slots: int
) -> None:
    mapped = open_shards(folder)
    store = open_store(server.url, tmp_path / "cache", 10**9, retry=QUICK)
    shards = CachedShards(store, read=read, num_slots=num_slots, is_lazy=True)
    order = mapped.order(batch_size=8, seed=3)
    assert_batches_equal(
        collect(CacheLoader(shards=shards, order=order), 0, 12),
        collect(MapLoader(shards=mapped, order=order), 0, 12),
    )
    assert (shards._source.slots.of >= 0).sum() == num_slots
    assert {server.counts[entry.name] for entry in mapped.manifest.shards} == {1}
    shards.finish_verification()
    shards.close()


def test_shard_evicted_by_another_process_is_downloaded_again(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    """It is on disk when it is downloaded, and gone when it gets a slot."""
    mapped = open_shards(folder)
    shards = CachedShards(
        open_store(server.url, tmp_path / "cache", 10**9, retry=QUICK), num_slots=1
    )
    every = np.arange(len(shards))
    assert shards.keys(every) == mapped.keys(every)
    for entry in shards.manifest.shards[2:5]:
        (shards.store.folder / entry.name).unlink()
    assert shards.keys(every[::-1].copy()) == mapped.keys(every)[::-1]
    assert shards.meta(13) == mapped.meta(13)
    counts = [server.counts[entry.name] for entry in shards.manifest.shards]
    assert counts == [1, 1, 2, 2, 2, 1, 1, 1]
    shards.close()


def test_shard_needed_last_is_evicted_first(
    folder: Path, server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    mapped = open_shards(folder)
    order = mapped.order(batch_size=4, seed=3, shuffle="blocks", window_shards=2)
    shards = open_cache(int(0.8 * used_bytes(folder)))
    num_steps = 4 * sum(SIZES) // 4
    collect(CacheLoader(shards=shards, order=order), 0, num_steps)
    fetched = sum(server.counts[entry.name] for entry in mapped.manifest.shards)
    # 8 in the first epoch; later epochs find their first shards in the cache
    assert 8 < fetched <= 8 + 3 * 4
    assert max(server.counts.values()) <= 4


@pytest.mark.parametrize("location", ["s3", "folder"])
def test_other_locations(
    folder: Path,
    open_cache: Callable[..., CachedShards],
    monkeypatch: pytest.MonkeyPatch,
    location: str,
) -> None:
    mapped = open_shards(folder)
    order = mapped.order(batch_size=8, seed=0)
    expected = collect(MapLoader(shards=mapped, order=order), 0, 6)
    if location == "s3":
        with serve_s3(folder, monkeypatch) as url:
            loader = CacheLoader(shards=open_cache(location=url), order=order)
            assert_batches_equal(collect(loader, 0, 6), expected)
        return
    loader = CacheLoader(shards=open_cache(location=str(folder)), order=order)
    assert_batches_equal(collect(loader, 0, 6), expected)


def test_first_batch_needs_only_its_shards(
    folder: Path, server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    order = shards.order(batch_size=4, seed=1, shuffle="blocks", window_shards=2)
    needed = list(dict.fromkeys(shards.shards_of(order.visits(0, 0, order.epoch_records)).tolist()))
    names = [entry.name for entry in shards.manifest.shards]
    assert not set(server.asked) & set(names), "opening must not read shards"
    release = threading.Event()
    held = {names[index] for index in needed[2:]}
    server.before = lambda name: release.wait(20) if name in held else None
    loader = CacheLoader(shards=shards, order=order)
    made = batches(loader, start=0, stop=10)
    next(made)
    assert not release.is_set()
    release.set()
    assert len(list(made)) == 9
    asked = [name for name in server.asked if name.endswith(".tar")]
    window = [{names[i] for i in needed[at : at + 2]} for at in range(0, len(needed), 2)]
    assert [set(asked[at : at + 2]) for at in range(0, len(asked), 2)] == window


def test_restart_reuses_the_cache(
    server: Server, tmp_path: Path, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    order = shards.order(batch_size=8, seed=0)
    before = collect(CacheLoader(shards=shards, order=order), 0, 6)
    shards.close()
    server.asked.clear()
    assert_batches_equal(collect(CacheLoader(shards=open_cache(), order=order), 0, 6), before)
    assert server.asked == ["manifest.json"]


def test_truncated_and_unfinished_shards_are_replaced(
    server: Server, tmp_path: Path, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    order = shards.order(batch_size=8, seed=0)
    before = collect(CacheLoader(shards=shards, order=order), 0, 6)
    shards.close()
    first, second, third = (shards.store.folder / e.name for e in shards.manifest.shards[:3])
    os.truncate(first, 1000)
    second.rename(second.with_name(f".{second.name}.partial"))
    third.unlink()
    (third.with_name(f".{third.name}.partial")).write_bytes(b"x" * 99)
    server.asked.clear()
    again = open_cache()
    assert not list(again.store.folder.glob(".*.partial"))
    assert_batches_equal(collect(CacheLoader(shards=again, order=order), 0, 6), before)
    assert sorted(server.asked) == ["manifest.json", first.name, second.name, third.name]


def test_lazy_verification_finds_damaged_shard(
    server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    shards.keys(np.arange(len(shards)))
    shards.close()
    path = shards.store.folder / shards.manifest.shards[2].name
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    again = CachedShards(open_store(server.url, path.parent.parent, 10**9), is_lazy=True)
    with pytest.raises(FormatError, match=rf"{path}: sha256: .*; run with --data.verify full to"):
        again.keys(np.arange(len(again)))
        again.finish_verification()
    again.close()


def test_verify_replaces_damaged_shard(
    server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    order = shards.order(batch_size=8, seed=0)
    before = collect(CacheLoader(shards=shards, order=order), 0, 6)
    shards.close()
    path = shards.store.folder / shards.manifest.shards[2].name
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    server.asked.clear()
    again = open_cache(verify=True)
    assert_batches_equal(collect(CacheLoader(shards=again, order=order), 0, 6), before)
    assert server.asked == ["manifest.json", path.name]


def test_wrong_hash_is_retried_then_reported(
    server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    order = shards.order(batch_size=8, seed=0)
    name = shards.manifest.shards[5].name
    server.faults[name] = ["corrupt"]
    collect(CacheLoader(shards=shards, order=order), 0, 6)
    assert server.counts[name] == 2
    shards.close()
    (shards.store.folder / name).unlink()
    server.faults[name] = ["corrupt..."]
    seen: list[bool] = []
    server.before = lambda _: seen.append((shards.store.folder / name).exists())
    with pytest.raises(FormatError, match=rf"{server.url}/{name}: sha256: .* in each of 3 downl"):
        collect(CacheLoader(shards=open_cache(), order=order), 0, 6)
    assert not any(seen)
    assert not (shards.store.folder / name).exists()
    assert not list(shards.store.folder.glob(".*.partial"))


@pytest.mark.parametrize(
    ("fault", "message"), [("503...", "after 4 attempts; .* HTTP status 503"), ("404", "not found")]
)
def test_background_errors_are_raised_by_the_batch(
    server: Server, open_cache: Callable[..., CachedShards], fault: str, message: str
) -> None:
    shards = open_cache()
    order = shards.order(batch_size=2, seed=0, shuffle="none")
    name = shards.manifest.shards[2].name
    server.faults[name] = [fault]
    made = batches(CacheLoader(shards=shards, order=order), start=0, stop=20)
    seen: list[int] = []
    with pytest.raises(RemoteError, match=rf"^{server.url}/{name}: .*{message}"):
        seen.extend(len(batch) for batch in made)
    assert len(seen) == (SIZES[0] + SIZES[1]) // 2


def test_lost_connections_do_not_change_batches(
    folder: Path, server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    for entry in shards.manifest.shards:
        server.faults[entry.name] = ["drop", "503", "short"]
    order = shards.order(batch_size=8, seed=0)
    plain = MapLoader(shards=open_shards(folder), order=order)
    assert_batches_equal(
        collect(CacheLoader(shards=shards, order=order), 0, 6), collect(plain, 0, 6)
    )


def test_full_disk_is_reported(
    open_cache: Callable[..., CachedShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    shards = open_cache()
    monkeypatch.setattr("latent_t2i.shards.remote.store.os.fsync", full)
    order = shards.order(batch_size=8, seed=0)
    with pytest.raises(OSError, match="No space left"):
        collect(CacheLoader(shards=shards, order=order), 0, 1)
    assert not list(shards.store.folder.glob("*.tar"))


def test_closing_ends_a_waiting_read(
    server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    shards = open_cache()
    release = threading.Event()
    server.before = lambda name: release.wait(20) if name.endswith(".tar") else None
    threading.Timer(0.2, lambda: (shards.store.close(), release.set())).start()
    with pytest.raises((RuntimeError, InterruptedError), match=r"closed|stopped"):
        shards.keys(np.array([0]))


def test_thread_ends_with_its_set(
    open_cache: Callable[..., CachedShards], server: Server, tmp_path: Path
) -> None:
    shards = CachedShards(open_store(server.url, tmp_path / "other", 10**9, retry=QUICK))
    assert shards.keys(np.array([0])) == ["00-3-000000"]
    thread = shards._thread
    assert thread is not None
    del shards
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_nonfinite_keys_of_evicted_shards(
    folder: Path, open_cache: Callable[..., CachedShards]
) -> None:
    mapped = open_shards(folder)
    order = mapped.order(batch_size=8, seed=3, shuffle="blocks", window_shards=2)
    shards = open_cache(least_bytes(order, mapped.manifest))
    loader = CacheLoader(shards=shards, order=order)
    collect(loader, 0, 10)
    plain = MapLoader(shards=mapped, order=order)
    assert loader.nonfinite_keys(0) == plain.nonfinite_keys(0)
    assert shards.meta(40) == mapped.meta(40)


@pytest.mark.parametrize(
    ("settings", "share", "message"),
    [
        ({"shuffle": "full"}, 0.9, r"full needs 8 of 8 shards .* \d+ .* --data.shuffle blocks, wh"),
        ({"shuffle": "blocks", "window_shards": 5}, 0.5, r"needs 6 of 8 .* smaller --data.window"),
        ({"shuffle": "none"}, 0.2, r"none needs 2 of 8 .* use --data.cache-bytes \d+$"),
    ],
)
def test_small_cache_is_rejected_with_the_arithmetic(
    folder: Path, open_cache: Callable[..., CachedShards], settings: Any, share: float, message: str
) -> None:
    bound = int(share * used_bytes(folder))
    shards = open_cache(bound)
    order = shards.order(batch_size=8, seed=0, **settings)
    with pytest.raises(ValueError, match=rf"^data.cache_bytes: .*{message}") as raised:
        make_loader(shards, order, Access(kind="cache", cache_bytes=bound))
    assert f"the limit is {bound};" in str(raised.value)


def test_smaller_bound_evicts_shards(
    folder: Path, tmp_path: Path, open_cache: Callable[..., CachedShards]
) -> None:
    whole = open_cache()
    order = whole.order(batch_size=8, seed=3, shuffle="blocks", window_shards=2)
    before = collect(CacheLoader(shards=whole, order=order), 0, 12)
    whole.close()
    bound = least_bytes(order, whole.manifest)
    assert used_bytes(tmp_path / "cache") > bound
    small = open_cache(bound)
    assert_batches_equal(collect(CacheLoader(shards=small, order=order), 0, 12), before)
    assert used_bytes(tmp_path / "cache") <= bound


def test_unused_sets_are_deleted_for_room(
    server: Server, tmp_path: Path, open_cache: Callable[..., CachedShards]
) -> None:
    other = write_set(tmp_path / "other", [make_examples(5, seed=9)])
    first = open_cache()
    first.keys(np.arange(len(first)))
    second = open_cache(location=str(tmp_path / "other"))
    assert second.keys(np.array([0])) == ["09-3-000000"]
    assert first.store.folder != second.store.folder
    assert second.store.folder.name == other.sha256[:16]
    bound = used_bytes(first.store.folder)
    open_cache(bound)
    assert second.store.folder.exists(), "in use"
    second.close()
    open_cache(bound)
    assert not second.store.folder.exists()
    assert first.store.folder.exists()


SHARE = """
import sys
import torch
from pathlib import Path
from latent_t2i.shards.remote.cache import CachedShards, CacheLoader
from latent_t2i.shards.loader import batches
from latent_t2i.shards.remote.store import open_store
url, folder, bound, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shards = CachedShards(open_store(url, folder, bound))
order = shards.order(batch_size=8, seed=3, shuffle="blocks", window_shards=2)
loader = CacheLoader(shards=shards, order=order, rank=rank, num_processes=2)
total = 0
for batch in batches(loader, start=0, stop=30):
    total += batch.text.view(torch.int16).long().sum().item()
print(total)
"""


def test_processes_share_a_bounded_cache(folder: Path, server: Server, tmp_path: Path) -> None:
    mapped = open_shards(folder)
    order = mapped.order(batch_size=8, seed=3, shuffle="blocks", window_shards=2)
    bound = least_bytes(order, mapped.manifest)
    sizes: list[int] = []

    def measure(name: str) -> None:
        if name.endswith(".tar"):  # others are fetched under the lock that `used_bytes` takes
            sizes.append(used_bytes(tmp_path / "cache"))

    server.before = measure
    command = [sys.executable, "-c", SHARE, server.url, str(tmp_path / "cache"), str(bound)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    while any(process.poll() is None for process in processes):
        sizes.append(used_bytes(tmp_path / "cache"))
        time.sleep(0.002)
    found = [int(process.communicate()[0]) for process in processes]
    assert 0 < max(sizes) <= bound
    for rank in range(2):
        loader = MapLoader(shards=mapped, order=order, rank=rank, num_processes=2)
        assert found[rank] == sum(
            int(b.text.view(torch.int16).long().sum()) for b in collect(loader, 0, 30)
        )


def test_concurrent_readers_download_each_shard_once(
    server: Server, open_cache: Callable[..., CachedShards]
) -> None:
    server.before = lambda name: time.sleep(0.02)
    both = [open_cache(), open_cache()]
    order = both[0].order(batch_size=8, seed=0)
    made: list[list[RawBatch]] = [[], []]

    def make(index: int) -> None:
        made[index] = collect(CacheLoader(shards=both[index], order=order), 0, 6)

    threads = [threading.Thread(target=make, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_batches_equal(made[0], made[1])
    assert {server.counts[entry.name] for entry in both[0].manifest.shards} == {1}


def test_killed_process_leaves_only_complete_shards(
    server: Server, tmp_path: Path, open_cache: Callable[..., CachedShards]
) -> None:
    begun = threading.Event()
    server.before = lambda name: (begun.set(), time.sleep(60)) if "000003" in name else None
    command = [sys.executable, "-c", SHARE, server.url, str(tmp_path / "cache"), str(10**9), "0"]
    process = subprocess.Popen(command)
    assert begun.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = (tmp_path / "cache").glob("*/.*.partial")
    server.before = lambda name: None
    manifest = Manifest.load(partial.parent)
    for entry in manifest.shards:
        path = partial.parent / entry.name
        assert not path.exists() or path.stat().st_size == entry.bytes
    shards = open_cache()
    assert not partial.exists()
    assert len(shards.keys(np.arange(len(shards)))) == sum(SIZES)


def test_cached_set_of_other_encoders_is_rejected(server: Server, tmp_path: Path) -> None:
    access = Access(kind="cache", cache_dir=tmp_path / "cache")
    open_set(server.url, access, vae_sha256="v" * 64, text_sha256="t" * 64)
    with pytest.raises(FormatError, match=rf"{server.url}: vae: the shards were made with"):
        open_set(server.url, access, vae_sha256="w" * 64)


def test_damaged_remote_manifest_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    content = (folder / "manifest.json").read_bytes()
    (tmp_path / "bad" / "manifest.json").write_bytes(
        content.replace(b'"num_records": 43', b'"x": 1')
    )
    with serve(tmp_path / "bad") as server:
        with pytest.raises(FormatError, match=rf"^{server.url}/manifest.json: "):
            open_store(server.url, tmp_path / "cache", 10**9, retry=QUICK)
        with pytest.raises(RemoteError, match=rf"^{server.url}/no/manifest.json: not found"):
            open_store(f"{server.url}/no", tmp_path / "cache", 10**9, retry=QUICK)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "latent-t2i" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "latent-t2i" / "shards"


@pytest.mark.parametrize("settings", ORDERS)
def test_parts_end_with_windows(settings: dict[str, Any]) -> None:
    order = Order(sizes=SIZES, batch_size=8, seed=5, **settings)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    seen: list[int] = []
    for step in range(20):
        records = order.records(step)
        for cursor, part in parts(order, step * 8, 8):
            there = order.visits(
                cursor.epoch, cursor.position, cursor.position + part.stop - part.start
            )
            assert np.array_equal(there, records[part])
            window = {"blocks": settings.get("window_shards"), "none": 1}.get(order.shuffle, 8)
            assert len(set(shard_of[records[part]].tolist())) <= window
            away = cache.records_until(order, cursor)
            assert (away[shard_of[records[part]]] < 8).all()
            seen += records[part].tolist()
    assert seen == np.concatenate([order.records(step) for step in range(20)]).tolist()
