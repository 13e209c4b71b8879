"""Batches are functions of (seed, step), for any process count and order of access."""

from pathlib import Path

import pytest
import torch

from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.reader import open_shards
from latent_t2i.train.batches import BatchSource
from tests.train.conftest import assert_same_batch, join


def make_source(
    folder: Path,
    *,
    rank: int = 0,
    num_processes: int = 1,
) -> BatchSource:
    """A source of batches of six records."""
    shards = open_shards(folder)
    order = shards.order(batch_size=6, seed=0)
    return BatchSource(
        loader=MapLoader(shards=shards, order=order, rank=rank, num_processes=num_processes),
        batch_size=6,
        rank=rank,
        num_processes=num_processes,
        pin_memory=False,
    )


@pytest.mark.parametrize("num_processes", [1, 2, 3, 6])
def test_processes_divide_the_same_batch(shards: Path, num_processes: int) -> None:
    whole = make_source(shards).batch(11)
    parts = [
        make_source(shards, rank=rank, num_processes=num_processes).batch(11)
        for rank in range(num_processes)
    ]
    assert_same_batch(join(parts), whole)
    assert whole.positions.tolist() == [[11, position] for position in range(6)]


def test_micro_batches_divide_the_batch(shards: Path) -> None:
    batch = make_source(shards).batch(0)
    pieces = batch.split(4)
    assert [len(piece) for piece in pieces] == [4, 2]
    assert torch.equal(torch.cat([piece.positions for piece in pieces]), batch.positions)


def test_prefetched_batches_equal_single_ones(shards: Path) -> None:
    source = make_source(shards)
    step = 3
    for step, batch in enumerate(source.batches(3, 9), start=3):
        assert_same_batch(batch, source.batch(step))
    assert step == 8
