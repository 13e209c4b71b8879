"""Page tables stay bounded when more shards are mapped in turn than a process may map at once."""

import sys

import pytest

from bench import mappings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="page tables are in Linux's /proc")


def test_figures() -> None:
    figures = mappings.measure(600, 2**16)
    assert (figures["num_shards"], figures["num_slots"]) == (600, 600)
    assert set(figures) >= {"page_table_mb", "page_table_mb_by_shards", "us_per_shard"}


@pytest.mark.slow
def test_page_tables_do_not_grow_with_the_set() -> None:
    figures = mappings.measure(100_000, 2**21)
    sizes = figures["page_table_mb_by_shards"]
    assert 0 < figures["num_slots"] < 20_000
    later = [size for number, size in sizes.items() if number > 20_000]
    assert len(later) > 4
    assert max(later) - min(later) < 0.05 * max(later) + 1
