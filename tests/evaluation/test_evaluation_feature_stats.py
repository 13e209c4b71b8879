"""Sums of features do not depend on batches, order or processes; distances have known values."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from latent_t2i.evaluation import feature_stats
from latent_t2i.evaluation.feature_stats import (
    FeatureStats,
    frechet_distance,
    read_header,
    stats_of,
)
from latent_t2i.evaluation.processes import Group
from tests.feature_networks import RandomNetwork, make_batches, smooth_images

T = TypeVar("T")
Rows = NDArray[np.float32]
DIM = 6


def make_rows(num: int, seed: int = 0, dim: int = DIM) -> Rows:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((num, dim)) @ rng.standard_normal((dim, dim)) + 3
    return mixed.astype(np.float32)


def add_in_parts(stats: FeatureStats, rows: Rows, positions: list[int], cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(positions)]
    for start, end in pairwise(bounds):
        chosen = np.array(positions[start:end], np.int64)
        if len(chosen):
            stats.add(chosen, rows[chosen])


@settings(max_examples=15)
@given(
    order=st.permutations(range(40)),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    pending=st.sampled_from([1, 7, 500]),
)
def test_order_and_batches_change_nothing(order: list[int], cuts: list[int], pending: int) -> None:
    rows = make_rows(40)
    expected = FeatureStats(DIM, keep=12, num_parts=3)
    expected.add(np.arange(40), rows)
    stats = FeatureStats(DIM, keep=12, num_parts=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_stats, "PENDING_ROWS", pending)
        add_in_parts(stats, rows, order, cuts)
        assert stats.count == 40
    np.testing.assert_allclose(stats.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        stats.cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-11
    )
    np.testing.assert_array_equal(stats.positions, expected.positions)
    np.testing.assert_array_equal(stats.features, rows[stats.positions])
    assert len(stats.features) == 12
    assert list(stats.positions) == sorted(stats.positions)


@dataclass(frozen=True, kw_only=True)
class ThreadGroup(Group):
    """Processes as threads, which exchange values through a list."""

    values: list[object]
    barrier: threading.Barrier

    def gather(self, value: T) -> list[T]:
        self.values[self.rank] = value
        self.barrier.wait(20)
        found: list[T] = list(self.values)  # type: ignore[arg-type]
        self.barrier.wait(20)
        return found


def run_processes(num: int, work: Callable[[Group], T]) -> list[T]:
    values: list[object] = [None] * num
    barrier = threading.Barrier(num)
    found: dict[int, T] = {}

    def run(rank: int) -> None:
        group = ThreadGroup(rank=rank, world_size=num, values=values, barrier=barrier)
        found[rank] = work(group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(num)]


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("keep", [10, 1000])
def test_processes_change_nothing(num: int, keep: int) -> None:
    rows = make_rows(50)
    alone = FeatureStats(DIM, keep=keep, num_parts=2)
    alone.add(np.arange(50), rows)
    alone.gather(Group())

    def work(group: Group) -> FeatureStats:
        stats = FeatureStats(DIM, keep=keep, num_parts=2)
        share = np.arange(50)[group.rank :: num]
        stats.add(share, rows[share])
        stats.gather(group)
        stats.gather(group)  # of the next metric with the same statistics
        return stats

    for stats in run_processes(num, work):
        assert stats.count == 50
        np.testing.assert_allclose(stats.cov, alone.cov, rtol=1e-11)
        np.testing.assert_array_equal(stats.positions, alone.positions)
        np.testing.assert_array_equal(stats.features, alone.features)
        for part, expected in zip(stats.split(2), alone.split(2), strict=True):
            np.testing.assert_allclose(part.mean, expected.mean, rtol=1e-12)


def test_a_batch_counts_once() -> None:
    network = RandomNetwork()
    stats = FeatureStats(network.dim)
    for batch in make_batches(smooth_images(20, seed=0), 8):
        stats.update(batch, network)
        stats.update(batch, network)  # of another metric
    assert stats.count == 20
    assert network.num_calls == 3


def test_parts_are_disjoint_and_together_the_whole() -> None:
    rows = make_rows(31)
    stats = FeatureStats(DIM, num_parts=3)
    stats.add(np.arange(31), rows)
    parts = stats.split(3)
    for number, part in enumerate(parts):
        np.testing.assert_array_equal(part.positions, np.arange(number, 31, 3))
        np.testing.assert_allclose(part.mean, rows[number::3].astype(np.float64).mean(0))
        np.testing.assert_allclose(
            part.cov, np.cov(rows[number::3].astype(np.float64), rowvar=False), rtol=1e-10
        )
    (whole,) = stats.split(1)
    np.testing.assert_allclose(whole.cov, stats.cov)
    with pytest.raises(ValueError, match="hold 3 parts, expected 2 parts"):
        stats.split(2)


def test_large_means_keep_their_digits() -> None:
    rows = make_rows(500) + np.float32(1e4)
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(stats_of(rows).cov, expected, rtol=1e-9)


def test_files_hold_everything(tmp_path: Path) -> None:
    stats = FeatureStats(DIM, keep=9, num_parts=2)
    stats.add(np.arange(20), make_rows(20))
    stats.identity = {"network": "x", "resize": "legacy"}
    stats.save(tmp_path / "a.npz")
    loaded = FeatureStats.load(tmp_path / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert loaded.identity == stats.identity
    assert loaded.count == 20
    np.testing.assert_allclose(loaded.cov, stats.cov)
    np.testing.assert_array_equal(loaded.features, stats.features)
    np.testing.assert_array_equal(loaded.split(2)[1].positions, stats.split(2)[1].positions)
    header = read_header(tmp_path / "a.npz")
    assert (header.dim, header.has_rows, header.identity) == (DIM, True, stats.identity)


def test_files_of_other_tools(tmp_path: Path) -> None:
    rows = make_rows(20)
    mean, cov = rows.mean(0), np.cov(rows, rowvar=False)
    np.savez(tmp_path / "pytorch-fid.npz", mu=mean, sigma=cov)
    stats = FeatureStats.load(tmp_path / "pytorch-fid.npz")
    assert (stats.count, len(stats.features), stats.identity) == (0, 0, {})
    assert frechet_distance(stats, stats_of(rows)) == pytest.approx(0, abs=1e-5)
    assert not read_header(tmp_path / "pytorch-fid.npz").has_rows
    with pytest.raises(ValueError, match="mean and covariance only, expected 2 parts"):
        stats.split(2)
    stats.identity = {"network": "x"}
    stats.save(tmp_path / "stamped.npz")
    assert FeatureStats.load(tmp_path / "stamped.npz").identity == {"network": "x"}
    np.savez(tmp_path / "clean-fid.npz", feats=rows)
    np.testing.assert_array_equal(FeatureStats.load(tmp_path / "clean-fid.npz").features, rows)
    assert read_header(tmp_path / "clean-fid.npz").has_rows


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK\3\4 broken")
    with pytest.raises(ValueError, match=r"x\.npz is not a \.npz file of statistics"):
        FeatureStats.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="expected the arrays mu and sigma, or feats, found other"):
        FeatureStats.load(path)
    with pytest.raises(ValueError, match="expected the arrays mu and sigma, or feats, found other"):
        read_header(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"expected mu \(D,\) and sigma \(D, D\), found \(3,\)"):
        FeatureStats.load(path)
    np.savez(path, mu=np.full(3, np.nan), sigma=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="mu or sigma is not finite"):
        FeatureStats.load(path)
    np.save(tmp_path / "y.npy", np.zeros(3))
    (tmp_path / "y.npy").rename(path)
    with pytest.raises(ValueError, match="it holds one array"):
        FeatureStats.load(path)


def test_one_image_is_no_distribution() -> None:
    stats = stats_of(make_rows(1))
    with pytest.raises(ValueError, match="found 1 images, expected at least 2"):
        frechet_distance(stats, stats_of(make_rows(9)))


def test_features_that_are_not_finite() -> None:
    rows = make_rows(3)
    rows[1, 2] = np.nan
    with pytest.raises(ValueError, match="the features of image 7 are not finite"):
        FeatureStats(DIM).add(np.array([5, 7, 9]), rows)


@pytest.mark.parametrize("num", [4, 40])
def test_distance_to_itself_is_zero(num: int) -> None:
    stats, again = stats_of(make_rows(num)), stats_of(make_rows(num))
    assert abs(frechet_distance(stats, again)) < 1e-9 * np.trace(stats.cov)


def test_distance_equals_the_definition() -> None:
    a, b = stats_of(make_rows(60)), stats_of(make_rows(50, seed=1))
    root = sqrtm(a.cov @ b.cov).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_distance_of_fewer_images_than_features() -> None:
    """Known: along one axis each, with deviations 2 and 3; the means are 1 apart in a third."""
    a, b = np.zeros((4, 9)), np.zeros((4, 9))
    for rows, deviation in ((a, 2), (b, 3)):
        rows[:, 0] = np.array([-1, 1, -1, 1]) * deviation * np.sqrt(3 / 4)
    b[:, 4] = 1
    stats = [stats_of(rows.astype(np.float32)) for rows in (a, b)]
    assert frechet_distance(*stats) == pytest.approx(1 + (3 - 2) ** 2, rel=1e-6)
    np.testing.assert_allclose(stats[0].root @ stats[0].root.T, stats[0].cov, atol=1e-12)


@pytest.mark.parametrize("num", [4, 40])
def test_distance_of_equal_features(num: int) -> None:
    """A model that draws one picture only has features without a covariance."""
    constant, varied = np.full((num, DIM), 3, np.float32), stats_of(make_rows(50))
    one = stats_of(constant)
    assert frechet_distance(one, stats_of(constant)) == 0
    expected = np.square(varied.mean - 3).sum() + np.trace(varied.cov)
    assert frechet_distance(one, varied) == pytest.approx(expected)
    assert frechet_distance(varied, one) == pytest.approx(expected)
    unknown = FeatureStats.from_moments(one.mean, one.cov)
    assert frechet_distance(unknown, varied) == pytest.approx(expected)
    assert frechet_distance(unknown, one) == 0


def test_the_root_of_few_images_is_the_covariances() -> None:
    """Rows are a shortcut if all of them are kept; without them the covariance is decomposed."""
    few, others = make_rows(5, dim=12), stats_of(make_rows(9, seed=1, dim=12))
    short = stats_of(few)
    whole = FeatureStats.from_moments(short.mean, short.cov)
    assert short.root.shape == (12, 5)
    assert whole.root.shape == (12, 4)
    for stats in (short, whole):
        np.testing.assert_allclose(stats.root @ stats.root.T, short.cov, atol=1e-12)
    assert frechet_distance(short, others) == pytest.approx(frechet_distance(whole, others))


def test_distance_of_different_networks() -> None:
    with pytest.raises(ValueError, match="have 6 and 5 features"):
        frechet_distance(stats_of(make_rows(9)), stats_of(make_rows(9, dim=5)))


def test_bootstrap_inflates_the_distance() -> None:
    """Drawing with replacement repeats images, which lowers the rank: so it is not used here."""
    rng = np.random.default_rng(0)
    dim, num = 24, 60
    reference = stats_of(rng.standard_normal((2000, dim)).astype(np.float32))
    rows = rng.standard_normal((num, dim)).astype(np.float32)
    whole = frechet_distance(stats_of(rows), reference)
    drawn = [
        frechet_distance(stats_of(rows[rng.integers(0, num, num)]), reference) for _ in range(10)
    ]
    assert min(drawn) > 1.2 * whole
