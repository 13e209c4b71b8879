"""The costs of large sets: a set without shards opens, and every part gives its figures."""

from pathlib import Path

from bench import scale
from latent_t2i.shards.schema import Manifest


def test_a_large_set_opens_without_its_shards(tmp_path: Path) -> None:
    scale.write_set(tmp_path / "set", 5000)
    manifest = Manifest.load(tmp_path / "set")
    assert (len(manifest.shards), manifest.num_records) == (5000, 5_000_000)
    figures = scale.measure_opening(tmp_path / "set")
    assert figures["open_s"] > 0
    assert figures["open_mb"] >= 0


def test_order_and_listing_are_measured() -> None:
    for measure in (scale.measure_order, scale.measure_mixed_order):
        assert all(measure(100, shuffle) > 0 for shuffle in scale.SHUFFLES)
    listed = scale.measure_listing(100)
    assert listed["listed_records_per_s"] > 0
    assert 100 < listed["listed_bytes_per_record"] < 5000
