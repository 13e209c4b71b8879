"""Cache access: a set that lies elsewhere, fetched shard by shard ahead of use, then mapped.

    shards = CachedShards(open_store("s3://bucket/train", cache_dir, cache_bytes=10**11))
    loader = CacheLoader(shards=shards, order=shards.order(batch_size=256, seed=0))

The order is known beforehand, so a background thread brings the shards in the order in which they
are needed, and throws out the one that is needed last; a batch waits for its own shards only.
Batches are those of map access, bit for bit. The price: with `shuffle` full the first batch needs
nearly every shard, and all of them must fit; `blocks` starts after one window of shards and needs
room for one window and one shard more.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.loader import MapLoader, are_finite
from latent_t2i.shards.order import Cursor, Order, choices, share
from latent_t2i.shards.reader import BatchT, RawBatch, ShardSet
from latent_t2i.shards.remote.store import Store
from latent_t2i.shards.schema import FormatError, Manifest

NEVER = np.iinfo(np.int64).max
"""Not in this epoch and the next."""
ORDERS_REMEMBERED = 128
"""Two epochs of each bucket of a bucketed set; a few numbers for each shard."""
POLL_S = 0.1
"""How often to look what other processes have brought, and whether anyone still wants shards."""


class CachedShards(ShardSet):
    """A set whose shards come to a store while they are used."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.folder, store.manifest)
        self.store = store
        self._changed = threading.Condition()
        self._uses = np.zeros(len(store.manifest.shards), np.int64)  # gathers under way, by shard
        self._schedule: tuple[Order, Cursor] | None = None
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._is_trimmed = False
        self._num_told = 0  # changes that the thread should look at

    def advance(self, order: Order, cursor: Cursor) -> None:
        """Tells what is asked for from now on: an order from a place on."""
        with self._changed:
            self._schedule = order, cursor
            self._tell()

    def close(self) -> None:
        """Ends the background thread; shards that are mapped stay so."""
        self.store.close()
        with self._changed:
            self._tell()
        if self._thread is not None:
            self._thread.join()

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
    ) -> RawBatch:
        """As `ShardSet.gather`, once the records' shards are there."""
        with self._using(records):
            return super().gather(records, caption_u, view_u, out)

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """As `ShardSet.keys`, once the records' shards are there."""
        with self._using(records):
            return super().keys(records)

    def meta(self, record: int) -> dict[str, Any]:
        """As `ShardSet.meta`, once the record's shard is there."""
        with self._using(np.array([record])):
            return super().meta(record)

    def shards_of(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the index of each record's shard."""
        return np.searchsorted(self._starts, records, side="right") - 1

    @contextmanager
    def _using(self, records: NDArray[np.int64]) -> Iterator[None]:
        """Waits until the records' shards are mapped, and keeps them so.

        Raises what ended the background thread, if it has not brought them before.
        """
        shards = np.unique(self.shards_of(records))
        with self._changed:
            self._start()
            self._uses[shards] += 1
            self._tell()
        try:
            with self._changed:
                while not self._region.is_mapped[shards].all():
                    self._check_thread()
                    self._changed.wait(POLL_S)
            yield
        finally:
            with self._changed:
                self._uses[shards] -= 1
                self._tell()

    def _tell(self) -> None:
        self._num_told += 1
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
            raise RuntimeError(f"{self.store.location}: closed while shards were waited for")

    def turn(self) -> bool:
        """Brings the next shard, or waits a while if there is nothing to do.

        Returns False at the end, after an error too, which those get who wait for a shard.
        """
        num_told = self._num_told
        try:
            if not self._bring_next():
                with self._changed:
                    self._changed.wait_for(lambda: self._num_told > num_told, POLL_S)
        except (OSError, ValueError) as error:
            self._error = error
            self.store.stopped.set()
            with self._changed:
                self._changed.notify_all()
        return not self.store.stopped.is_set()

    def _bring_next(self) -> bool:
        """Fetches or finds the shard that is needed next, if there is room; then returns True."""
        mapped = self._region.is_mapped.copy()
        if mapped.all():
            return False
        with self._changed:
            schedule, uses = self._schedule, self._uses.copy()
        away = np.full(len(uses), NEVER) if schedule is None else records_until(*schedule)
        away[uses > 0] = -1
        self._tidy(away)
        sizes = self._region.sizes
        for shard in _nearest_first(away, ~mapped & (away < NEVER)):
            later = away > away[shard]
            full = sizes[mapped].sum() + sizes[shard] > self.store.room_bytes
            if full and not (mapped & later).any():
                return False
            outcome = self.store.bring(shard, _nearest_first(away, later)[::-1], self._drop)
            if outcome == "no room":
                return False
            if outcome == "here" and self._adopt(shard):
                return True
        return False

    def _tidy(self, away: NDArray[np.int64]) -> None:
        """Unmaps what other processes have thrown out: until then it takes its place on disk.

        The first time, throws out what an earlier run with a larger bound has left.
        """
        lost = self._region.is_mapped & (away > 0)
        for shard in set(np.flatnonzero(lost).tolist()) - self.store.present():
            self._drop(shard)
        if not self._is_trimmed:
            self.store.trim(_nearest_first(away, away > 0)[::-1], self._drop)
            self._is_trimmed = True

    def _adopt(self, shard: int) -> bool:
        """Maps a shard; returns False if another process has just thrown it out."""
        with self._changed:
            try:
                self._map(shard)
            except (FormatError, FileNotFoundError):
                if self.store.has(shard):
                    raise
                return False
            self._changed.notify_all()
        return True

    def _drop(self, shard: int) -> bool:
        """Unmaps a shard that is to go; returns False if it has come into use."""
        with self._changed:
            if self._uses[shard]:
                return False
            if self._region.is_mapped[shard]:
                self._region.unmap(shard)
            return True


def _fetch_ahead(reference: "weakref.ref[CachedShards]") -> None:
    """Turns until the set is closed, or nobody has it any more."""
    going = True
    while going:
        shards = reference()
        going = shards is not None and shards.turn()
        del shards


@dataclass(frozen=True, kw_only=True)
class CacheLoader(MapLoader):
    """Fills batches as MapLoader does, and tells the cache where it is."""

    shards: CachedShards

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Puts this process's share of a step's global batch into `out`, part by part."""
        mine = share(self.order.batch_size, self.rank, self.num_processes)
        caption_u, view_u = (u[mine] for u in choices(self.order.seed, step, self.order.batch_size))
        records = self.order.records(step)[mine]
        start = step * self.order.batch_size + mine.start
        for cursor, part in parts(self.order, start, len(records)):
            self.shards.advance(self.order, cursor)
            target = out.map(itemgetter(part))
            self.shards.gather(records[part], caption_u[part], view_u[part], target)
        return out

    def nonfinite_keys(self, step: int) -> list[str]:
        """As MapLoader's, a shard at a time: the cache may hold few, and these may be gone."""
        records = self.order.records(step)
        caption_u, view_u = choices(self.order.seed, step, len(records))
        shards = self.shards.shards_of(records)
        keys, bad = np.empty(len(records), object), np.zeros(len(records), np.bool_)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            batch = self.shards.gather(records[rows], caption_u[rows], view_u[rows])
            keys[rows], bad[rows] = self.shards.keys(records[rows]), ~are_finite(batch)
        return list(keys[bad] if bad.any() else keys)


def _nearest_first(away: NDArray[np.int64], which: NDArray[np.bool_]) -> list[int]:
    shards = np.flatnonzero(which)
    nearest: list[int] = shards[np.argsort(away[shards], kind="stable")].tolist()
    return nearest


def check_cache(order: Order, manifest: Manifest, cache_bytes: int) -> None:
    """Raises ValueError, with the arithmetic, for a cache too small for an order."""
    sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
    small = sum(entry.bytes for entry in manifest.small_files) + len(manifest.dump().encode())
    window = {"full": len(sizes), "blocks": order.window_shards, "none": 1}[order.shuffle]
    least = min(sum(sizes[:window]) + sizes[0], sum(sizes)) + small
    if cache_bytes >= least:
        return
    keeps = f"shuffle {order.shuffle} keeps {min(window + 1, len(sizes))} of {len(sizes)} shards"
    remedy = ""
    if order.shuffle == "blocks":
        remedy = ", or fewer --data.window-shards"
    elif order.shuffle == "full":
        blocks = min(sum(sizes[: order.window_shards]) + sizes[0], sum(sizes)) + small
        remedy = f", or --data.shuffle blocks, which needs {blocks} at {order.window_shards} shards"
    raise ValueError(
        f"data.cache_bytes: {keeps}, {least} bytes with what lies beside them, and the cache may "
        f"hold {cache_bytes}; give it --data.cache-bytes {least}{remedy}"
    )


def records_until(order: Order, cursor: Cursor) -> NDArray[np.int64]:
    """Returns how many records come before each shard (num_shards,) is needed.

    0 from its first to its last record in the epoch, NEVER if this epoch and the next lack it.
    """
    first, last = spans(order, cursor.epoch)
    away = np.where(last >= cursor.position, np.maximum(first - cursor.position, 0), NEVER)
    first, last = spans(order, cursor.epoch + 1)
    left = order.epoch_records - cursor.position
    later: NDArray[np.int64] = np.where((away == NEVER) & (last >= 0), left + first, away)
    return later


def parts(order: Order, start: int, size: int) -> Iterator[tuple[Cursor, slice]]:
    """Cuts records `start` to `start + size` of a run where nothing before is needed after.

    Such cuts lie between windows and between epochs. Yields where each part begins, and which of
    the records it has. So no more than one window need be in the cache at a time.
    """
    done = 0
    while done < size:
        epoch, position = divmod(start + done, order.epoch_records)
        ends = cuts(order, epoch)
        end = int(ends[np.searchsorted(ends, position, side="right")])
        num = min(size - done, end - position)
        yield Cursor(epoch=epoch, position=position), slice(done, done + num)
        done += num


@lru_cache(maxsize=ORDERS_REMEMBERED)
def spans(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the positions of each shard's first and last record in an epoch, -1 for none."""
    starts = np.cumsum(order.sizes)
    shard = np.searchsorted(starts, order.epoch(epoch), side="right")
    position = np.arange(len(shard))
    first, last = np.full((2, len(starts)), -1)
    first[shard[::-1]] = position[::-1]  # of equal indices the last value stays
    last[shard] = position
    return first, last


@lru_cache(maxsize=ORDERS_REMEMBERED)
def cuts(order: Order, epoch: int) -> NDArray[np.int64]:
    """Returns the positions, the epoch's end included, at which no shard is half used."""
    first, last = spans(order, epoch)
    used = np.flatnonzero(last >= 0)
    used = used[np.argsort(first[used])]
    ends = np.maximum.accumulate(last[used]) + 1
    whole = np.append(first[used][1:] >= ends[:-1], True)
    found: NDArray[np.int64] = ends[whole]
    return found
