"""Sums of features over any number of images, and the Frechet distance between two of them.

`FeatureStats` keeps the mean and covariance in float64 and a fixed number of feature rows, so its
memory does not grow with the images. Which rows it keeps depends on the images' positions only:
batch size, order and number of processes change neither the rows nor, beyond rounding, the sums.
The files are pytorch-fid's (mu, sigma) with further arrays, so other tools can read them.
"""

from __future__ import annotations

import heapq
import json
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from latent_t2i.evaluation.processes import Group

if TYPE_CHECKING:
    from latent_t2i.evaluation.features import Extractor
    from latent_t2i.evaluation.metrics.metric import Batch

KEEP = 10_000
"""Feature rows that are kept for KID, CMMD, MIND and prdc."""
PENDING_ROWS = 512
"""Rows that are added to the sums at once: a covariance of 2048 features costs as much to update
with 500 rows as with 50."""
HASH_KEY = 0x9E3779B97F4A7C15
Floats = NDArray[np.float64]
Rows = NDArray[np.float32]


class Moments:
    """Running number of rows, mean and scatter matrix, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(dim)  # (D,)
        self.scatter: Floats = np.zeros((dim, dim))  # (D, D)

    def add(self, rows: Rows) -> None:  # (N, D)
        """Adds rows. Squares of the raw features would lose digits if means are large."""
        wide = rows.astype(np.float64)
        mean = wide.mean(0)
        wide -= mean
        self.merge(len(rows), mean, wide.T @ wide)

    def merge(self, count: int, mean: Floats, scatter: Floats) -> None:
        """Adds the moments of other rows (Chan, Golub and LeVeque 1983, equation 1.5)."""
        if not count:
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(shift, shift * (self.count * count / total))
        self.mean = self.mean + shift * (count / total)
        self.count = total


class KeptRows:
    """The rows with the smallest hashes of their positions."""

    def __init__(self, dim: int, keep: int) -> None:
        self._keep = keep
        # Not filled with zeros, so that memory is used only as rows arrive.
        self._rows: Rows = np.empty((keep, dim), np.float32)
        self._positions: NDArray[np.int64] = np.empty(keep, np.int64)
        self._heap: list[tuple[int, int]] = []
        """(-hash, slot); the first entry is the row to drop next."""

    def add(self, positions: NDArray[np.int64], rows: Rows) -> None:
        for position, digest, row in zip(positions, _hashes(positions), rows, strict=True):
            if len(self._heap) < self._keep:
                slot = len(self._heap)
                heapq.heappush(self._heap, (-int(digest), slot))
            elif -int(digest) > self._heap[0][0]:
                slot = self._heap[0][1]
                heapq.heapreplace(self._heap, (-int(digest), slot))
            else:
                continue
            self._rows[slot], self._positions[slot] = row, position

    def sorted(self) -> tuple[NDArray[np.int64], Rows]:
        """Returns the positions (N,) in ascending order, and their rows (N, D)."""
        filled = self._positions[: len(self._heap)]
        order = np.argsort(filled, kind="stable")
        return filled[order], self._rows[: len(filled)][order]


class FeatureStats:
    """Mean, covariance and kept rows of the features of many images."""

    def __init__(self, dim: int, *, keep: int = KEEP, num_parts: int = 1) -> None:
        """`num_parts` disjoint parts, by position modulo `num_parts`, can be split off later."""
        self.dim = dim
        self.num_parts = num_parts
        self.identity: Mapping[str, str] = {}
        """The extractor's identity; empty for statistics of other tools."""
        self._keep = keep
        self._parts = [Moments(dim) for _ in range(num_parts)]
        self._kept = KeptRows(dim, keep)
        self._pending: list[tuple[NDArray[np.int64], Rows]] = []
        self._last_batch: weakref.ref[Batch] | None = None
        self._gathered = False
        self._given: tuple[Floats, Floats] | None = None
        self._cache: dict[str, Any] = {}

    @classmethod
    def from_moments(cls, mean: Floats, cov: Floats) -> FeatureStats:
        """Returns statistics of an unknown number of images, without rows: `count` is 0."""
        stats = cls(len(mean), keep=0)
        stats._given = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        return stats

    def update(self, batch: Batch, extractor: Extractor) -> None:
        """Adds a batch of images; a second call with the same batch does nothing."""
        if self._last_batch is not None and self._last_batch() is batch:
            return
        self._last_batch = weakref.ref(batch)
        self.add(batch.positions, extractor.features(batch))

    def add(self, positions: NDArray[np.int64], rows: Rows) -> None:  # (B,), (B, D)
        """Adds the features of images at unique positions; raises ValueError if not finite."""
        assert not self._gathered and self._given is None
        assert rows.shape == (len(positions), self.dim), (rows.shape, self.dim)
        if not np.isfinite(rows).all():
            bad = positions[~np.isfinite(rows).all(1)][0]
            raise ValueError(
                f"the features of image {bad} are not finite; expected numbers: check the feature "
                "network's weights"
            )
        self._cache.clear()
        self._kept.add(positions, rows)
        self._pending.append((positions, rows))
        if sum(len(rows) for _, rows in self._pending) >= PENDING_ROWS:
            self._flush()

    def gather(self, group: Group) -> None:
        """Combines the statistics of all processes; later calls do nothing."""
        if self._gathered:
            return
        self._flush()
        if group.world_size > 1:
            self._gather_parts(group)
            self._gather_rows(group)
            self._cache.clear()
        self._gathered = True

    @property
    def count(self) -> int:
        """Number of images; 0 if unknown, as in other tools' statistics."""
        self._flush()
        return sum(part.count for part in self._parts)

    @property
    def mean(self) -> Floats:  # (D,)
        return self._moments()[0]

    @property
    def cov(self) -> Floats:  # (D, D)
        """The unbiased covariance; raises ValueError for fewer than two images."""
        return self._moments()[1]

    @property
    def positions(self) -> NDArray[np.int64]:  # (N,)
        """Positions of the kept rows, ascending."""
        return self._rows()[0]

    @property
    def features(self) -> Rows:  # (N, D)
        """The kept rows, by position; none in other tools' mean and covariance."""
        return self._rows()[1]

    @property
    def root(self) -> Floats:  # (D, R)
        """A matrix with root @ root.T = cov; its columns are at most the images or the features."""
        if "root" not in self._cache:
            self._cache["root"] = self._make_root()
        found: Floats = self._cache["root"]
        return found

    def _make_root(self) -> Floats:
        rows = self.features
        if 1 < self.count == len(rows) <= self.dim:
            # All images are there: no need to decompose the much larger covariance.
            return (rows - self.mean).T / np.sqrt(self.count - 1)
        values, vectors = np.linalg.eigh(self.cov)
        held = ~_is_rounding(values)
        return vectors[:, held] * np.sqrt(values[held])

    def split(self, num_parts: int) -> list[FeatureStats]:
        """Returns the statistics of disjoint parts of the images: position modulo `num_parts`.

        `num_parts` must divide the number that the statistics were made with.
        """
        if self._given is not None or self.num_parts % num_parts:
            found = "mean and covariance only" if self._given else f"{self.num_parts} parts"
            raise ValueError(f"the statistics hold {found}, expected {num_parts} parts")
        self._flush()
        positions, rows = self._rows()
        parts = []
        for number in range(num_parts):
            part = FeatureStats(self.dim, keep=self._keep)
            part.identity = self.identity
            for moments in self._parts[number::num_parts]:
                part._parts[0].merge(moments.count, moments.mean, moments.scatter)
            chosen = positions % num_parts == number
            part._kept.add(positions[chosen], rows[chosen])
            parts.append(part)
        return parts

    def save(self, path: Path) -> None:
        """Writes a .npz file; `mu` and `sigma` are as in pytorch-fid's."""
        self._flush()
        arrays = {
            "mu": self.mean,
            "sigma": self.cov,
            "identity": np.array(json.dumps(dict(self.identity))),
        }
        if self._given is None:
            positions, features = self._rows()
            arrays |= {
                "positions": positions,
                "features": features,
                "part_counts": np.array([part.count for part in self._parts]),
                "part_means": np.stack([part.mean for part in self._parts]),
                "part_scatters": np.stack([part.scatter for part in self._parts]),
            }
        # Two evaluations may make the same reference at once.
        partial = path.with_name(f".{path.name}.{uuid4().hex}")
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs see allow_pickle
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> FeatureStats:
        """Reads a file of `save`, or mean and covariance of pytorch-fid or clean-fid.

        clean-fid's files of features (`feats`) are read, too. Raises ValueError for other files.
        """
        with open_npz(path) as file:
            arrays = dict(file)
        if "part_scatters" in arrays:
            return cls._restore(path, arrays)
        stats = _foreign(path, arrays)
        stats.identity = _identity(arrays)
        return stats

    @classmethod
    def _restore(cls, path: Path, arrays: Mapping[str, NDArray[Any]]) -> FeatureStats:
        try:
            stats = cls(len(arrays["mu"]), num_parts=len(arrays["part_counts"]))
            stats.identity = _identity(arrays)
            stats._kept.add(arrays["positions"], arrays["features"])
            means, scatters = arrays["part_means"], arrays["part_scatters"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: incomplete statistics: {error}") from error
        for part, count, mean, scatter in zip(
            stats._parts, arrays["part_counts"], means, scatters, strict=True
        ):
            part.merge(int(count), mean, scatter)
        stats._gathered = True
        return stats

    def _flush(self) -> None:
        if not self._pending:
            return
        positions = np.concatenate([positions for positions, _ in self._pending])
        rows = np.concatenate([rows for _, rows in self._pending])
        self._pending.clear()
        for number, part in enumerate(self._parts):
            chosen = rows[positions % self.num_parts == number]
            if len(chosen):
                part.add(chosen)

    def _moments(self) -> tuple[Floats, Floats]:
        if self._given is not None:
            return self._given
        self._flush()
        if "moments" not in self._cache:
            whole = Moments(self.dim)
            for part in self._parts:
                whole.merge(part.count, part.mean, part.scatter)
            if whole.count < 2:
                raise ValueError(
                    f"found {whole.count} images, expected at least 2: a distribution of features "
                    "needs more than one"
                )
            self._cache["moments"] = whole.mean, whole.scatter / (whole.count - 1)
        found: tuple[Floats, Floats] = self._cache["moments"]
        return found

    def _rows(self) -> tuple[NDArray[np.int64], Rows]:
        if "rows" not in self._cache:
            self._cache["rows"] = self._kept.sorted()
        found: tuple[NDArray[np.int64], Rows] = self._cache["rows"]
        return found

    def _gather_parts(self, group: Group) -> None:
        sums = [(part.count, part.mean, part.scatter) for part in self._parts]
        self._parts = [Moments(self.dim) for _ in self._parts]
        for others in group.gather(sums):
            for part, other in zip(self._parts, others, strict=True):
                part.merge(*other)

    def _gather_rows(self, group: Group) -> None:
        positions, rows = self._kept.sorted()
        digests = _hashes(positions)
        # Only the rows that remain are sent: together they are no more than `keep`.
        found = np.sort(np.concatenate(group.gather(digests)))
        if len(found) > self._keep:
            chosen = digests <= found[self._keep - 1]
            positions, rows = positions[chosen], rows[chosen]
        self._kept = KeptRows(self.dim, self._keep)
        for other_positions, other_rows in group.gather((positions, rows)):
            self._kept.add(other_positions, other_rows)


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Returns the Frechet distance of two normal distributions (Dowson and Landau 1982).

    tr sqrt(A B) is the sum of the roots of the eigenvalues of R^T B R, with A = R R^T. That matrix
    is symmetric, so the eigenvalues are real and exact to rounding; `sqrtm` is neither for
    covariances of low rank (fewer images than features).
    """
    if a.dim != b.dim:
        raise ValueError(f"the statistics have {a.dim} and {b.dim} features, expected the same")
    # The lower rank gives the smaller eigenproblem. 0 images: unknown, so probably many.
    low, high = sorted((a, b), key=lambda stats: stats.count or np.inf)
    root = low.root
    values = np.linalg.eigvalsh(root.T @ high.cov @ root)
    # The root would make 1e-8 of an eigenvalue that is 0 but for rounding.
    cross = np.sqrt(values[~_is_rounding(values)]).sum()
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file of statistics says of itself."""

    identity: Mapping[str, str]
    dim: int
    has_rows: bool


def _is_rounding(eigenvalues: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns which of a positive matrix's eigenvalues, in ascending order, are zero."""
    # Equal features have no covariance: its root has no columns, so there is no eigenvalue left.
    largest = eigenvalues[-1] if len(eigenvalues) else 0.0
    limit = largest * len(eigenvalues) * np.finfo(np.float64).eps
    return np.asarray(eigenvalues <= limit)


def read_header(path: Path) -> Header:
    """Returns a file's header without reading its covariance; raises ValueError as `load` does."""
    with open_npz(path) as file:
        name = next((name for name in ("mu", "feats") if name in file.files), None)
        if name is None:
            found = ", ".join(file.files)[:200] or "nothing"
            raise ValueError(f"{path}: expected the arrays mu and sigma, or feats, found {found}")
        return Header(
            identity=_identity({"identity": file["identity"]} if "identity" in file.files else {}),
            dim=int(file[name].shape[-1]),
            has_rows=bool({"features", "feats"} & set(file.files)),
        )


@contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    """Opens a .npz file; raises ValueError, with its name, if it is not one."""
    try:
        # NumPy leaves a file that it opens itself open after an error.
        with path.open("rb") as binary:
            file = np.load(binary, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            yield file
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is not a .npz file of statistics: {error}") from error


def _identity(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, str]:
    found = json.loads(str(arrays["identity"])) if "identity" in arrays else {}
    return {str(key): str(value) for key, value in found.items()}


def subset(features: Rows, size: int, rng: np.random.RandomState) -> Rows:
    """Returns `size` rows without replacement: duplicates would lower the covariance's rank."""
    return features[rng.choice(len(features), size, replace=False)]


def stats_of(features: Rows) -> FeatureStats:
    """Returns the statistics of rows (N, D)."""
    stats = FeatureStats(features.shape[1], keep=len(features))
    stats.add(np.arange(len(features)), features)
    return stats


def _foreign(path: Path, arrays: Mapping[str, NDArray[Any]]) -> FeatureStats:
    """Returns statistics of pytorch-fid (mu, sigma) or clean-fid (the same, or feats)."""
    if "feats" in arrays and arrays["feats"].ndim == 2:
        return stats_of(arrays["feats"].astype(np.float32))
    if not {"mu", "sigma"} <= arrays.keys():
        found = ", ".join(arrays)[:200] or "nothing"
        raise ValueError(f"{path}: expected the arrays mu and sigma, or feats, found {found}")
    mean, cov = arrays["mu"], arrays["sigma"]
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: expected mu (D,) and sigma (D, D), found {mean.shape} and {cov.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: mu or sigma is not finite")
    return FeatureStats.from_moments(mean, cov)


def _hashes(positions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns pseudo-random numbers that depend on the positions only (SplitMix64's mixer)."""
    mixed = np.asarray(positions).astype(np.uint64) + np.uint64(HASH_KEY)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
