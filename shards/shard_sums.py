"""What the statistics of a set are merged from, by planned shard: the file shard_sums.npy.

Row `i` belongs to planned shard `i`, also if all its images were quarantined. Together with the
shard table and the quarantine, the rows are the reports of a finished set, so that it can grow.
Nothing else reads them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.latent_stats import LatentSums
from latent_t2i.shards.schema import Manifest
from latent_t2i.shards.shard_table import map_rows

SUMS_NAME = "shard_sums.npy"


def sums_dtype(num_channels: int) -> np.dtype[Any]:
    """Returns the dtype of a row: captions, truncated ones, and the members of `LatentSums`."""
    counts = [(name, "<u8") for name in ("captions", "truncated", "count")]
    sums = [(name, "<f8", (num_channels,)) for name in ("total", "squares")]
    return np.dtype([*counts, *sums])


def read_sums(folder: Path, manifest: Manifest) -> NDArray[Any]:
    """Maps the rows of all planned shards of a set of version 3.

    Raises FormatError if the file is missing, altered, or of another dtype or length.
    """
    entry = manifest.shard_sums
    assert entry is not None
    return map_rows(folder / entry.name, entry, sums_dtype(manifest.latent_channels))


def sums_of(row: Any) -> LatentSums:
    """Returns the latent sums of a row, bit for bit; empty ones for a shard without records."""
    if not row["count"]:
        return LatentSums()
    return LatentSums(
        count=int(row["count"]),
        total=tuple(row["total"].tolist()),
        squares=tuple(row["squares"].tolist()),
    )
