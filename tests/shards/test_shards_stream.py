"""Stream access: every record once per epoch, the fields of map access, errors."""

import io
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_t2i.shards.access import Access, choose_kind, make_loader, open_set
from latent_t2i.shards.loader import batches
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.remote.stream import StreamLoader, open_streamed
from latent_t2i.shards.remote.transport import RemoteError
from latent_t2i.shards.schema import FormatError, Manifest
from tests.servers import QUICK, Server, serve, serve_s3
from tests.shard_sets import make_examples, write_set

FIELDS = ("latent", "text", "tokens")
SIZES = (6, 10, 4, 8, 2, 6)  # 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of six small shards; the last two have another number of captions."""
    folder = tmp_path_factory.mktemp("source") / "train"
    shards = [
        make_examples(size, seed=seed, views=2, num_captions=3 + seed // 4)
        for seed, size in enumerate(SIZES)
    ]
    write_set(folder, shards)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """A server of the set."""
    with serve(folder) as served:
        yield served


def make(location: str | Path, *, batch_size: int = 4, **settings: Any) -> StreamLoader:
    """Returns a loader; `settings` are those of the order and of the loader."""
    names = ("shuffle", "last_batch", "seed")
    of_order = {"seed": 3} | {k: v for k, v in settings.items() if k in names}
    shards = open_streamed(str(location), fields=FIELDS, retry=QUICK)
    order = shards.order(batch_size=batch_size, **of_order)
    others = {k: v for k, v in settings.items() if k not in names}
    return StreamLoader(shards=shards, order=order, **others)


def keys_of(loader: StreamLoader, start: int, stop: int) -> list[str]:
    """Returns the keys of some steps, in order."""
    for _ in batches(loader, start=start, stop=stop):
        pass
    return [key for step in range(start, stop) for key in loader.nonfinite_keys(step)]


def all_keys(folder: Path) -> list[str]:
    """Returns the keys of a set, in the order of its shards."""
    shards = open_shards(folder)
    return shards.keys(np.arange(len(shards)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_has_every_record_once(folder: Path, num_workers: int) -> None:
    if num_workers:  # epochs of workers end at different steps, so read one epoch of each
        loader = make(folder, num_workers=num_workers)
        reading = loader._reading
        parts = [reading.epoch(0, w, reading.shards_of(0, w)) for w in range(num_workers)]
        keys = [record.key for part in parts for record in part]
    else:
        keys = keys_of(make(folder), 0, 9)
    assert sorted(keys) == sorted(all_keys(folder))


def test_ranks_divide_an_epoch(folder: Path) -> None:
    loaders = [make(folder, rank=rank, num_processes=2) for rank in range(2)]
    shards = [loader._reading.shards_of(0, 0) for loader in loaders]
    assert sorted(shards[0] + shards[1]) == list(range(6))
    keys = [keys_of(loader, 0, 40) for loader in loaders]
    assert [len(part) for part in keys] == [80, 80]
    for part, mine in zip(keys, shards, strict=True):
        epoch = part[: sum(SIZES[index] for index in mine)]
        expected = [key for key in all_keys(folder) if int(key[:2]) in mine]
        assert sorted(epoch) == sorted(expected)
    assert set(keys[0]) == set(keys[1]) == set(all_keys(folder)), "ranks exchange shards"


def test_epochs_differ_and_depend_on_the_seed(folder: Path) -> None:
    keys = keys_of(make(folder), 0, 18)
    assert sorted(keys[:36]) == sorted(keys[36:])
    assert keys[:36] != keys[36:]
    assert keys == keys_of(make(folder), 0, 18)
    assert keys != keys_of(make(folder, seed=4), 0, 18)


@pytest.mark.parametrize("place", ["folder", "http", "s3"])
def test_fields_equal_map_access(
    folder: Path, place: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "s3":
        with serve_s3(folder, monkeypatch) as url:
            assert_fields(folder, make(url))
        return
    assert_fields(folder, make(server.url if place == "http" else folder))


def assert_fields(folder: Path, loader: StreamLoader) -> None:
    """Compares 18 batches with map access to the same keys."""
    mapped = open_shards(folder, fields=FIELDS)
    numbers = {key: number for number, key in enumerate(all_keys(folder))}
    chosen: Counter[tuple[int, int]] = Counter()
    for step, batch in enumerate(batches(loader, start=0, stop=18)):
        records = np.array([numbers[key] for key in loader.nonfinite_keys(step)])
        for row, record in enumerate(records):
            view, caption = find_items(mapped, int(record), batch.latent[row], batch.text[row])
            assert torch.equal(
                batch.extra["tokens"][row],
                gather(mapped, int(record), caption, 0).extra["tokens"][0],
            )
            chosen[view, caption] += 1
    assert len(chosen) == 2 * 4
    assert min(chosen[view, caption] for view in range(2) for caption in range(3)) > 2


def gather(mapped: ShardSet, record: int, caption: int, view: int) -> Any:
    """Returns one caption and one view of a record, by map access."""
    num = 4 if record >= sum(SIZES[:4]) else 3
    u = np.array([(caption + 0.5) / num]), np.array([(view + 0.5) / 2])
    return mapped.gather(np.array([record]), *u)


def find_items(
    mapped: ShardSet, record: int, latent: torch.Tensor, text: torch.Tensor
) -> tuple[int, int]:
    """Returns the view and the caption of a record that these tensors are."""
    num = 4 if record >= sum(SIZES[:4]) else 3
    views = [v for v in range(2) if torch.equal(gather(mapped, record, 0, v).latent[0], latent)]
    captions = [c for c in range(num) if torch.equal(gather(mapped, record, c, 0).text[0], text)]
    (view,), (caption,) = views, captions
    return view, caption


def test_records_are_shuffled_within_the_window(folder: Path) -> None:
    sorted_ = keys_of(make(folder, shuffle="none"), 0, 9)
    assert sorted_ == all_keys(folder)
    by_shard = keys_of(make(folder, window_records=1), 0, 9)
    assert [key[:2] for key in by_shard] == sorted(
        (key[:2] for key in by_shard), key=[key[:2] for key in by_shard].index
    ), "one shard after the other"
    assert by_shard != sorted_
    mixed = keys_of(make(folder, window_records=1000), 0, 9)
    assert sum(a[:2] != b[:2] for a, b in pairwise(mixed)) > 12
    near = keys_of(make(folder, window_records=6), 0, 9)
    place = {key: number for number, key in enumerate(by_shard)}
    early = [place[key] - number for number, key in enumerate(near)]
    assert 0 < max(early) <= 12, "no record comes much too early"


def test_lost_connections_do_not_change_keys(folder: Path, server: Server) -> None:
    for entry in Manifest.load(folder).shards:
        server.faults[entry.name] = ["503", "drop", "short", "503"]
    assert keys_of(make(server.url), 0, 9) == keys_of(make(folder), 0, 9)
    assert max(server.counts.values()) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unavailable_server_is_named(server: Server, num_workers: int) -> None:
    loader = make(server.url, num_workers=num_workers)
    name = loader._shards.manifest.shards[3].name
    server.faults[name] = ["503..."]
    with pytest.raises(RemoteError, match=rf"^{server.url}/{name}: gave up .* 4 att.* 503"):
        keys_of(loader, 0, 9)


def test_workers_alternate(folder: Path, server: Server) -> None:
    loader = make(server.url, num_workers=2)
    parts = [
        iter(loader._reading.records(worker, 0))  # the same streams, read in this process
        for worker in range(2)
    ]
    keys = keys_of(loader, 0, 8)
    for step in range(8):
        expected = [next(parts[step % 2]).key for _ in range(4)]
        assert keys[4 * step : 4 * step + 4] == expected


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resume_skips_finished_shards(folder: Path, server: Server, num_processes: int) -> None:
    loader = make(server.url, num_processes=num_processes, rank=num_processes - 1)
    names = [entry.name for entry in Manifest.load(folder).shards]
    for start in (0, 1, 3, 7, 11, 20):
        left = start * 4 // num_processes
        order = [i for epoch in range(6) for i in loader._reading.shards_of(epoch, 0)]
        while left >= SIZES[order[0]]:
            left -= SIZES[order.pop(0)]
        loader.close()
        server.asked.clear()
        keys_of(loader, start, start + 1)
        assert server.asked[0] == names[order[0]]


def test_each_worker_resumes_at_its_position(folder: Path) -> None:
    loader = make(folder, num_workers=2)
    reading = loader._reading
    # before step 7, worker 0 made batches 0, 2, 4, 6 and worker 1 made 1, 3, 5
    parts = [reading.records(1, 3 * 4), reading.records(0, 4 * 4)]
    expected = [record.key for part in parts for record in islice(part, 4)]
    assert keys_of(loader, 7, 9) == expected


def test_resume_in_a_later_epoch(folder: Path, server: Server) -> None:
    loader = make(server.url)
    whole = keys_of(make(folder), 0, 45)
    server.asked.clear()
    keys = keys_of(loader, 36, 45)  # an epoch has nine steps
    assert keys == whole[144:180]
    assert sorted(server.asked) == sorted(e.name for e in Manifest.load(folder).shards)


@pytest.mark.parametrize(
    ("num_processes", "num_workers", "message"),
    [
        (4, 2, r"4 processes x 2 workers = 8 readers, but there are 6 shards; use fewer"),
        (8, 0, r"8 processes x 1 workers = 8 readers, but there are 6 shards"),
    ],
)
def test_too_few_shards_are_rejected(
    folder: Path, num_processes: int, num_workers: int, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^data.access: stream .*{message}"):
        make(folder, batch_size=8, num_processes=num_processes, num_workers=num_workers)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that copies the set and replaces members of shard 1's fifth record."""

    def damage(changes: dict[str, bytes | None], *, drop_record: bool = False) -> Path:
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        shard = copy / Manifest.load(folder).shards[1].name
        size = shard.stat().st_size
        with tarfile.open(shard) as source:
            members = [(info, source.extractfile(info).read()) for info in source]  # type: ignore[union-attr]
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as target:
            for info, content in members:
                key, _, ext = info.name.partition(".")
                if key == "01-3-000004" and (drop_record or ext in changes):
                    content = changes.get(ext)
                if content is not None:
                    info.size = len(content)
                    target.addfile(info, io.BytesIO(content))
        content = shard.read_bytes()
        shard.write_bytes(content[:size] + b"\0" * (size - len(content)))
        return copy

    return damage


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """Returns an array in .npy format."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens.npy": None},
            r"key '01-3-000004': field tokens: expected member '01-3-000004.tokens.npy' at byte",
        ),
        (
            {"latent.npy": npy(np.zeros((2, 8, 8, 4), np.float16))},
            r"key '01-3-000004': field latent: expected array header .*\(2, 8, 8, 8\)",
        ),
        (
            {"text.npy": npy(np.zeros((3, 7, 32), np.int8))},
            r"key '01-3-000004': field text: expected array header .*<f2",
        ),
        ({"text.npy": b"abc"}, r"key '01-3-000004': field text: expected array header .* b'abc"),
        ({"json": b"{}"}, r"sha256: expected \w{64}, found \w{64}: .*; steps \d to \d used it$"),
    ],
)
def test_record_of_another_layout_is_rejected(
    damaged: Callable[..., Path], changes: dict[str, bytes | None], message: str
) -> None:
    copy = damaged(changes)
    with pytest.raises(FormatError, match=rf"^{copy}/shard-000001.tar: {message}"):
        keys_of(make(copy, window_records=1), 0, 9)


def test_missing_record_is_rejected(damaged: Callable[..., Path]) -> None:
    copy = damaged({}, drop_record=True)
    with pytest.raises(FormatError, match=r"shard-000001.tar: key '': expected a key of the form"):
        keys_of(make(copy), 0, 9)


def test_damaged_tar_is_rejected(folder: Path, damaged: Callable[..., Path]) -> None:
    copy = damaged({})
    shard = copy / "shard-000002.tar"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(FormatError, match=r"shard-000002.tar: key 'x{100}': expected a key of the"):
        keys_of(make(copy), 0, 9)
    shard.write_bytes((folder / shard.name).read_bytes() + b"x")
    with pytest.raises(
        FormatError, match=r"^[^ ]*shard-000002.tar: too long: expected \d+ bytes, found more$"
    ):
        keys_of(make(copy), 0, 9)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shard_of_another_set_is_rejected_with_its_steps(
    folder: Path, tmp_path: Path, num_workers: int
) -> None:
    other, copy = tmp_path / "other", shutil.copytree(folder, tmp_path / "copy")
    write_set(other, [make_examples(8, seed=7, views=2)])
    target = copy / "shard-000003.tar"  # records 20 to 27, in steps 5 and 6
    assert target.stat().st_size == (other / "shard-000000.tar").stat().st_size
    shutil.copyfile(other / "shard-000000.tar", target)
    loader = make(copy, shuffle="none", num_workers=num_workers)
    with pytest.raises(FormatError, match=rf"^{target}: sha256: expected") as raised:
        keys_of(loader, 0, 30)
    if not num_workers:
        assert str(raised.value).endswith("; steps 5 to 6 used it")


def test_file_that_changes_between_requests_is_rejected(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[-20000] ^= 1

    def change(name: str) -> None:
        if name == path.name and server.counts[name] == 2:
            path.write_bytes(content)

    with serve(copy) as server:
        server.faults[path.name] = ["drop"]
        server.before = change
        with pytest.raises(FormatError, match=rf"^{server.url}/{path.name}: sha256: expected"):
            keys_of(make(server.url), 0, 9)


def test_records_cannot_be_read_by_number(folder: Path) -> None:
    with pytest.raises(ValueError, match="stream access cannot read records by number"):
        open_streamed(str(folder)).keys(np.array([0]))


def test_nothing_is_written_to_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keys_of(make(server.url), 0, 9)
    assert not list(tmp_path.iterdir())


def test_nonfinite_keys_of_recent_steps(folder: Path) -> None:
    loader = make(folder)
    keys_of(loader, 0, 3)
    assert len(loader.nonfinite_keys(2)) == 4
    assert loader.nonfinite_keys(3) == loader.nonfinite_keys(-1) == []


def test_each_access_has_its_own_loader(folder: Path, server: Server, tmp_path: Path) -> None:
    kinds = {}
    for kind, location in (("map", str(folder)), ("stream", server.url), ("cache", server.url)):
        access = Access(kind=kind, cache_dir=tmp_path / "cache")  # type: ignore[arg-type]
        shards = open_set(location, access)
        loader = make_loader(shards, shards.order(batch_size=4, seed=0), access)
        kinds[kind] = type(loader).__name__
        first = next(batches(loader, start=0, stop=1))
        assert first.latent.isfinite().all()
    assert kinds == {"map": "MapLoader", "stream": "StreamLoader", "cache": "CacheLoader"}


def test_auto_access() -> None:
    assert (choose_kind("a/b", "auto"), choose_kind("http://a", "auto")) == ("map", "cache")
    assert (choose_kind("a/b", "stream"), choose_kind("a/b", "cache")) == ("stream", "cache")
    with pytest.raises(ValueError, match=r"data.access: map needs a folder .* found 's3://a'"):
        choose_kind("s3://a", "map")
    with pytest.raises(ValueError, match="commands are not supported; use a URL of fsspec"):
        choose_kind("pipe:cat /data", "auto")


def test_streamed_set_of_other_encoders_is_rejected(server: Server) -> None:
    access = Access(kind="stream")
    open_set(server.url, access, vae_sha256="v" * 64, text_sha256="t" * 64)
    with pytest.raises(FormatError, match=rf"{server.url}: text_encoder: the shards were made"):
        open_set(server.url, access, text_sha256="w" * 64)
