"""Order: every record once per epoch, as a function of (seed, step)."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards.order import (
    USES,
    Cursor,
    LastBatch,
    Order,
    Shuffle,
    choices,
    mixed_seed,
    share,
)

ORDERS = st.builds(
    Order,
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9).map(tuple),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    shuffle=st.sampled_from(["full", "blocks", "none"]),
    window_shards=st.integers(1, 10),
)


def with_last_batch(order: Order, last_batch: LastBatch) -> Order:
    """Returns the order with another `last_batch`, and a batch size within an epoch."""
    batch_size = min(order.batch_size, order.num_records)
    return replace(order, batch_size=batch_size, last_batch=last_batch)


def visits(order: Order, start: int, stop: int) -> list[int]:
    """Returns all records of steps `start` to `stop`."""
    return np.concatenate([order.records(step) for step in range(start, stop)]).tolist()


@given(order=ORDERS, epoch=st.integers(0, 10**4))
@settings(max_examples=100)
def test_filled_epochs_visit_each_record_once(order: Order, epoch: int) -> None:
    num, size = order.num_records, order.batch_size
    first = epoch * num // size
    found = visits(order, first, -(-(epoch + 1) * num // size))
    start = epoch * num - first * size
    assert sorted(found[start : start + num]) == list(range(num))


@given(order=ORDERS, epoch=st.integers(0, 10**4))
@settings(max_examples=100)
def test_dropped_epochs_have_full_batches(order: Order, epoch: int) -> None:
    order = with_last_batch(order, "drop")
    steps = order.num_records // order.batch_size
    found = visits(order, epoch * steps, (epoch + 1) * steps)
    assert len(set(found)) == len(found) == steps * order.batch_size
    assert order.cursor((epoch + 1) * steps) == Cursor(epoch=epoch + 1, position=0)


@given(
    order=ORDERS,
    last_batch=st.sampled_from(["fill", "drop"]),
    num_processes=st.sampled_from([1, 2, 3, 4]),
    cut=st.integers(0, 10**5),
)
@settings(max_examples=100)
def test_resumed_order_is_identical_on_any_number_of_ranks(
    order: Order, last_batch: LastBatch, num_processes: int, cut: int
) -> None:
    order = with_last_batch(order, last_batch)
    resumed = replace(order)
    step = resumed.step(order.cursor(cut))
    assert step == cut
    size = order.batch_size * num_processes  # divisible by the number of ranks
    wide = Order(sizes=np.tile(order.sizes, num_processes), batch_size=size, seed=order.seed)
    parts = [wide.records(step)[share(size, rank, num_processes)] for rank in range(num_processes)]
    assert [len(part) for part in parts] == [order.batch_size] * num_processes
    assert np.concatenate(parts).tolist() == wide.records(step).tolist()
    assert resumed.records(step).tolist() == order.records(cut).tolist()


@given(order=ORDERS)
@settings(max_examples=50)
def test_sequence_does_not_depend_on_the_batch_size(order: Order) -> None:
    single = replace(order, batch_size=1)
    steps = -(-80 // order.batch_size)
    assert visits(order, 0, steps)[:80] == visits(single, 0, 80)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12).map(tuple),
    window=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_blocks_read_few_shards_at_a_time(sizes: tuple[int, ...], window: int, seed: int) -> None:
    order = Order(sizes=sizes, batch_size=1, seed=seed, shuffle="blocks", window_shards=window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order.visits(3, 0, order.epoch_records)]
    blocks = []
    while len(shard_of):  # a block ends with the last record of its shards
        first_shards = list(dict.fromkeys(shard_of.tolist()))[:window]
        length = sum(sizes[shard] for shard in first_shards)
        assert set(shard_of[:length].tolist()) == set(first_shards)
        blocks.append(len(first_shards))
        shard_of = shard_of[length:]
    assert len(blocks) == -(-len(sizes) // window)


def test_blocks_shuffle_the_records_of_a_window() -> None:
    order = Order(sizes=(50,) * 8, batch_size=1, seed=0, shuffle="blocks", window_shards=4)
    shard_of = order.visits(0, 0, 400) // 50
    assert (np.diff(shard_of[:200]) != 0).sum() > 100
    assert set(shard_of[:200]) != {0, 1, 2, 3}, "windows have random shards"


def test_unshuffled_order_is_that_of_the_shards() -> None:
    order = Order(sizes=(2, 3), batch_size=4, seed=3, shuffle="none")
    assert [order.records(step).tolist() for step in range(2)] == [[0, 1, 2, 3], [4, 0, 1, 2]]
    dropped = Order(sizes=(2, 3), batch_size=4, seed=3, shuffle="none", last_batch="drop")
    assert [dropped.records(step).tolist() for step in range(2)] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_epochs_and_seeds_differ(shuffle: Shuffle) -> None:
    orders = [
        Order(sizes=(25, 25), batch_size=5, seed=seed, shuffle=shuffle, window_shards=1)
        for seed in range(3)
    ]
    found = {tuple(order.visits(epoch, 0, 50)) for order in orders for epoch in range(3)}
    assert len(found) == 9


def test_seeds_of_steps_and_uses_are_unique() -> None:
    seeds = {
        mixed_seed(seed, use, step) for use in USES for seed in range(20) for step in range(99)
    }
    assert len(seeds) == len(USES) * 20 * 99


def test_choices_are_uniform_and_independent() -> None:
    caption_u, view_u = choices(0, 7, 4096)
    assert np.bincount((caption_u * 5).astype(int)).min() > 730
    assert np.bincount((view_u * 2).astype(int)).min() > 1900
    assert abs(np.corrcoef(caption_u, view_u)[0, 1]) < 0.05
    assert not np.array_equal(caption_u, choices(0, 8, 4096)[0])


@pytest.mark.parametrize("shuffle", ["full", "blocks", "none"])
def test_a_step_of_a_large_set_lays_out_no_epoch(shuffle: Shuffle) -> None:
    """A billion records in a hundred thousand shards: a step costs memory for its batch only."""
    order = Order(sizes=(10_000,) * 100_000, batch_size=256, seed=0, shuffle=shuffle)
    order.records(0)
    tracemalloc.start()
    found = order.records(3_000_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(found.tolist())) == 256
    assert peak_bytes < 1_000_000


def test_cursor_of_another_order_is_rejected() -> None:
    order = Order(sizes=(10,), batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"position=3\): no step of 4 records begins at this"):
        order.step(Cursor(epoch=0, position=3))
    with pytest.raises(ValueError, match="in epochs of 10"):
        order.step(Cursor(epoch=0, position=12))


def test_impossible_orders_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"7 records cannot .* among 2 processes \(3\.5 each\)"):
        share(7, 0, 2)
    with pytest.raises(ValueError, match="last_batch: drop leaves no batch of 3 records"):
        Order(sizes=(3,), batch_size=4, seed=0, last_batch="drop")
    with pytest.raises(ValueError, match="expected 1 or more, found 0, 16"):
        Order(sizes=(3,), batch_size=0, seed=0)
