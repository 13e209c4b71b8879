"""One door to a set of shards, wherever it lies: mapped, streamed, or cached and then mapped.

    shards = open_set("https://host/train", Access(kind="cache"))
    loader = make_loader(shards, shards.order(batch_size=256, seed=0), rank=0, num_processes=1)

    map      local folders: any record at memory's speed
    cache    the same batches from a URL, through a bounded folder on a local disk
    stream   from a URL, nothing on disk; near records only meet, and resuming is to the shard

All three give the same fields. `auto` maps what is local and caches what is not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.cache import CachedShards, CacheLoader, check_cache
from shards.loader import Loader, MapLoader
from shards.order import Order
from shards.reader import ShardSet, open_shards, require_encoders
from shards.remote import Retry, is_remote
from shards.store import default_cache_dir, open_store
from shards.stream import StreamedShards, StreamLoader, check_stream, open_streamed

Kind = Literal["map", "stream", "cache"]
Asked = Literal["auto", "map", "stream", "cache"]

CACHE_BYTES = 100_000_000_000
WINDOW_RECORDS = 1000


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a set is reached."""

    kind: Kind
    cache_dir: Path | None = None
    """cache: the folder; default: `default_cache_dir()`."""
    cache_bytes: int = CACHE_BYTES
    """cache: the most that the set's shards may take there."""
    num_workers: int = 0
    """stream: processes that read for each rank; 0: the rank's own."""
    window_records: int = WINDOW_RECORDS
    """stream: among how many records a worker mixes."""


def choose_kind(location: str, asked: Asked) -> Kind:
    """Returns how a location is reached. Raises ValueError for a URL that should be mapped."""
    if asked == "auto":
        return "cache" if is_remote(location) else "map"
    if asked == "map" and is_remote(location):
        raise ValueError(
            f"data.access: map needs a folder on a local disk, found {location!r}; "
            "expected cache or stream"
        )
    return asked


def open_set(
    location: str,
    access: Access,
    *,
    vae_sha256: str | None = None,
    text_sha256: str | None = None,
    verify: bool = False,
    retry: Retry | None = None,
) -> ShardSet:
    """Opens a finished set of shards; of one that lies elsewhere, its small files only.

    Given hashes are those of the encoders the caller will use. `verify` hashes every shard that is
    on a local disk; streamed shards cannot be, and fetched ones always are.

    Raises FormatError as `open_shards` does, and RemoteError for a location that cannot be read.
    """
    asked = {"vae_sha256": vae_sha256, "text_sha256": text_sha256}
    if access.kind == "map":
        return open_shards(location, **asked, verify=verify)
    if access.kind == "stream":
        shards: ShardSet = open_streamed(location, retry=retry)
    else:
        folder = access.cache_dir or default_cache_dir()
        shards = CachedShards(
            open_store(location, folder, access.cache_bytes, verify=verify, retry=retry)
        )
    require_encoders(location, shards.manifest, **asked)
    return shards


def check_order(shards: ShardSet, order: Order, access: Access, num_processes: int) -> None:
    """Raises ValueError for an order that a set so reached cannot be visited in."""
    if isinstance(shards, CachedShards):
        check_cache(order, shards.manifest, access.cache_bytes)
    elif isinstance(shards, StreamedShards):
        check_stream(order, num_processes, access.num_workers)


def make_loader(
    shards: ShardSet, order: Order, access: Access, *, rank: int = 0, num_processes: int = 1
) -> Loader:
    """Returns what fills a rank's batches.

    Raises ValueError as `check_order` does.
    """
    check_order(shards, order, access, num_processes)
    if isinstance(shards, CachedShards):
        return CacheLoader(shards=shards, order=order, rank=rank, num_processes=num_processes)
    if isinstance(shards, StreamedShards):
        return StreamLoader(
            shards=shards,
            order=order,
            rank=rank,
            num_processes=num_processes,
            num_workers=access.num_workers,
            window_records=access.window_records,
        )
    return MapLoader(shards=shards, order=order, rank=rank, num_processes=num_processes)
