"""What stage one prints: sizes, durations, and an estimate after the first shard."""

import io
from typing import Any

import pytest
from tqdm import tqdm

from latent_t2i.model.paths import format_bytes
from latent_t2i.pipeline import report


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.0 MB"), (1_250_000, "1.2 MB"), (999_900_000, "999.9 MB"), (49_000_000_000, "49.0 GB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (90, "2 min"), (7100, "118 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_first_reasons() -> None:
    many = {f"{number}": "not an image" for number in range(12)}
    assert report.first_of({"a": "empty file"}) == ["a: empty file"]
    assert report.first_of(many)[-2:] == ["9: not an image", "and 2 more"]


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("total", [1000, 20])
def test_the_remaining_time_is_printed_once_after_the_first_shard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int
) -> None:
    clock: Any = Clock()
    monkeypatch.setattr("latent_t2i.pipeline.report.time.perf_counter", clock)
    bar: Any = tqdm(total=total, file=io.StringIO())
    meter = report.Meter(bar, total)
    for num_shards in (0, 1, 2):
        clock.now += 1
        meter.add(5, 1, num_bytes=2_000_000 * num_shards, num_shards=num_shards)
    printed = capsys.readouterr().err
    expected = "first shard after 2 s: 5 images/s, about 3 min remaining\n"
    assert printed == (expected if total == 1000 else "")
    assert bar.postfix == "4.0 MB, 3 quarantined"
    assert bar.n == 15
    bar.close()
