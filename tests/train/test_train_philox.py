"""Philox against the vectors of Random123 and an implementation on Python's integers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.train.philox import normal, philox, uniform

WORDS = st.integers(0, 2**32 - 1)
ONES = 0xFFFFFFFF
# The three vectors of philox4x32-10 in Random123's kat_vectors: counter, key, words.
VECTORS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def words_of(counter: tuple[int, ...], key: int) -> list[int]:
    """The words of one counter."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [int(word) for word in philox((c0, c1, c2, c3), key)]


def reference(counter: tuple[int, ...], key: int) -> list[int]:
    """The paper's rounds, on Python's integers of any size."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % 2**32, key // 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("name", VECTORS)
def test_words_are_those_of_random123(name: str) -> None:
    counter, (low, high), expected = VECTORS[name]
    assert words_of(counter, high << 32 | low) == list(expected)
    assert reference(counter, high << 32 | low) == list(expected)


@settings(max_examples=50)
@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.integers(0, 2**64 - 1))
def test_words_are_those_of_the_paper_for_any_counter(counter: tuple[int, ...], key: int) -> None:
    assert words_of(counter, key) == reference(counter, key)


def test_words_of_a_counter_are_broadcast() -> None:
    """As many as vectorised loops need, and a rest."""
    rows, columns = torch.arange(3)[:, None] << 30, torch.arange(37) * 0x7000001
    one, key = torch.tensor(7), 9 << 60
    found = torch.stack(philox((rows, columns, one, rows), key))
    assert found.shape == (4, 3, 37)
    for row, column in itertools.product(range(3), range(37)):
        counter = (row << 30, column * 0x7000001, 7, row << 30)
        assert found[:, row, column].tolist() == reference(counter, key)


def test_uniform_numbers_have_53_bits() -> None:
    words = torch.tensor([0, 1 << 5, ONES]), torch.tensor([1 << 6, 0, ONES])
    assert uniform(*words).tolist() == [2**-53, 2**-27, 1 - 2**-53]


def test_normal_numbers_are_box_and_mullers_and_finite_at_the_ends() -> None:
    ends = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, ONES])
    first, second = torch.cartesian_prod(ends, ends).T
    found = normal(torch.stack([first, first, second, second]))
    assert found.isfinite().all()
    assert found.abs().max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)
    radius = (-2 * ((first % 2**31 + 0.5) / 2**31).double().log()).sqrt()
    angle = second.double() * 2 * math.pi / 2**32
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()]).float()
    torch.testing.assert_close(found[::2], expected, rtol=1e-5, atol=3e-6)
    assert torch.equal(found[::2], found[1::2])
