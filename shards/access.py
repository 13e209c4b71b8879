"""One door to a set of shards, wherever it lies: mapped, streamed, or cached and then mapped.

    shards = open_set("https://host/train", Access(kind="cache"))
    loader = make_loader(shards, shards.order(batch_size=256, seed=0), rank=0, num_processes=1)

    map      local folders: any record at memory's speed
    cache    the same batches from a URL, through a bounded folder on a local disk
    stream   from a URL, nothing on disk; near records only meet, and resuming is to the shard

All three give the same fields. `auto` maps what is local and caches what is not. A bucketed set is
opened the same way, mapped or cached as a whole; it is not streamed, since readers of a stream go
their own ways and could not agree on whose turn it is.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.buckets import BucketedShards, Buckets, holds_buckets, open_buckets
from latent_t2i.shards.loader import BucketLoader, Loader, MapLoader
from latent_t2i.shards.order import Order
from latent_t2i.shards.reader import ShardSet, open_shards, require_encoders
from latent_t2i.shards.remote.cache import CachedShards, CacheLoader, check_cache
from latent_t2i.shards.remote.store import default_cache_dir, open_store
from latent_t2i.shards.remote.stream import (
    StreamedShards,
    StreamLoader,
    check_stream,
    open_streamed,
)
from latent_t2i.shards.remote.transport import PIPE, RemoteError, Retry, is_remote, join, read_file
from latent_t2i.shards.schema import BUCKETS_NAME, FormatError
from latent_t2i.shards.settings import CACHE_BYTES, WINDOW_RECORDS, AccessMode

Kind = Literal["map", "stream", "cache"]


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


def choose_kind(location: str, asked: AccessMode) -> Kind:
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
) -> ShardSet | BucketedShards:
    """Opens a finished set of shards, bucketed or not; of one elsewhere, its small files only.

    Given hashes are those of the encoders the caller will use. `verify` hashes every shard that is
    on a local disk; streamed shards cannot be, and fetched ones always are.

    Raises FormatError as `open_shards` does, RemoteError for a location that cannot be read, and
    ValueError for a bucketed set that should be streamed.
    """
    shards = _open(location, access, verify=verify, retry=retry)
    require_encoders(location, shards.manifest, vae_sha256=vae_sha256, text_sha256=text_sha256)
    return shards


def _open(
    location: str, access: Access, *, verify: bool, retry: Retry | None
) -> ShardSet | BucketedShards:
    if not is_remote(location):
        if not holds_buckets(Path(location)):
            return _open_one(location, access, verify=verify, retry=retry)
        return _open_buckets(location, access, verify=verify, retry=retry)
    # To find that a file is not there takes a command all its attempts, so it is asked once before.
    if location.startswith(PIPE) and _is_there(join(location, BUCKETS_NAME)):
        return _open_buckets(location, access, verify=verify, retry=retry)
    try:
        return _open_one(location, access, verify=verify, retry=retry)
    except RemoteError:
        if not _is_there(join(location, BUCKETS_NAME)):
            raise
    return _open_buckets(location, access, verify=verify, retry=retry)


def _is_there(url: str) -> bool:
    try:
        read_file(url, retry=Retry(attempts=1))
    except RemoteError:
        return False
    return True


def _open_one(location: str, access: Access, *, verify: bool, retry: Retry | None) -> ShardSet:
    if access.kind == "map":
        return open_shards(location, verify=verify)
    if access.kind == "stream":
        return open_streamed(location, retry=retry)
    folder = access.cache_dir or default_cache_dir()
    return CachedShards(
        open_store(location, folder, access.cache_bytes, verify=verify, retry=retry)
    )


def _open_buckets(
    location: str, access: Access, *, verify: bool, retry: Retry | None
) -> BucketedShards:
    if access.kind == "stream":
        raise ValueError(
            f"data.access: {location} is a bucketed set, which cannot be streamed; expected map or "
            "cache, found stream"
        )
    if access.kind == "map":
        return open_buckets(location, verify=verify)
    buckets = fetch_buckets(location, retry=retry)
    sets = [
        _open_one(join(location, bucket.name), access, verify=verify, retry=retry)
        for bucket in buckets.buckets
    ]
    return BucketedShards(location, buckets, sets)


def fetch_buckets(location: str, *, retry: Retry | None = None) -> Buckets:
    """Reads and checks the list of a bucketed set that lies elsewhere.

    Raises FormatError as `Buckets.load` does, naming the location.
    """
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        content = read_file(join(location, BUCKETS_NAME), retry=retry)
        (Path(temporary) / BUCKETS_NAME).write_bytes(content)
        try:
            return Buckets.load(Path(temporary))
        except FormatError as error:
            raise FormatError(str(error).replace(temporary, location)) from error


def check_order(
    shards: ShardSet | BucketedShards,
    order: Order | BucketOrder,
    access: Access,
    num_processes: int,
) -> None:
    """Raises ValueError for an order that a set so reached cannot be visited in."""
    if isinstance(shards, BucketedShards):
        check_room(shards, access)
        return
    assert isinstance(order, Order)
    if isinstance(shards, CachedShards):
        check_cache(order, shards.manifest, access.cache_bytes)
    elif isinstance(shards, StreamedShards):
        check_stream(order, num_processes, access.num_workers)


def check_room(shards: BucketedShards, access: Access) -> None:
    """Raises ValueError, with the arithmetic, for a cache too small for all buckets at once."""
    if access.kind != "cache":
        return
    needed = sum(
        sum(entry.bytes for entry in part.manifest.files) + len(part.manifest.dump().encode())
        for part in shards.sets
    )
    if access.cache_bytes < needed:
        raise ValueError(
            f"data.cache_bytes: the {len(shards.sets)} buckets of {shards.location} take turns, so "
            f"all of their {needed} bytes are kept, and the cache may hold {access.cache_bytes}; "
            f"give it --data.cache-bytes {needed}"
        )


def make_loader(
    shards: ShardSet | BucketedShards,
    order: Order | BucketOrder,
    access: Access,
    *,
    rank: int = 0,
    num_processes: int = 1,
) -> Loader:
    """Returns what fills a rank's batches.

    Raises ValueError as `check_order` does.
    """
    check_order(shards, order, access, num_processes)
    if isinstance(shards, BucketedShards):
        assert isinstance(order, BucketOrder)
        pairs = zip(shards.sets, order.orders, strict=True)
        loaders = [_loader(*pair, access, rank, num_processes) for pair in pairs]
        return BucketLoader(order=order, loaders=tuple(loaders), latent_shapes=shards.latent_shapes)
    assert isinstance(order, Order)
    return _loader(shards, order, access, rank, num_processes)


def _loader(
    shards: ShardSet, order: Order, access: Access, rank: int, num_processes: int
) -> Loader:
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
