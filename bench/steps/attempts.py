"""Figures that survive a failure: printed as they come, with the reason for each that is missing.

    python -m bench.steps.attempts FOLDER    what succeeded and failed in a folder of bench/gpu.sh

On a device where a benchmark has never run, one setting may fail in ways that nobody foresaw. That
must not lose the other figures, so the errors caught here are nearly all there are.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,  # also out of memory, CUDA's errors and those of torch.compile
    TypeError,
    ValueError,
)
MAX_REASON = 200


def attempt(name: str, measure: Callable[[], Any]) -> Any:
    """Returns what `measure` returns, or {"failed": reason} if it raises; then frees memory."""
    try:
        return measure()
    except FAILURES as error:
        traceback.print_exc()  # the frames hold networks, so the error is not kept
        reason = first_line(error)
    finally:
        free()
    print(f"{name}: failed: {reason}", flush=True)
    return {"failed": reason}


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:MAX_REASON]


def free() -> None:
    """Frees networks without references, and the memory that PyTorch keeps of them."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()  # compiled code refers to its network
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def emit(figures: dict[str, Any]) -> None:
    """Prints the figures so far as one line of JSON; a later line replaces an earlier one."""
    print(json.dumps(figures), flush=True)


def last_json(text: str) -> dict[str, Any] | None:
    """Returns the last line of a benchmark's output that is a JSON object."""
    lines = [line for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    return json.loads(lines[-1]) if lines else None


def failures(figures: Any, place: str = "") -> list[str]:
    """Returns "place: reason" for each {"failed": reason} within some figures."""
    if not isinstance(figures, dict):
        return []
    if "failed" in figures:
        return [f"{place or 'all'}: {figures['failed']}"]
    return [
        found
        for name, part in figures.items()
        for found in failures(part, f"{place} / {name}" if place else str(name))
    ]


def main() -> None:
    """Writes NAME.json for each NAME.txt with figures, and prints what failed."""
    folder = Path(sys.argv[1])
    problems = {path.stem: summarise(path) for path in sorted(folder.glob("*.txt"))}
    for path in sorted(folder.glob("*.failed")):
        problems.setdefault(path.stem, []).append(path.read_text().strip())
    for name, found in problems.items():
        print(f"{name}: {'; '.join(found) or 'passed'}")
    sys.exit(any(problems.values()) or not problems)


def summarise(path: Path) -> list[str]:
    """Writes the figures of a benchmark's output beside it; returns what is missing."""
    if path.stem == "tests":
        return []
    figures = last_json(path.read_text(encoding="utf-8", errors="replace"))
    if figures is None:
        return ["no figures"]
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    return failures(figures)


if __name__ == "__main__":
    main()
