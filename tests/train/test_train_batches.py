"""Batches and draws are functions of (seed, step): whoever asks, in any order, gets the same."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from model.diffusion import ObjectiveConfig
from shards.loader import MapLoader
from shards.reader import open_shards
from train.batches import Batch, Source, draw

NUM_CHANNELS = 4


def make_source(folder: Path, *, rank: int = 0, num_processes: int = 1, seed: int = 0) -> Source:
    """A source of batches of six."""
    shards = open_shards(folder)
    order = shards.order(batch_size=6, seed=seed)
    return Source(
        loader=MapLoader(shards=shards, order=order, rank=rank, num_processes=num_processes),
        seed=seed,
        batch_size=6,
        latent_channels=NUM_CHANNELS,
        objective=ObjectiveConfig(caption_dropout=0.5),
        rank=rank,
        num_processes=num_processes,
        pin_memory=False,
    )


def assert_equal(first: Batch, second: Batch) -> None:
    """Compares every tensor bit by bit."""
    for field in fields(Batch):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name


def test_draws_are_uniform_and_normal() -> None:
    draws = draw(0, 5, 4096, (1, 2, 2), ObjectiveConfig(num_timesteps=10))
    assert 0.08 < draws.drop.float().mean() < 0.12
    assert torch.bincount(draws.timesteps).min() > 340
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
    step = 3
    for step, batch in enumerate(source.batches(3, 9), start=3):
        assert_equal(batch, source.batch(step))
    assert step == 8


def test_a_record_gets_other_captions_and_noise_in_the_next_epoch(shards: Path) -> None:
    source = make_source(shards)
    order = open_shards(shards).order(batch_size=6, seed=0)
    first, later = ({int(r): i for i, r in enumerate(order.records(s))} for s in (0, 4))
    record = next(iter(first.keys() & later.keys()), None)
    assert record is not None, "seed 0 has a record in both batches"
    noise = [source.batch(s).noise[p[record]] for s, p in ((0, first), (4, later))]
    assert not torch.equal(*noise)
