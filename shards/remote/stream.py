"""Stream access: shards read front to back, wherever they lie, by WebDataset; nothing is kept.

    loader = StreamLoader(shards=open_streamed("pipe:cat /data/train"), order=order)

The shards of an epoch come in an order by (seed, epoch), dealt out to ranks and workers; a worker
mixes records within a window, of which it keeps the one caption and view that it has chosen. So
memory holds a window and the disk nothing. The price: a record meets only those near it; the tar is
parsed in Python, a twentieth of map access's speed; a rank that has read its shards goes on to
its next epoch, alone; and a run resumes only to the shard: shards that it had read whole are
not read again, those it was in the middle of are read from their start, and what waited in a window
is left to the next epoch. Map and cache access resume exactly.
"""

import io
import random
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import group_by_keys, tar_file_expander

from latent_t2i.shards.order import Order, mixed_seed
from latent_t2i.shards.reader import BatchT, RawBatch, ShardSet
from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    fetch_manifest,
    fetch_small_files,
    join,
    open_stream,
)
from latent_t2i.shards.schema import MEMBERS, Field, FormatError, Layout, Manifest, ShardEntry

STEPS_REMEMBERED = 1000
"""For how many steps the keys are kept, to name nonfinite_keys."""
ARRAYS = tuple(part.name for part in fields(RawBatch))


class StreamedShards(ShardSet):
    """A set that is read front to back: it knows its manifest and its small files only."""

    def __init__(
        self, location: str, folder: Path, manifest: Manifest, retry: Retry | None = None
    ) -> None:
        super().__init__(folder, manifest)
        self.location = location
        self.retry = retry or Retry()

    def _map(self, shard: int) -> None:
        raise ValueError(f"{self.location}: stream access reads no record by its number")


def open_streamed(location: str, *, retry: Retry | None = None) -> StreamedShards:
    """Reads a set's manifest and small files.

    Raises RemoteError and FormatError for a location that does not hold a finished set.
    """
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        folder = Path(temporary)
        manifest = fetch_manifest(location, folder, retry=retry)
        fetch_small_files(location, folder, manifest, retry=retry)
        return StreamedShards(location, folder, manifest, retry)


def check_stream(order: Order, num_processes: int, num_workers: int) -> None:
    """Raises ValueError, with the arithmetic, for fewer shards than there are readers."""
    workers = max(num_workers, 1)
    readers = num_processes * workers
    if len(order.sizes) < readers:
        raise ValueError(
            f"data.access: stream gives each reader its own shards; {len(order.sizes)} shards for "
            f"{num_processes} processes x {workers} workers = {readers} readers leave "
            f"{readers - len(order.sizes)} without; use fewer --data.num-workers, smaller shards, "
            "or --data.access cache"
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a rank reads: the shards' places and layouts, and how they are visited."""

    location: str
    shards: tuple[ShardEntry, ...]
    layouts: tuple[Layout, ...]
    order: Order
    rank: int
    num_processes: int
    num_workers: int
    """Readers of this rank, at least 1."""
    window_records: int
    retry: Retry

    def records(self, worker: int, num_visited: int) -> Iterator["Record"]:
        """Yields a worker's records without end, but for the whole shards of the first so many."""
        epoch = 0
        while True:
            mine = self.shards_of(epoch, worker)
            total = sum(self.shards[index].records for index in mine)
            if num_visited < total:
                while num_visited >= self.shards[mine[0]].records:
                    num_visited -= self.shards[mine.pop(0)].records
                yield from self.epoch(epoch, worker, mine)
                num_visited = total
            num_visited -= total
            epoch += 1

    def shards_of(self, epoch: int, worker: int) -> list[int]:
        """Returns the shards that a worker reads in an epoch, in order."""
        order: NDArray[np.int64] = np.arange(len(self.shards))
        if self.order.shuffle != "none":
            order = self.generator("order", epoch).permutation(order)
        by_node = islice(order.tolist(), self.rank, None, self.num_processes)
        return list(islice(by_node, worker, None, self.num_workers))

    def epoch(self, epoch: int, worker: int, shards: list[int]) -> Iterator["Record"]:
        """Yields the records of some shards, mixed within the window."""
        choice = self.generator("choice", epoch, self.rank, worker)
        records = (record for shard in shards for record in self.shard(shard, choice))
        if self.order.shuffle == "none":
            return records
        mix = random.Random(mixed_seed(self.order.seed, "order", epoch, self.rank, worker))
        mixed: Iterator[Record] = shuffle(self.window_records, self.window_records, rng=mix)(
            records
        )
        return mixed

    def shard(self, index: int, choice: np.random.Generator) -> Iterator["Record"]:
        """Yields the records of a shard. Raises FormatError where it is not of its layout."""
        entry = self.shards[index]
        url = join(self.location, entry.name)
        layout, num_found = self.layouts[entry.layout], 0
        try:
            for sample in group_by_keys(tar_file_expander(self.opened(url, entry))):
                yield choose(parse(url, sample, layout), sample["__key__"], choice)
                num_found += 1
        except FormatError as error:
            raise FormatError(_message(error)) from error
        except (tarfile.TarError, ValueError) as error:
            raise FormatError(f"{url}: not a shard of this layout: {_message(error)}") from error
        if num_found != entry.records:
            raise FormatError(f"{url}: expected {entry.records} records, found {num_found}")

    def opened(self, url: str, entry: ShardEntry) -> Iterator[dict[str, Any]]:
        """Yields a shard as WebDataset's readers of tars take it, open until they are done."""
        with open_stream(url, size=entry.bytes, retry=self.retry) as stream:
            yield {"url": url, "stream": stream}

    def generator(self, use: Any, *numbers: int) -> np.random.Generator:
        """Returns a generator of the run's seed, for one use."""
        return np.random.Generator(np.random.PCG64(mixed_seed(self.order.seed, use, *numbers)))


@dataclass(frozen=True)
class Record:
    """A record's chosen view and caption."""

    key: str
    latent: NDArray[np.float16]  # (2C, h, w) or (C, h, w)
    text: NDArray[np.float16 | np.int8]  # (T, D)
    tokens: NDArray[np.int32]  # (T,)


def parse(url: str, sample: dict[str, Any], layout: Layout) -> dict[str, NDArray[Any]]:
    """Returns a sample's arrays, whole, after holding each member to the layout.

    Raises FormatError naming shard, key, field, expected and found.
    """
    arrays = {}
    for name, part in layout.fields.items():
        content = sample.get(MEMBERS[name])
        place = f"{url}: key {sample['__key__']!r}: field {name}"
        if content is None:
            member = f"{sample['__key__']}.{MEMBERS[name]}"
            raise FormatError(f"{place}: expected member {member!r}, found none")
        header, data = content[: part.header_bytes], memoryview(content)[part.header_bytes :]
        if header != part.header or len(data) != part.num_bytes:
            expected = f"{part.dtype} {part.shape}"
            raise FormatError(f"{place}: expected {expected}, found {_describe(content, part)}")
        arrays[name] = np.frombuffer(data, part.dtype).reshape(part.shape)
    others = sample.keys() - {"__key__", "__url__", *MEMBERS.values()}
    if others:
        raise FormatError(
            f"{url}: key {sample['__key__']!r}: expected members {', '.join(MEMBERS.values())}, "
            f"found {', '.join(sorted(others))} too"
        )
    return arrays


def choose(arrays: dict[str, NDArray[Any]], key: str, choice: np.random.Generator) -> Record:
    """Returns one caption and one view, copied, so that the rest of the record can go."""
    caption = int(choice.integers(len(arrays["tokens"])))
    view = int(choice.integers(len(arrays["latent"])))
    return Record(
        key=key,
        latent=arrays["latent"][view].copy(),
        text=arrays["text"][caption].copy(),
        tokens=arrays["tokens"][caption].copy(),
    )


class Batches(IterableDataset[Any]):
    """A rank's batches from a step on, as DataLoader's workers make them, each every n-th.

    An item is (keys, latent, text, tokens), or the error that ended the reading: it is raised in
    the consumer, where it is still itself.
    """

    def __init__(self, reading: Reading, batch_size: int, start: int) -> None:
        self.reading = reading
        self.batch_size = batch_size
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number = self.reading.num_workers
        worker = (self.start + (info.id if info else 0)) % number
        num_steps = len(range(worker, self.start, number))  # that were this worker's
        records = self.reading.records(worker, num_steps * self.batch_size)
        try:
            while True:
                batch = list(islice(records, self.batch_size))
                parts = [np.stack([getattr(record, name) for record in batch]) for name in ARRAYS]
                yield [record.key for record in batch], *map(torch.from_numpy, parts)
        except RemoteError as error:
            yield RemoteError(str(error))
        except FormatError as error:
            yield FormatError(str(error))


class StreamLoader:
    """Fills batches from streams, step after step; another step than the next begins anew."""

    def __init__(
        self,
        *,
        shards: StreamedShards,
        order: Order,
        rank: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        window_records: int = 1000,
    ) -> None:
        check_stream(order, num_processes, num_workers)
        self._shards = shards
        self._batch_size = order.batch_size // num_processes
        self._num_workers = num_workers
        self._reading = Reading(
            location=shards.location,
            shards=shards.manifest.shards,
            layouts=shards.manifest.layouts,
            order=order,
            rank=rank,
            num_processes=num_processes,
            num_workers=max(num_workers, 1),
            window_records=window_records,
            retry=shards.retry,
        )
        self._batches: Iterator[Any] = iter(())
        self._next_step = -1
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=STEPS_REMEMBERED)

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        """Returns an empty batch of this process's size."""
        return self._shards.buffer(self._batch_size, pin_memory=pin_memory)

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Puts this process's next batch into `out`.

        Raises RemoteError and FormatError as reading the shards does.
        """
        if step != self._next_step:
            self._begin(step)
        item = next(self._batches)
        if isinstance(item, Exception):
            self.close()
            raise item
        keys, *arrays = item
        for name, array in zip(ARRAYS, arrays, strict=True):
            tensor: Tensor = getattr(out, name)
            tensor.copy_(array)
        self._keys.append((step, keys))
        self._next_step = step + 1
        return out

    def nonfinite_keys(self, step: int) -> list[str]:
        """Returns the keys of a recent step's records of this process; none of an older step's."""
        return next((keys for past, keys in self._keys if past == step), [])

    def close(self) -> None:
        """Ends the workers; another step begins anew."""
        self._batches = iter(())
        self._next_step = -1

    def _begin(self, step: int) -> None:
        self.close()
        self._batches = iter(
            DataLoader(
                Batches(self._reading, self._batch_size, step),
                batch_size=None,
                num_workers=self._num_workers,
                generator=torch.Generator(),  # else it draws from that of the training
            )
        )


def _message(error: Exception) -> str:
    """Returns an error's text without what WebDataset adds to it on the way."""
    return str(error.args[0]).partition(" @ <")[0]


def _describe(content: bytes, part: Field) -> str:
    """Says what a member holds in place of its field."""
    if not part.header_bytes:
        return f"{len(content)} bytes"
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError):
        return f"{len(content)} bytes that are no .npy array"
    return f"{array.dtype} {array.shape}"
