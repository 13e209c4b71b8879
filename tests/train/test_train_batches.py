"""Order and draws are functions of (seed, step): whoever asks, in whatever order, gets the same."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.diffusion import ObjectiveConfig
from shards.reader import open_shards
from tests import tiny
from train.batches import USES, Batch, Order, Source, draw, epoch_order, mixed_seed

SHAPE = (4, 8, 8)


def make_source(folder: Path, *, rank: int = 0, num_processes: int = 1, seed: int = 0) -> Source:
    """A source of batches of six."""
    shards = open_shards(folder)
    return Source(
        shards=shards,
        order=Order(num_records=len(shards), batch_size=6, seed=seed, shuffle=True),
        latent_shape=SHAPE,
        objective=ObjectiveConfig(caption_dropout=0.5),
        rank=rank,
        num_processes=num_processes,
        pin_memory=False,
    )


def assert_equal(first: Batch, second: Batch) -> None:
    """Compares every tensor bit by bit."""
    for field in fields(Batch):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name


@given(
    num_records=st.integers(1, 50),
    batch_size=st.integers(1, 120),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_every_epoch_visits_every_record_once(
    num_records: int, batch_size: int, seed: int, first: int
) -> None:
    order = Order(num_records=num_records, batch_size=batch_size, seed=seed, shuffle=True)
    steps = range(first, first + 2 + 3 * num_records // batch_size)
    visited = np.concatenate([order.records(step) for step in steps])
    to_next_epoch = -first * batch_size % num_records
    epochs = visited[to_next_epoch:]
    for start in range(0, len(epochs) - num_records + 1, num_records):
        epoch = epochs[start : start + num_records]
        assert sorted(epoch) == list(range(num_records))


@given(batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=30)
def test_the_sequence_is_one_whatever_the_batch_size(batch_size: int, seed: int) -> None:
    def visits(size: int) -> list[int]:
        order = Order(num_records=17, batch_size=size, seed=seed, shuffle=True)
        return np.concatenate([order.records(s) for s in range(-(-80 // size))])[:80].tolist()

    assert visits(batch_size) == visits(1)


def test_without_shuffling_the_order_is_the_shards() -> None:
    order = Order(num_records=5, batch_size=4, seed=3, shuffle=False)
    assert [order.records(step).tolist() for step in range(2)] == [[0, 1, 2, 3], [4, 0, 1, 2]]


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_steps_and_near_seeds_share_no_noise() -> None:
    seeds = {
        mixed_seed(seed, use, step) for use in USES for seed in range(20) for step in range(99)
    }
    assert len(seeds) == 3 * 20 * 99


def test_draws_are_uniform_and_normal() -> None:
    draws = draw(0, 5, 4096, (1, 2, 2), ObjectiveConfig(num_timesteps=10))
    assert 0.08 < draws.drop.float().mean() < 0.12
    assert torch.bincount(draws.timesteps).min() > 340
    assert torch.bincount((draws.caption_u * 5).long()).min() > 730
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(noise.mean()) < 0.03
        assert abs(noise.std() - 1) < 0.03
    assert abs((draws.noise * draws.posterior_noise).mean()) < 0.03


@pytest.mark.parametrize("num_processes", [1, 2, 3, 6])
def test_processes_divide_the_same_batch(shards: Path, num_processes: int) -> None:
    whole = make_source(shards).batch(11)
    shares = [
        make_source(shards, rank=rank, num_processes=num_processes).batch(11)
        for rank in range(num_processes)
    ]
    joined = Batch(
        **{f.name: torch.cat([getattr(b, f.name) for b in shares]) for f in fields(Batch)}
    )
    assert_equal(joined, whole)


def test_micro_batches_divide_the_batch(shards: Path) -> None:
    batch = make_source(shards).batch(0)
    pieces = batch.split(4)
    assert [len(piece) for piece in pieces] == [4, 2]
    assert torch.equal(torch.cat([piece.noise for piece in pieces]), batch.noise)


def test_batches_made_ahead_are_those_asked_for(shards: Path) -> None:
    source = make_source(shards)
    made = list(source.batches(3, 9))
    assert len(made) == 6
    for step, batch in enumerate(made, start=3):
        assert_equal(batch, source.batch(step))


def test_a_record_gets_other_captions_and_noise_in_the_next_epoch(shards: Path) -> None:
    source = make_source(shards)
    first, later = ({int(r): i for i, r in enumerate(source.order.records(s))} for s in (0, 4))
    record = next(iter(first.keys() & later.keys()), None)
    assert record is not None, "seed 0 has a record in both batches"
    noise = [source.batch(s).noise[p[record]] for s, p in ((0, first), (4, later))]
    assert not torch.equal(*noise)


def test_suspects_are_the_records_that_are_not_finite(tmp_path: Path) -> None:
    folder = tiny.make_shards(tmp_path / "train", sizes=(6, 6))
    tiny.plant_nan(folder, shard=1, records=[2])
    source = make_source(folder)
    bad_step = next(s for s in range(2) if 8 in source.order.records(s))
    assert source.suspects(bad_step) == ["01-3-000002"]
    all_keys = source.shards.keys(source.order.records(1 - bad_step))
    assert source.suspects(1 - bad_step) == all_keys
    assert len(all_keys) == 6


def test_an_error_in_the_background_arrives(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(shards)

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(source.shards, "gather", fail)
    with pytest.raises(OSError, match="disk gone"):
        list(source.batches(0, 3))
