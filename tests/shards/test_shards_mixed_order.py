"""MixedOrder: weighted sets, each record once per pass over its set, in proportion everywhere."""

import pickle
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards.bucket_order import interleave
from latent_t2i.shards.mixed_order import MixedOrder, interleave_span
from latent_t2i.shards.order import Cursor

PARTS = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=2, max_size=4
).map(tuple)
WEIGHTS = st.one_of(st.sampled_from([0.5, 1, 2, 3]), st.floats(0.5, 4))


@st.composite
def orders(draw: st.DrawFn, last_batch: str | None = None) -> MixedOrder:
    """Any order; with `drop`, an epoch has at least one batch."""
    parts = draw(PARTS)
    weights = tuple(draw(WEIGHTS) for _ in parts)
    visits = [round(w * sum(sizes)) for w, sizes in zip(weights, parts, strict=True)]
    weights = tuple(w if v else 1 for w, v in zip(weights, visits, strict=True))
    visits = [round(w * sum(sizes)) for w, sizes in zip(weights, parts, strict=True)]
    last_batch = last_batch or draw(st.sampled_from(["fill", "drop"]))
    most = sum(visits) if last_batch == "drop" else 60
    return MixedOrder(
        parts=parts,
        weights=weights,
        batch_size=draw(st.integers(1, most)),
        seed=draw(st.integers(0, 2**40)),
        shuffle=draw(st.sampled_from(["full", "blocks", "none"])),
        window_shards=2,
        last_batch=last_batch,  # type: ignore[arg-type]
    )


def by_set(order: MixedOrder, records: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Yields each set and the records of it, by its own numbers, in order."""
    ends = np.cumsum([sum(sizes) for sizes in order.parts])
    numbers = np.searchsorted(ends, records, side="right")
    for number, sizes in enumerate(order.parts):
        yield number, (records[numbers == number] - ends[number] + sum(sizes)).tolist()


@given(order=orders("fill"), epochs=st.integers(1, 4))
@settings(max_examples=25)
def test_each_pass_over_a_set_visits_each_record_once(order: MixedOrder, epochs: int) -> None:
    steps = order.num_steps(epochs)
    found = np.concatenate([order.records(step) for step in range(steps)])
    for number, local in by_set(order, found[: epochs * order.num_visits]):
        num = sum(order.parts[number])
        assert len(local) == epochs * round(order.weights[number] * num)
        for start in range(0, len(local), num):
            one = local[start : start + num]
            assert len(set(one)) == len(one)
            assert len(one) < num or sorted(one) == list(range(num))


@given(order=orders("drop"), epoch=st.integers(0, 10**4))
@settings(max_examples=25)
def test_dropped_epochs_have_full_batches_of_the_same_visits(order: MixedOrder, epoch: int) -> None:
    num = order.num_visits // order.batch_size
    found = np.concatenate([order.records(s) for s in range(epoch * num, (epoch + 1) * num)])
    assert len(found) == order.epoch_records == num * order.batch_size
    filled = replace(order, last_batch="fill")
    start = epoch * order.num_visits
    assert found.tolist() == filled.run_visits(start, start + len(found)).tolist()


@given(order=orders("fill"), data=st.data())
@settings(max_examples=25)
def test_every_window_of_an_epoch_has_the_sets_in_proportion(
    order: MixedOrder, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, order.num_visits - 1))
    stop = data.draw(st.integers(start + 1, order.num_visits))
    found = order.visits(data.draw(st.integers(0, 99)), start, stop)
    for number, local in by_set(order, found):
        share_of_set = (stop - start) * order.counts[number] / order.num_visits
        # A set is within one of its share up to a time, and a position within one per set.
        assert abs(len(local) - share_of_set) <= 2 * (len(order.parts) + 1)


@given(order=orders(), step=st.integers(0, 10**5))
@settings(max_examples=25)
def test_the_cursor_is_the_whole_state(order: MixedOrder, step: int) -> None:
    resumed: MixedOrder = pickle.loads(pickle.dumps(order))
    cursor = Cursor(**vars(order.cursor(step)))
    assert resumed.step(cursor) == step
    assert resumed.records(step).tolist() == order.records(step).tolist()


@given(order=orders("fill"), step=st.integers(0, 300), other=st.integers(1, 60))
@settings(max_examples=25)
def test_visits_do_not_depend_on_the_batch_size(order: MixedOrder, step: int, other: int) -> None:
    start, stop = step * order.batch_size, (step + 1) * order.batch_size
    again = replace(order, batch_size=other)
    steps = range(start // other, ceil(stop / other))
    found = np.concatenate([again.records(one) for one in steps]).tolist()
    first = start - steps.start * other
    assert found[first : first + stop - start] == order.records(step).tolist()


COUNTS = st.lists(st.integers(1, 50), min_size=1, max_size=5).map(tuple)


@given(counts=COUNTS, key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=25)
def test_positions_found_together_are_those_found_alone(
    counts: tuple[int, ...], key: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, sum(counts) - 1))
    stop = data.draw(st.integers(start + 1, sum(counts)))
    sets, indices = interleave_span(counts, key, start, stop)
    expected = [interleave(counts, key, position) for position in range(start, stop)]
    assert list(zip(sets.tolist(), indices.tolist(), strict=True)) == expected


def test_large_counts_are_exact() -> None:
    counts = (2**31, 10**9, 3)
    for start in (0, 12_345_678, sum(counts) - 40):
        sets, indices = interleave_span(counts, 5, start, start + 40)
        alone = [interleave(counts, 5, position) for position in range(start, start + 40)]
        assert list(zip(sets.tolist(), indices.tolist(), strict=True)) == alone


def test_a_batch_of_a_large_mixture_takes_little_memory() -> None:
    order = MixedOrder(
        parts=((10**6,) * 500, (10**6,) * 300), weights=(1, 0.5), batch_size=256, seed=0
    )
    order.records(0)
    tracemalloc.start()
    order.records(10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_weights_without_a_visit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.weights: set 2 of 2: 0.1 x 3 records = 0 visits"):
        MixedOrder(parts=((4,), (3,)), weights=(1, 0.1), batch_size=2, seed=0)
