"""The loaders that are compared."""

import importlib
import importlib.util
from dataclasses import KW_ONLY, dataclass

from bench.loaders.contents import Contender


@dataclass(frozen=True)
class Entry:
    """A contender's class, folder and required package."""

    module: str
    cls: str
    arguments: tuple[str, ...] = ()
    _: KW_ONLY
    store: str
    """Folder of its records; contenders that read the same format share one."""
    package: str | None = None
    """Module that must be installed."""
    distribution: str | None = None
    """Name of that module's package on PyPI."""
    is_peer: bool = False
    has_workers: bool = True


ENTRIES = {
    "copy": Entry("plain_copy", "Copy", store="none", has_workers=False),
    "map": Entry("with_shards", "OneSet", ("map",), store="shards", has_workers=False),
    "two-sets": Entry("with_shards", "TwoSets", ("map",), store="two-sets", has_workers=False),
    "cache": Entry("with_shards", "OneSet", ("cache",), store="shards", has_workers=False),
    "stream": Entry("with_shards", "OneSet", ("stream",), store="shards"),
    "webdataset": Entry(
        "with_webdataset",
        "Tars",
        store="shards",
        package="webdataset",
        distribution="webdataset",
        is_peer=True,
    ),
    "streaming": Entry(
        "with_streaming",
        "Mds",
        store="mds",
        package="streaming",
        distribution="mosaicml-streaming",
        is_peer=True,
    ),
    "litdata": Entry(
        "with_litdata",
        "Chunks",
        store="chunks",
        package="litdata",
        distribution="litdata",
        is_peer=True,
    ),
    "datasets": Entry(
        "with_datasets",
        "Arrays",
        store="arrow",
        package="datasets",
        distribution="datasets",
        is_peer=True,
    ),
    "datasets-bytes": Entry(
        "with_datasets", "Bytes", store="arrow-bytes", package="datasets", distribution="datasets"
    ),
}


def make(name: str) -> Contender:
    """Creates a contender."""
    entry = ENTRIES[name]
    module = importlib.import_module(f"bench.loaders.{entry.module}")
    made: Contender = getattr(module, entry.cls)(*entry.arguments)
    return made


def missing(names: list[str]) -> dict[str, str]:
    """Returns the contenders whose package is not installed, each with the reason."""
    return {
        name: f"{ENTRIES[name].distribution} is not installed: see docs/benchmarks.md"
        for name in names
        if (package := ENTRIES[name].package) and importlib.util.find_spec(package) is None
    }
