"""Range checks of numeric settings, shared by all commands."""

import math


def check_number(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Raises ValueError unless `value` is a finite number within the bounds.

    `least` and `most` are inclusive, `above` and `below` exclusive. `whole` requires an integer
    value. NaN and infinity are always refused.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not is_number
        or (isinstance(value, float) and not math.isfinite(value))
        or (whole and value != int(value))
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    ):
        bounds = _describe_bounds(least, above, most, below)
        kind = "a whole number" if whole else "" if bounds else "a finite number"
        expected = ", ".join(part for part in (kind, bounds) if part)
        raise ValueError(f"{name}: expected {expected}, found {value!r}")


def _describe_bounds(
    least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    if least is not None and most is not None:
        return f"{least} to {most}"
    bounds = (
        (least, f"{least} or more"),
        (above, f"more than {above}"),
        (most, f"at most {most}"),
        (below, f"less than {below}"),
    )
    return " and ".join(text for bound, text in bounds if bound is not None)
