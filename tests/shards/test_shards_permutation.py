"""Permutation: a bijection of any size, uniform for single indices and for pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.shards.permutation import SMALL, Permutation


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=100)
def test_every_number_occurs_once(size: int, key: int) -> None:
    permutation, numbers = Permutation(size, key), np.arange(size)
    found = permutation(numbers)
    assert sorted(found.tolist()) == list(range(size))
    assert np.array_equal(permutation.inverse(found), numbers)


@given(
    size=st.integers(2**40, 2**62), key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40 - 9)
)
@settings(max_examples=50)
def test_large_permutations_have_an_inverse(size: int, key: int, start: int) -> None:
    permutation, numbers = Permutation(size, key), np.arange(start, start + 9)
    found = permutation(numbers)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == 9
    assert np.array_equal(permutation.inverse(found), numbers)


def chi_squared(counts: np.ndarray, expected: float) -> float:
    """Returns by how many standard deviations chi-squared exceeds its mean."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [2, 5, SMALL + 1, 1500])
def test_places_are_uniform(size: int) -> None:
    """Over keys, every number is sent to every place equally often."""
    keys, parts = range(1000), min(size, 8)
    sent = np.array([Permutation(size, key)(np.array([0, size - 1])) for key in keys])
    for places in sent.T:
        counts = np.bincount(places * parts // size, minlength=parts)
        assert abs(chi_squared(counts, len(keys) / parts)) < 4


def test_pairs_are_uniform() -> None:
    """Over keys, two neighbours are sent to all pairs of parts of the range equally often."""
    sent = np.array([Permutation(1200, key)(np.array([599, 600])) for key in range(2000)])
    pairs = sent[:, 0] * 6 // 1200 * 6 + sent[:, 1] * 6 // 1200
    assert abs(chi_squared(np.bincount(pairs, minlength=36), 2000 / 36)) < 4


def test_neighbours_of_a_large_permutation_are_unrelated() -> None:
    found = Permutation(10**9, 3)(np.arange(20_000))
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    counts, _ = np.histogram(found, 50, (0, 10**9))
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * np.sqrt(98)
    assert not np.array_equal(found, Permutation(10**9, 4)(np.arange(20_000)))
