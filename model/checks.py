"""Checks of numeric settings and of JSON files, shared by all commands."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 10_000_000


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

    `least` and `most` are inclusive, `above` and `below` exclusive. `whole` requires an integer.
    NaN and infinity are always refused.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not is_number
        or (isinstance(value, float) and not math.isfinite(value))
        or (whole and not isinstance(value, int))
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    ):
        bounds = _describe_bounds(least, above, most, below)
        kind = "a whole number" if whole else "" if bounds else "a finite number"
        expected = ", ".join(part for part in (kind, bounds) if part)
        raise ValueError(f"{name}: expected {expected}, found {value!r:.80}")


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


def read_json_object(path: Path, types: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Returns the JSON object in a file.

    `types` are the required fields; `float` accepts integers, too. Raises ValueError with the
    file's name if it is too large, not valid JSON, or a field is missing or has another type.
    """
    if (num_bytes := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_JSON_BYTES:,} bytes, found {num_bytes:,}")
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(record).__name__}")
    for name, expected in (types or {}).items():
        value: Any = record.get(name)
        if expected in (int, float):
            check_number(f"{path}: {name}", value, least=0, most=2**63 - 1, whole=expected is int)
        elif not isinstance(value, expected):
            found = f"{value!r:.80}" if name in record else "nothing"
            raise ValueError(f"{path}: {name}: expected {expected.__name__}, found {found}")
    return record
