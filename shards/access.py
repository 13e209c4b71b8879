"""Opens a set of shards, local or remote, bucketed or not, for one of three kinds of access.

    shards = open_set("https://host/train", Access(kind="cache"))
    loader = make_loader(shards, shards.order(batch_size=256, seed=0), rank=0, num_processes=1)

    map      memory-maps local folders; any record at memory speed
    cache    downloads shards ahead of use to a bounded local folder; the same batches as map
    stream   reads shards from start to end, stores nothing, resumes at a shard

`auto` is map for folders and cache for URLs. Bucketed sets cannot be streamed, because independent
readers could not agree on the bucket of a step.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.buckets import (
    BucketedShards,
    Buckets,
    bucketed,
    holds_buckets,
    open_buckets,
)
from latent_t2i.shards.filesystems import choose_read
from latent_t2i.shards.joining import Shards, join_sets
from latent_t2i.shards.loader import BucketLoader, Loader, MapLoader
from latent_t2i.shards.mixed_order import MixedOrder
from latent_t2i.shards.order import Epochs, Order
from latent_t2i.shards.reader import FIELDS, ShardSet, open_shards, require_encoders
from latent_t2i.shards.remote.cache import (
    CachedShards,
    CacheLoader,
    MixedCacheLoader,
    check_cache,
    divide_cache,
)
from latent_t2i.shards.remote.store import (
    Store,
    default_cache_dir,
    make_room_among_sets,
    open_store,
)
from latent_t2i.shards.remote.stream import (
    StreamedShards,
    StreamLoader,
    check_stream,
    open_streamed,
)
from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    fetch_document,
    is_remote,
    join,
    read_file,
    without_query,
)
from latent_t2i.shards.schema import BUCKETS_NAME
from latent_t2i.shards.settings import CACHE_BYTES, WINDOW_RECORDS, AccessMode, ReadMode, Verify
from latent_t2i.shards.union import PlainShards, UnionShards

Kind = Literal["map", "stream", "cache"]


@dataclass(frozen=True, kw_only=True)
class Access:
    """Settings of the access to a set."""

    kind: Kind
    cache_dir: Path | None = None
    """cache: the folder; None stands for `default_cache_dir()`."""
    cache_bytes: int = CACHE_BYTES
    """cache: upper bound for the size of the folder."""
    num_workers: int = 0
    """stream: reader processes per rank; 0 reads in the rank's own process."""
    window_records: int = WINDOW_RECORDS
    """stream: number of records that a worker shuffles together."""
    read: ReadMode = "auto"
    """map, cache: memory-map the files, or read from them, as `auto` does on a network."""
    fields: tuple[str, ...] = FIELDS
    """The fields of a batch."""


def choose_kind(location: str, mode: AccessMode) -> Kind:
    """Returns the access to use. Raises ValueError for map access to a URL."""
    if location.startswith("pipe:"):
        raise ValueError(
            f"shards: {location!r}: commands are not supported; use a URL of fsspec, such as "
            "sftp://HOST/FOLDER (pip install paramiko)"
        )
    if mode == "auto":
        return "cache" if is_remote(location) else "map"
    if mode == "map" and is_remote(location):
        raise ValueError(
            f"data.access: map needs a folder on a local disk, found {location!r}; use cache or "
            "stream"
        )
    return mode


def open_set(
    location: str,
    access: Access,
    *,
    vae_sha256: str | None = None,
    text_sha256: str | None = None,
    verify: Verify = "lazy",
    retry: Retry | None = None,
) -> ShardSet | BucketedShards:
    """Opens a finished set of shards, bucketed or not. Of a remote set, only small files are read.

    `vae_sha256` and `text_sha256` are the hashes of the caller's encoders. `verify` applies to
    shards on a local disk. Raises FormatError like `open_shards`, RemoteError for a location that
    cannot be read, and ValueError for stream access to a bucketed set.
    """
    shards = _open(location, access, verify=verify, retry=retry)
    shown = without_query(location)
    require_encoders(shown, shards.manifest, vae_sha256=vae_sha256, text_sha256=text_sha256)
    return shards


def open_sets(
    locations: Sequence[str],
    access: Access,
    mode: AccessMode,
    *,
    verify: Verify = "lazy",
) -> tuple[Shards, list[ShardSet | BucketedShards]]:
    """Opens one or several sets; returns them as one, and each.

    With the mode `auto`, some may be folders and others URLs. Raises like `open_set`, and like
    `join_sets` for sets that cannot be one.
    """
    opened = [
        open_set(location, replace(access, kind=choose_kind(location, mode)), verify=verify)
        for location in locations
    ]
    shards = join_sets(locations, opened)
    if stores := stores_of(shards):
        make_room_among_sets(stores)
    return shards, opened


def stores_of(shards: Shards) -> list[Store]:
    """Returns the cache's stores of all sets that have one."""
    return [part.store for part in shards.sets if isinstance(part, CachedShards)]


def _open(
    location: str, access: Access, *, verify: Verify, retry: Retry | None
) -> ShardSet | BucketedShards:
    if not is_remote(location):
        open_it = _open_buckets if holds_buckets(Path(location)) else _open_one
        return open_it(location, access, verify=verify, retry=retry)
    try:
        return _open_one(location, access, verify=verify, retry=retry)
    except RemoteError:  # no manifest: a bucketed set, or the error is right
        if not _exists(join(location, BUCKETS_NAME)):
            raise
    return _open_buckets(location, access, verify=verify, retry=retry)


def _exists(url: str) -> bool:
    try:
        read_file(url, retry=Retry(attempts=1))
    except RemoteError:
        return False
    return True


def _open_one(location: str, access: Access, *, verify: Verify, retry: Retry | None) -> ShardSet:
    if access.kind == "map":
        return open_shards(location, fields=access.fields, verify=verify, read=access.read)
    if access.kind == "stream":
        return open_streamed(location, fields=access.fields, retry=retry)
    folder = access.cache_dir or default_cache_dir()
    store = open_store(location, folder, access.cache_bytes, verify=verify == "full", retry=retry)
    return CachedShards(
        store,
        fields=access.fields,
        is_lazy=verify == "lazy",
        read=choose_read(access.read, store.folder),
    )


def _open_buckets(
    location: str, access: Access, *, verify: Verify, retry: Retry | None
) -> BucketedShards:
    if access.kind == "stream":
        raise ValueError(
            f"data.access: {location} is a bucketed set, which cannot be streamed; use map or cache"
        )
    if access.kind == "map":
        return open_buckets(location, fields=access.fields, verify=verify, read=access.read)
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        buckets = fetch_document(Buckets, location, Path(temporary), retry=retry)
    sets = [
        _open_one(join(location, bucket.name), access, verify=verify, retry=retry)
        for bucket in buckets.buckets
    ]
    return bucketed(location, buckets, sets)


def check_order(
    shards: Shards,
    order: Epochs | BucketOrder,
    access: Access,
    num_processes: int,
) -> None:
    """Raises ValueError if the access cannot visit a set in this order."""
    if isinstance(shards, BucketedShards):
        check_room(shards, access)
        return
    assert isinstance(order, Epochs)
    if isinstance(shards, UnionShards):
        divide_cache(order, stores_of(shards), access.cache_bytes)
    elif isinstance(shards, CachedShards):
        check_cache(order, shards.manifest, access.cache_bytes)
    elif isinstance(shards, StreamedShards):
        assert isinstance(order, Order)
        check_stream(order, num_processes, access.num_workers)


def check_room(shards: BucketedShards, access: Access) -> None:
    """Raises ValueError, with the arithmetic, if the cache is too small for all buckets."""
    if access.kind != "cache":
        return
    needed = sum(store.whole_bytes for store in stores_of(shards))
    if access.cache_bytes < needed:
        raise ValueError(
            f"data.cache_bytes: the cache must hold all {len(shards.parts)} buckets of "
            f"{shards.location}, {needed} bytes, and is limited to {access.cache_bytes}; use "
            f"--data.cache-bytes {needed}"
        )


def make_loader(
    shards: Shards,
    order: Epochs | BucketOrder,
    access: Access,
    *,
    rank: int = 0,
    num_processes: int = 1,
) -> Loader:
    """Returns the loader of a rank's batches. Raises ValueError like `check_order`."""
    check_order(shards, order, access, num_processes)
    if isinstance(shards, BucketedShards):
        assert isinstance(order, BucketOrder)
        pairs = zip(shards.parts, order.orders, strict=True)
        loaders = [_loader(*pair, access, rank, num_processes) for pair in pairs]
        return BucketLoader(order=order, loaders=tuple(loaders), shapes=shards.shapes)
    assert isinstance(order, Epochs)
    if isinstance(shards, UnionShards) and (stores := stores_of(shards)):
        bounds = divide_cache(order, stores, access.cache_bytes)
        for store, bound in zip(stores, bounds, strict=True):
            store.cache_bytes = bound
    return _loader(shards, order, access, rank, num_processes)


def _loader(
    shards: PlainShards, order: Epochs, access: Access, rank: int, num_processes: int
) -> Loader:
    if isinstance(order, MixedOrder):
        assert isinstance(shards, UnionShards)
        kind = MixedCacheLoader if stores_of(shards) else MapLoader
        return kind(shards=shards, order=order, rank=rank, num_processes=num_processes)
    assert isinstance(order, Order)
    if stores_of(shards):
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
