"""Numbers outside their range are refused, and NaN and infinity always."""

import math
from typing import Any

import pytest

from latent_t2i.model.checks import check_number


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0, {"least": 0}),
        (10**400, {"least": 0}),
        (1, {"least": 0, "most": 1}),
        (0.1, {"above": 0, "below": 1}),
        (-5.5, {}),
        (3, {"whole": True}),
    ],
)
def test_numbers_in_range_are_accepted(value: float, bounds: dict[str, Any]) -> None:
    check_number("x", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1, {"least": 0}, "x: expected 0 or more, found -1"),
        (0, {"above": 0}, "x: expected more than 0, found 0"),
        (2, {"most": 1}, "x: expected at most 1, found 2"),
        (1.0, {"least": 0, "below": 1}, "x: expected 0 or more and less than 1, found 1.0"),
        (1.5, {"least": 0, "most": 1}, "x: expected 0 to 1, found 1.5"),
        (math.nan, {"above": 0}, "x: expected more than 0, found nan"),
        (math.inf, {"above": 0}, "x: expected more than 0, found inf"),
        (-math.inf, {}, "x: expected a finite number, found -inf"),
        (2.5, {"least": 1, "whole": True}, "x: expected a whole number, 1 or more, found 2.5"),
        (True, {"least": 0}, "x: expected 0 or more, found True"),
        ("3", {"least": 0}, "x: expected 0 or more, found '3'"),
    ],
)
def test_other_values_are_refused(value: Any, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_number("x", value, **bounds)
    assert str(caught.value) == message
