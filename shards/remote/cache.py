"""Cache access: downloads the shards of a remote set ahead of use, and reads them from disk.

    shards = CachedShards(open_store("s3://bucket/train", cache_dir, cache_bytes=10**11))
    loader = CacheLoader(shards=shards, order=shards.order(batch_size=256, seed=0))

A background thread downloads shards in the order of their first use and evicts the one whose next
use is furthest away. Batches are identical to those of map access. The cost: with `shuffle` full
all shards must fit, and the first batch needs nearly all; `blocks` needs one window and one shard.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.mixed_order import MixedOrder
from latent_t2i.shards.order import Cursor, Epochs, Order, choices, share
from latent_t2i.shards.reader import FIELDS, BatchT, RawBatch, ShardSet
from latent_t2i.shards.remote.store import Store
from latent_t2i.shards.schema import FormatError, Manifest
from latent_t2i.shards.union import UnionShards

NEVER = np.iinfo(np.int64).max
"""Distance of a shard that this epoch and the next do not use."""
CACHED_EPOCHS = 128
"""Enough for two epochs of each bucket; each takes a few numbers per shard."""
POLL_S = 0.1
"""Interval of checks for downloads by other processes, and for the end of use."""
T = TypeVar("T")


class CachedShards(ShardSet):
    """A set whose shards are downloaded while they are used."""

    def __init__(
        self,
        store: Store,
        *,
        fields: Sequence[str] = FIELDS,
        is_lazy: bool = False,
        read: Literal["map", "pread"] = "map",
        num_slots: int | None = None,
    ) -> None:
        super().__init__(
            store.folder,
            store.manifest,
            fields=fields,
            is_lazy=is_lazy,
            remedy="; run with --data.verify full to download it again",
            read=read,
            num_slots=num_slots,
        )
        self.store = store
        self._changed = threading.Condition()
        self._bytes = store.manifest.shards.bytes
        self._is_here = np.zeros(
            len(self._bytes), np.bool_
        )  # on disk, as far as this process knows
        self._uses = np.zeros(len(self._bytes), np.int64)  # current gathers, by shard
        self._schedule: tuple[Order, Cursor, slice] | None = None
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._is_trimmed = False
        self._num_events = 0  # changes that the thread has to react to

    def advance(self, order: Order, cursor: Cursor, shards: slice = slice(None)) -> None:
        """Sets the upcoming order and cursor; `shards` are this set's in an order of several."""
        with self._changed:
            self._schedule = order, cursor, shards
            self._notify()

    def close(self) -> None:
        """Stops the background thread; open shards stay open."""
        self.store.close()
        with self._changed:
            self._notify()
        if self._thread is not None:
            self._thread.join()

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> RawBatch:
        """Like `ShardSet.gather`, after the shards are downloaded."""
        return self._when_here(
            records, lambda: super(CachedShards, self).gather(records, caption_u, view_u, out, rows)
        )

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Like `ShardSet.keys`, after the shards are downloaded."""
        return self._when_here(records, lambda: super(CachedShards, self).keys(records))

    def image_hashes(self, records: NDArray[np.int64]) -> NDArray[np.bytes_] | None:
        """Like `ShardSet.image_hashes`, after the shards are downloaded."""
        return self._when_here(records, lambda: super(CachedShards, self).image_hashes(records))

    def meta(self, record: int) -> dict[str, Any]:
        """Like `ShardSet.meta`, after the shard is downloaded."""
        return self._when_here(np.array([record]), lambda: super(CachedShards, self).meta(record))

    def _is_hashed(self, shard: int) -> bool:
        return shard in self.store.hashed

    def _open_one(self, shard: int, *, replace: bool = True) -> None:
        """Opens a shard. Raises EvictedError if another process has deleted it."""
        try:
            super()._open_one(shard, replace=replace)
        except (FormatError, FileNotFoundError) as error:
            if self.store.has(shard):  # not evicted, so the file itself is wrong
                raise
            raise EvictedError(shard) from error

    def _when_here(self, records: NDArray[np.int64], read: Callable[[], T]) -> T:
        """Returns `read()`, called when the shards of some records are on disk."""
        while True:
            with self._using(records):
                try:
                    return read()
                except EvictedError as error:
                    with self._changed:
                        self._is_here[error.shard] = False

    @contextmanager
    def _using(self, records: NDArray[np.int64]) -> Iterator[None]:
        """Waits until the shards of some records are on disk, and keeps them there.

        Raises the error that ended the background thread, if it failed before.
        """
        shards = np.unique(self.shards_of(records))
        with self._changed:
            self._start()
            self._uses[shards] += 1  # before the wait: it also requests shards that are missing
            self._notify()
        try:
            with self._changed:
                while not self._is_here[shards].all():
                    self._check_thread()
                    self._changed.wait(POLL_S)
            yield
        finally:
            with self._changed:
                self._uses[shards] -= 1
                self._notify()

    def _notify(self) -> None:
        self._num_events += 1
        self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_fetch_ahead, args=(weakref.ref(self),), name="shards", daemon=True
            )
            self._thread.start()

    def _check_thread(self) -> None:
        if self._error is not None:
            raise self._error
        if self._thread is None or not self._thread.is_alive() or self.store.stopped.is_set():
            raise RuntimeError(f"{self.store.location}: closed while a batch waited for shards")

    def step(self) -> bool:
        """Downloads the next shard, or waits briefly if there is nothing to do.

        Returns False at the end and after an error, which waiting gathers then raise.
        """
        num_events = self._num_events
        try:
            if not self._get_next():
                with self._changed:
                    self._changed.wait_for(lambda: self._num_events > num_events, POLL_S)
        except (OSError, ValueError) as error:
            self._error = error  # gathers that wait raise it
            self.store.stopped.set()
            with self._changed:
                self._changed.notify_all()
        return not self.store.stopped.is_set()

    def _get_next(self) -> bool:
        """Downloads the shard that is needed next; returns False if it cannot."""
        with self._changed:
            schedule, uses, here = self._schedule, self._uses.copy(), self._is_here.copy()
        if here.all():
            return False
        away = np.full(len(uses), NEVER)
        if schedule is not None:
            order, cursor, mine = schedule
            away = records_until(order, cursor)[mine].copy()
        away[uses > 0] = -1  # a gather waits for these
        self._tidy(away)
        used_bytes = self._bytes[here].sum()
        for shard in _nearest_first(away, ~here & (away < NEVER)):
            later = away > away[shard]
            full = used_bytes + self._bytes[shard] > self.store.room_bytes
            # Evicting a shard that is needed earlier would gain nothing.
            if full and not (here & later).any():
                return False
            outcome = self.store.get(shard, _nearest_first(away, later)[::-1], self._drop)
            if outcome == "no room":
                return False
            if outcome == "here" and self._adopt(shard):
                return True
        return False

    def _tidy(self, away: NDArray[np.int64]) -> None:
        """Closes shards that other processes evicted, because open files still take disk space.

        The first call also evicts what an earlier run with a larger bound left behind.
        """
        lost = self._is_here & (away > 0)
        for shard in set(np.flatnonzero(lost).tolist()) - self.store.present():
            self._drop(shard)
        if not self._is_trimmed:
            self.store.trim(_nearest_first(away, away > 0)[::-1], self._drop)
            self._is_trimmed = True

    def _adopt(self, shard: int) -> bool:
        """Opens a shard if there is room; returns False if another process has just evicted it."""
        with self._changed:
            try:
                # An open shard stays readable after an eviction by another process.
                self._open_one(shard, replace=False)
            except EvictedError:
                return False
            self._verify([shard])
            self._is_here[shard] = True
            self._changed.notify_all()
        return True

    def _drop(self, shard: int) -> bool:
        """Closes a shard before its eviction; returns False if it is in use."""
        with self._changed:
            if self._uses[shard]:
                return False
            self._is_here[shard] = False
            self._source.close(shard)
            return True


class EvictedError(Exception):
    """Another process has deleted a shard from the cache."""

    def __init__(self, shard: int) -> None:
        super().__init__(shard)
        self.shard = shard


def _fetch_ahead(reference: "weakref.ref[CachedShards]") -> None:
    """Runs until the set is closed or garbage collected."""
    # A weak reference, so that a set that is not used any more can be collected.
    is_running = True
    while is_running:
        shards = reference()
        is_running = shards is not None and shards.step()
        del shards


@dataclass(frozen=True, kw_only=True)
class CacheLoader(MapLoader):
    """Fills batches like MapLoader, and reports its position to the cache."""

    order: Order

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Writes this process's share of a step's global batch into `out`, part by part."""
        self.finish_epoch(step)
        mine = share(self.order.batch_size, self.rank, self.num_processes)
        caption_u, view_u = (u[mine] for u in choices(self.order.seed, step, self.order.batch_size))
        records = self.order.records(step)[mine]
        start = step * self.order.batch_size + mine.start
        for cursor, part in parts(self.order, start, len(records)):
            self.shards.advance(self.order, cursor)
            target = out.map(itemgetter(part))
            self.shards.gather(records[part], caption_u[part], view_u[part], target)
        return out


@dataclass(frozen=True, kw_only=True)
class MixedCacheLoader(MapLoader):
    """Fills batches of weighted sets, and reports the position in each set to its cache."""

    shards: UnionShards
    order: MixedOrder

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Writes this process's share of a step's global batch into `out`, part by part."""
        self.finish_epoch(step)
        mine = share(self.order.batch_size, self.rank, self.num_processes)
        caption_u, view_u = (u[mine] for u in choices(self.order.seed, step, self.order.batch_size))
        first = start = step * self.order.batch_size + mine.start
        for epoch, *bounds in self.order.by_epoch(start, start + len(out)):
            for number, places, visit in self.order.split(epoch, *bounds):
                rows = places + start - first
                order, shards = self.order.orders[number], self.shards.sets[number]
                for cursor, part in parts(order, visit, len(rows)):
                    shards.advance(order, cursor)
                    end = cursor.position + part.stop - part.start
                    records = order.visits(cursor.epoch, cursor.position, end)
                    self.shards.gather_rows(number, records, caption_u, view_u, rows[part], out)
            start += bounds[1] - bounds[0]
        return out


def _nearest_first(away: NDArray[np.int64], which: NDArray[np.bool_]) -> list[int]:
    shards = np.flatnonzero(which)
    nearest: list[int] = shards[np.argsort(away[shards], kind="stable")].tolist()
    return nearest


def bytes_needed(order: Epochs, manifest: Manifest) -> int:
    """Returns the bytes of a set that the cache must hold to visit it in an order."""
    sizes = np.sort(manifest.shards.bytes)[::-1].tolist()
    small = sum(entry.bytes for entry in manifest.small_files) + len(manifest.dump().encode())
    window = {"full": len(sizes), "blocks": order.window_shards, "none": 1}[order.shuffle]
    return int(min(sum(sizes[:window]) + sizes[0], sum(sizes))) + small


def divide_cache(order: Epochs, stores: Sequence[Store], cache_bytes: int) -> list[int]:
    """Returns the part of the cache of each set of several: what it needs, and of the rest a share.

    The rest is divided by the bytes that do not fit yet. Raises ValueError, with the arithmetic, if
    the cache is too small for all sets.
    """
    needed = [bytes_needed(order, store.manifest) for store in stores]
    if cache_bytes < sum(needed):
        listed = " + ".join(map(str, needed))
        raise ValueError(
            f"data.cache_bytes: shuffle {order.shuffle} needs {listed} = {sum(needed)} bytes of "
            f"{len(stores)} sets in the cache, and the limit is {cache_bytes}; use "
            f"--data.cache-bytes {sum(needed)}, or --data.shuffle blocks with a small "
            "--data.window-shards"
        )
    missing = [store.whole_bytes - least for store, least in zip(stores, needed, strict=True)]
    rest = cache_bytes - sum(needed)
    return [
        least + rest * more // max(1, sum(missing))
        for least, more in zip(needed, missing, strict=True)
    ]


def check_cache(order: Epochs, manifest: Manifest, cache_bytes: int) -> None:
    """Raises ValueError, with the arithmetic, if the cache is too small for an order."""
    least = bytes_needed(order, manifest)
    if cache_bytes >= least:
        return
    num = len(manifest.shards)
    window = {"full": num, "blocks": order.window_shards, "none": 1}[order.shuffle]
    needs = f"shuffle {order.shuffle} needs {min(window + 1, num)} of {num} shards"
    remedy = ""
    if order.shuffle == "blocks":
        remedy = ", or a smaller --data.window-shards"
    elif order.shuffle == "full":
        blocks = bytes_needed(replace(order, shuffle="blocks"), manifest)
        remedy = f", or --data.shuffle blocks, which needs {blocks} at {order.window_shards} shards"
    raise ValueError(
        f"data.cache_bytes: {needs} in the cache, {least} bytes with the small files, and the "
        f"limit is {cache_bytes}; use --data.cache-bytes {least}{remedy}"
    )


def records_until(order: Order, cursor: Cursor) -> NDArray[np.int64]:
    """Returns the number of records before each shard (num_shards,) may be needed.

    The value is 0 in the shard's window, and NEVER if neither the rest of this epoch nor the next
    one uses it.
    """
    start, stop = spans(order, cursor.epoch)
    away = np.where(stop > cursor.position, np.maximum(start - cursor.position, 0), NEVER)
    away[start >= order.epoch_records] = NEVER  # `drop` ends the epoch before it
    start, stop = spans(order, cursor.epoch + 1)
    left = order.epoch_records - cursor.position
    is_later = (away == NEVER) & (start < order.epoch_records)
    later: NDArray[np.int64] = np.where(is_later, left + start, away)
    return later


@lru_cache(maxsize=CACHED_EPOCHS)
def spans(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns `order.window_spans(epoch)`."""
    return order.window_spans(epoch)


def parts(order: Order, start: int, size: int) -> Iterator[tuple[Cursor, slice]]:
    """Splits records `start` to `start + size` of a run at the ends of windows and epochs.

    Yields the cursor of each part and the slice of the records in it. No shard is used on both
    sides of such a split, so the cache never has to hold more than one window.
    """
    done = 0
    while done < size:
        epoch, position = divmod(start + done, order.epoch_records)
        end = min(order.window(epoch, position).stop, order.epoch_records)
        num = min(size - done, end - position)
        yield Cursor(epoch=epoch, position=position), slice(done, done + num)
        done += num
