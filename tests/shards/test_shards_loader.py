"""Loaders: contents of batches, buffers, threads and errors."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_t2i.shards.loader import NUM_BUFFERS, MapLoader, batches, num_buffers, prefetch
from latent_t2i.shards.reader import open_shards
from tests import shard_sets, tiny
from tests.shard_sets import assert_batches_equal, collect, concatenate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with different layouts, and two views."""
    first = shard_sets.make_examples(10, views=2)
    second = shard_sets.make_examples(7, views=2, num_captions=5, seed=1)
    shard_sets.write_set(tmp_path / "set", [first, second])
    return tmp_path / "set"


def make_loader(folder: Path, *, rank: int = 0, num_processes: int = 1) -> MapLoader:
    """Returns a loader with a global batch size of twelve."""
    shards = open_shards(folder)
    order = shards.order(batch_size=12, seed=5)
    return MapLoader(shards=shards, order=order, rank=rank, num_processes=num_processes)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_ranks_share_the_global_batches(folder: Path, num_processes: int) -> None:
    whole = collect(make_loader(folder), 0, 6)
    ranks = range(num_processes)
    parts = [
        collect(make_loader(folder, rank=rank, num_processes=num_processes), 0, 6) for rank in ranks
    ]
    assert_batches_equal([concatenate(part) for part in zip(*parts, strict=True)], whole)


def test_resumed_loader_gives_identical_batches(folder: Path) -> None:
    whole = collect(make_loader(folder), 0, 9)
    for cut in range(9):
        loader = make_loader(folder)
        start = loader.order.step(loader.order.cursor(cut))
        assert_batches_equal(collect(loader, start, 9), whole[cut:])


def test_batch_is_split_into_pieces(folder: Path) -> None:
    (batch,) = collect(make_loader(folder), 0, 1)
    pieces = batch.split(5)
    assert [len(piece) for piece in pieces] == [5, 5, 2]
    assert_batches_equal([concatenate(pieces)], [batch])
    assert batch.to(torch.device("meta")).latent.is_meta


def test_every_caption_and_view_is_used(folder: Path) -> None:
    loader = make_loader(folder)
    seen: dict[str, set[bytes]] = {}
    latents: dict[str, set[bytes]] = {}
    for step, batch in enumerate(batches(loader, start=0, stop=120)):
        keys = loader.shards.keys(loader.order.records(step))
        for key, text, latent in zip(keys, batch.text.numpy(), batch.latent.numpy(), strict=True):
            seen.setdefault(key, set()).add(text.tobytes())
            latents.setdefault(key, set()).add(latent.tobytes())
    assert {key: len(texts) for key, texts in seen.items()} == {
        key: int(key.split("-")[1]) for key in seen
    }
    assert {len(views) for views in latents.values()} == {2}


def test_buffers_alternate(folder: Path) -> None:
    places = [batch.text.data_ptr() for batch in batches(make_loader(folder), start=0, stop=8)]
    assert len(set(places)) == NUM_BUFFERS
    assert places == places[:NUM_BUFFERS] * 4


def test_buffer_in_use_is_not_overwritten() -> None:
    """The thread fills the other buffer while one is in use, and does not run further ahead."""
    started: list[int] = []
    reached = threading.Semaphore(0)

    def fill(step: int, out: list[int]) -> list[int]:
        started.append(step)
        out[0] = step
        reached.release()
        return out

    steps = prefetch(fill, [[-1], [-1]], start=0, stop=6)
    for step, buffer in enumerate(steps):
        for _ in range(NUM_BUFFERS if step == 0 else 1 if step + NUM_BUFFERS <= 6 else 0):
            assert reached.acquire(timeout=60)  # until all buffers are filled
        assert buffer == [step]
        assert len(started) <= step + NUM_BUFFERS
    assert started == list(range(6))


def test_copies_to_a_gpu_get_more_buffers_and_events_that_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class FakeEvent:
        def __init__(self, **settings: bool) -> None:
            log.append(f"event {settings}")

        def synchronize(self) -> None:
            log.append("wait")

    class FakeStream:
        def record_event(self, event: FakeEvent) -> FakeEvent:
            return event

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    stream: Any = FakeStream()
    steps = prefetch(lambda step, out: step, [[0], [0]], start=0, stop=3, stream=stream)
    assert list(steps) == [0, 1, 2]
    assert log.count("event {'blocking': True}") == 3
    assert log.count("wait") == 1  # the third step refills the first buffer
    assert num_buffers(pin_memory=True) == 4
    assert num_buffers(pin_memory=False) == NUM_BUFFERS


def test_thread_can_be_limited_to_one_core() -> None:
    """Other threads, including those started later, keep their setting."""

    def fill(step: int, out: list[int]) -> list[int]:
        torch.randn(10**5).mul(2)  # initialises the thread's setting
        out[0] = torch.get_num_threads()
        return out

    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(prefetch(fill, [[0]], start=0, stop=1, one_core=True)) == [[1]]
        assert torch.get_num_threads() == 3
        assert list(prefetch(fill, [[0]], start=0, stop=1)) == [[3]]
    finally:
        torch.set_num_threads(num_threads)


def test_error_is_raised_at_its_step() -> None:
    def fill(step: int, out: list[int]) -> list[int]:
        if step == 2:
            raise OSError("the disk is gone")
        out[0] = step
        return out

    steps = prefetch(fill, [[-1], [-1]], start=0, stop=5)
    assert [next(steps), next(steps)] == [[0], [1]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_closing_early_ends_the_thread(folder: Path) -> None:
    steps = batches(make_loader(folder), start=0, stop=10**6)
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_nonfinite_keys_are_those_of_all_ranks(tmp_path: Path) -> None:
    folder = tiny.make_shards(tmp_path / "train", sizes=(6, 6))
    tiny.plant_nan(folder, shard=1, records=[2])
    shards = open_shards(folder)
    order = shards.order(batch_size=6, seed=0)
    bad_step = next(step for step in range(2) if 8 in order.records(step))
    for rank in range(2):  # each rank reports the keys of all ranks
        loader = MapLoader(shards=shards, order=order, rank=rank, num_processes=2)
        assert loader.nonfinite_keys(bad_step) == ["01-3-000002"]
        assert loader.nonfinite_keys(1 - bad_step) == []


def test_gather_from_a_thousand_shards(tmp_path: Path) -> None:
    """One batch uses all shards of a set; none is mapped before."""
    num = 1100
    examples = [
        shard_sets.make_examples(1, num_captions=1, kind="plain", seed=seed) for seed in range(num)
    ]
    provenance = shard_sets.make_provenance("plain")
    shard_sets.write_set(tmp_path / "set", examples, provenance)
    shards = open_shards(tmp_path / "set")
    assert (shards._source.slots.of < 0).all()
    records = np.arange(num)[::-1].copy()
    batch = shards.gather(records, np.zeros(num), np.zeros(num))
    for place, record in enumerate(records):
        assert np.array_equal(batch.latent[place].numpy(), examples[record][0].latent[0])
