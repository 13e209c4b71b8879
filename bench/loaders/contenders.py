"""Who takes part. A loader whose package is not installed is left out, by name."""

import importlib
import importlib.util
from dataclasses import dataclass

from bench.loaders.contents import Contender


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a contender is made, and what it is counted as."""

    module: str
    maker: str
    arguments: tuple[str, ...] = ()
    package: str | None = None
    """What has to be installed."""
    distribution: str | None = None
    """That package's name for pip."""
    store: str
    """The folder of its records; of several contenders, if they read the same."""
    is_peer: bool = False
    has_workers: bool = True


ENTRIES = {
    "copy": Entry(module="plain_copy", maker="Copy", store="none", has_workers=False),
    "map": Entry(
        module="with_shards", maker="Shards", arguments=("map",), store="shards", has_workers=False
    ),
    "cache": Entry(
        module="with_shards",
        maker="Shards",
        arguments=("cache",),
        store="shards",
        has_workers=False,
    ),
    "stream": Entry(module="with_shards", maker="Shards", arguments=("stream",), store="shards"),
    "webdataset": Entry(
        module="with_webdataset",
        maker="Tars",
        package="webdataset",
        distribution="webdataset",
        store="shards",
        is_peer=True,
    ),
    "streaming": Entry(
        module="with_streaming",
        maker="Mds",
        package="streaming",
        distribution="mosaicml-streaming",
        store="mds",
        is_peer=True,
    ),
    "litdata": Entry(
        module="with_litdata",
        maker="Chunks",
        package="litdata",
        distribution="litdata",
        store="chunks",
        is_peer=True,
    ),
    "datasets": Entry(
        module="with_datasets",
        maker="Arrays",
        package="datasets",
        distribution="datasets",
        store="arrow",
        is_peer=True,
    ),
    "datasets-bytes": Entry(
        module="with_datasets",
        maker="Bytes",
        package="datasets",
        distribution="datasets",
        store="arrow-bytes",
    ),
}


def make(name: str) -> Contender:
    """Returns a contender."""
    entry = ENTRIES[name]
    module = importlib.import_module(f"bench.loaders.{entry.module}")
    made: Contender = getattr(module, entry.maker)(*entry.arguments)
    return made


def missing(names: list[str]) -> dict[str, str]:
    """Returns those that cannot take part, with the reason."""
    return {
        name: f"{ENTRIES[name].distribution} is not installed: see docs/benchmarks.md"
        for name in names
        if (package := ENTRIES[name].package) and importlib.util.find_spec(package) is None
    }
