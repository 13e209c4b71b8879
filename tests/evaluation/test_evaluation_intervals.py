"""Bootstrap intervals against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.evaluation.intervals import interval, wilson


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = interval(values.tolist(), num=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_images_of_one_prompt_count_as_one() -> None:
    per_prompt = np.random.default_rng(1).normal(0, 1, size=100)
    once = interval(per_prompt.tolist(), num=4000)
    fourfold = np.repeat(per_prompt, 4).tolist()
    prompts = np.repeat(np.arange(100), 4).tolist()
    assert interval(fourfold, prompts, num=4000) == once, "copies of an image say nothing new"
    low, high = interval(fourfold, num=4000)
    assert (high - low) == pytest.approx((once[1] - once[0]) / 2, rel=0.1)


def test_prompts_weigh_by_their_number_of_images() -> None:
    values, prompts = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    low, high = interval(values, prompts)
    assert (low, high) == (0.0, 1.0)
    assert interval([2.0, 2.0, 2.0], ["a", "a", "b"]) == (2.0, 2.0)


@settings(max_examples=25)
@given(
    st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=20),
    st.integers(0, 9),
)
def test_an_interval_lies_among_the_values_and_is_reproducible(
    values: list[float], seed: int
) -> None:
    numbers = [value for value in values if not np.isnan(value)]
    if not numbers:
        with pytest.raises(ValueError, match="an interval needs at least one number"):
            interval(values, num=20, seed=seed)
        return
    low, high = interval(values, num=20, seed=seed)
    assert min(numbers) - 1e-9 <= low <= high <= max(numbers) + 1e-9
    assert (low, high) == interval(numbers, num=20, seed=seed), "NaNs are left out"


def test_many_values_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=50).tolist()
    whole = interval(values, num=100, seed=3)
    monkeypatch.setattr("latent_t2i.evaluation.intervals._NUM_AT_ONCE", 350)
    assert interval(values, num=100, seed=3) == whole


def test_wilson_interval_of_known_values() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0
