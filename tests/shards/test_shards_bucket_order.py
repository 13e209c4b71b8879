"""BucketOrder: one bucket per batch, each record once per epoch of its bucket."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards.bucket_order import BucketOrder, interleave
from latent_t2i.shards.order import Cursor, share

SIZES = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
).map(tuple)


@st.composite
def orders(draw: st.DrawFn, last_batch: str | None = None) -> BucketOrder:
    """Any order; with `drop`, at least one bucket has a full batch."""
    sizes = draw(SIZES)
    last_batch = last_batch or draw(st.sampled_from(["fill", "drop"]))
    largest = max(map(sum, sizes)) if last_batch == "drop" else 40
    return BucketOrder(
        sizes=sizes,
        batch_size=draw(st.integers(1, largest)),
        seed=draw(st.integers(0, 2**40)),
        shuffle=draw(st.sampled_from(["full", "blocks", "none"])),
        window_shards=2,
        last_batch=last_batch,  # type: ignore[arg-type]
    )


def bucket_of(order: BucketOrder, records: np.ndarray) -> int:
    """Returns the bucket of all records of a batch."""
    (bucket,) = np.unique(np.searchsorted(np.cumsum(order.counts), records, side="right"))
    return int(bucket)


@given(order=orders("fill"), epoch=st.integers(0, 12))
@settings(max_examples=60)
def test_filled_epochs_visit_each_bucket_record_once(order: BucketOrder, epoch: int) -> None:
    """At the end of each epoch, each bucket has finished its epoch, with no batch more."""
    steps = order.num_steps(epoch + 1)
    visited: dict[int, list[int]] = {bucket: [] for bucket in range(len(order.sizes))}
    for step in range(steps):
        records = order.records(step)
        assert len(records) == order.batch_size
        visited[bucket_of(order, records)] += records.tolist()
    first = 0
    for bucket, num in enumerate(order.counts.tolist()):
        found = visited[bucket]
        assert 0 <= len(found) - (epoch + 1) * num < order.batch_size
        for start in range(0, (epoch + 1) * num, num):
            assert sorted(found[start : start + num]) == list(range(first, first + num))
        first += num


@given(order=orders("drop"), epoch=st.integers(0, 10**4))
@settings(max_examples=80)
def test_dropped_epochs_of_buckets_have_full_batches(order: BucketOrder, epoch: int) -> None:
    steps = range(order.num_steps(epoch), order.num_steps(epoch + 1))
    batches = [order.records(step) for step in steps]
    found = np.concatenate(batches).tolist()
    assert len(set(found)) == len(found) == order.epoch_records
    of_bucket = np.bincount([bucket_of(order, b) for b in batches], minlength=len(order.sizes))
    assert of_bucket.tolist() == (order.counts // order.batch_size).tolist()


@given(order=orders(), step=st.integers(0, 10**5))
@settings(max_examples=80)
def test_bucket_cursor_is_the_whole_state(order: BucketOrder, step: int) -> None:
    resumed: BucketOrder = pickle.loads(pickle.dumps(order))
    cursor = Cursor(**vars(order.cursor(step)))
    assert resumed.step(cursor) == step
    assert resumed.records(step).tolist() == order.records(step).tolist()
    assert order.num_steps(cursor.epoch) <= step < order.num_steps(cursor.epoch + 1)
    assert cursor.epoch <= order.num_epochs(step) < cursor.epoch + 1
    assert order.num_epochs(step) < order.num_epochs(step + 1)


@given(order=orders("fill"), num_processes=st.sampled_from([1, 2, 4]), step=st.integers(0, 500))
@settings(max_examples=50)
def test_ranks_divide_batches_of_one_bucket(
    order: BucketOrder, num_processes: int, step: int
) -> None:
    size = order.batch_size * num_processes
    wide = BucketOrder(sizes=order.sizes, batch_size=size, seed=order.seed)
    records = wide.records(step)
    parts = [records[share(size, rank, num_processes)] for rank in range(num_processes)]
    assert {len(part) for part in parts} == {order.batch_size}
    assert len({bucket_of(wide, part) for part in parts}) == 1


def test_bucket_sequence_differs_by_epoch_and_seed() -> None:
    made = [BucketOrder(sizes=((40,), (24,)), batch_size=4, seed=seed) for seed in range(3)]
    found = {
        tuple(order.locate(step)[0] for step in range(16 * epoch, 16 * epoch + 16))
        for order in made
        for epoch in range(3)
    }
    assert len(found) == 9
    assert {sum(sequence) for sequence in found} == {6}


def test_unshuffled_buckets_come_in_order() -> None:
    order = BucketOrder(sizes=((2, 3), (2,)), batch_size=2, seed=3, shuffle="none")
    found = [order.records(step).tolist() for step in range(7)]
    assert found == [[0, 1], [2, 3], [4, 0], [5, 6], [1, 2], [3, 4], [5, 6]]


def test_buckets_of_equal_size_have_different_orders() -> None:
    order = BucketOrder(sizes=((30,), (30,)), batch_size=5, seed=0)
    first, second = (own.visits(0, 0, 30).tolist() for own in order.orders)
    assert first != second


def test_small_bucket_is_visited_in_proportion() -> None:
    order = BucketOrder(sizes=((3,), (40,)), batch_size=10, seed=0)
    places = [order.locate(step) for step in range(order.num_steps(10))]
    assert sum(bucket == 0 for bucket, _ in places) == 3
    assert order.batches_before(1).tolist() == [1, 4]
    dropped = BucketOrder(sizes=((3,), (40,)), batch_size=10, seed=0, last_batch="drop")
    assert {dropped.locate(step)[0] for step in range(99)} == {1}
    assert (order.epoch_records, dropped.epoch_records) == (43, 40)


def test_impossible_bucket_orders_are_rejected() -> None:
    with pytest.raises(ValueError, match="drop leaves no batch: the largest bucket has 5 records"):
        BucketOrder(sizes=((3,), (4, 1)), batch_size=6, seed=0, last_batch="drop")
    with pytest.raises(ValueError, match="expected 1 or more, found 0, 16"):
        BucketOrder(sizes=((3,),), batch_size=0, seed=0)
    order = BucketOrder(sizes=((10,),), batch_size=4, seed=0)
    assert order.num_steps(1) == 3
    for position in (3, 12):
        with pytest.raises(ValueError, match="no step of 4 records begins at this position"):
            order.step(Cursor(epoch=0, position=position))


@given(
    num_batches=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any).map(tuple),
    key=st.integers(0, 2**64 - 1),
)
@settings(max_examples=60)
def test_interleaving_keeps_each_buckets_order_and_share(
    num_batches: tuple[int, ...], key: int
) -> None:
    total = sum(num_batches)
    places = [interleave(num_batches, key, position) for position in range(total)]
    for bucket, num in enumerate(num_batches):
        assert [index for b, index in places if b == bucket] == list(range(num))
        for position in range(total + 1):
            visited = sum(b == bucket for b, _ in places[:position])
            assert abs(visited - num * position / total) <= len(num_batches) + 1


def test_interleaving_a_billion_batches_is_quick() -> None:
    position = 3 * 10**8
    bucket, index = interleave((5 * 10**8, 4 * 10**8, 10**8), 7, position)
    assert abs(index / (5, 4, 1)[bucket] / 10**8 - 0.3) < 1e-6
