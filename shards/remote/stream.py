"""Stream access: WebDataset reads shards from start to end, local or remote; nothing is stored.

    loader = StreamLoader(shards=open_streamed("s3://bucket/train"), order=order)

The shards of an epoch come in an order by (seed, epoch) and are divided among ranks and workers. A
worker shuffles records within a window, of which it keeps only the chosen caption and view. So
memory holds a window and the disk nothing. The price:

* a record is only mixed with records near it;
* parsing tars in Python is 20 times as slow as map access;
* ranks do not stay in the same epoch;
* a run resumes at a shard: shards read completely are not read again, interrupted ones are read
  from their start, and records that were left in a window are skipped until the next epoch.
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
    fetch_document,
    fetch_small_files,
    join,
    open_stream,
)
from latent_t2i.shards.schema import MEMBERS, Field, FormatError, Layout, Manifest, ShardEntry

KEPT_STEPS = 1000
"""Number of recent steps whose keys are kept for `nonfinite_keys`."""
ARRAYS = tuple(part.name for part in fields(RawBatch))


class StreamedShards(ShardSet):
    """A set that is read from start to end; only its manifest and small files are loaded."""

    def __init__(
        self, location: str, folder: Path, manifest: Manifest, retry: Retry | None = None
    ) -> None:
        super().__init__(folder, manifest)
        self.location = location
        self.retry = retry or Retry()

    def _map(self, shard: int) -> None:
        raise ValueError(f"{self.location}: stream access cannot read records by number")


def open_streamed(location: str, *, retry: Retry | None = None) -> StreamedShards:
    """Reads a set's manifest and small files.

    Raises RemoteError and FormatError for a location without a finished set.
    """
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        folder = Path(temporary)
        manifest = fetch_document(Manifest, location, folder, retry=retry)
        fetch_small_files(location, folder, manifest, retry=retry)
        return StreamedShards(location, folder, manifest, retry)


def check_stream(order: Order, num_processes: int, num_workers: int) -> None:
    """Raises ValueError, with the arithmetic, if there are fewer shards than readers."""
    workers = max(num_workers, 1)
    readers = num_processes * workers
    if len(order.sizes) < readers:
        raise ValueError(
            f"data.access: stream needs a shard per reader: {num_processes} processes x {workers} "
            f"workers = {readers} readers, but there are {len(order.sizes)} shards; use fewer "
            "--data.num-workers, smaller shards, or --data.access cache"
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The shards that a rank reads, and their order."""

    location: str
    shards: tuple[ShardEntry, ...]
    layouts: tuple[Layout, ...]
    order: Order
    rank: int
    num_processes: int
    num_workers: int
    """Number of readers of this rank, at least 1."""
    window_records: int
    retry: Retry

    def records(self, worker: int, num_visited: int) -> Iterator["Record"]:
        """Yields a worker's records endlessly, without the complete shards among `num_visited`."""
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
        """Yields the records of some shards, shuffled within the window."""
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
        """Yields the records of a shard. Raises FormatError if it differs from its layout."""
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
            raise FormatError(f"{url}: does not match its layout: {_message(error)}") from error
        if num_found != entry.records:
            raise FormatError(f"{url}: expected {entry.records} records, found {num_found}")

    def opened(self, url: str, entry: ShardEntry) -> Iterator[dict[str, Any]]:
        """Yields an open shard in the form that WebDataset's tar readers expect."""
        with open_stream(url, size=entry.bytes, retry=self.retry) as stream:
            yield {"url": url, "stream": stream}

    def generator(self, use: Any, *numbers: int) -> np.random.Generator:
        """Returns a random generator from the run's seed."""
        return np.random.Generator(np.random.PCG64(mixed_seed(self.order.seed, use, *numbers)))


@dataclass(frozen=True)
class Record:
    """The chosen view and caption of a record."""

    key: str
    latent: NDArray[np.float16]  # (2C, h, w) or (C, h, w)
    text: NDArray[np.float16 | np.int8]  # (T, D)
    tokens: NDArray[np.int32]  # (T,)


def parse(url: str, sample: dict[str, Any], layout: Layout) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a sample. Raises FormatError if a member differs from the layout."""
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
            f"{url}: key {sample['__key__']!r}: expected only {', '.join(MEMBERS.values())}, found "
            f"{', '.join(sorted(others))} too"
        )
    return arrays


def choose(arrays: dict[str, NDArray[Any]], key: str, choice: np.random.Generator) -> Record:
    """Returns one caption and one view, copied so that the rest of the record can be freed."""
    caption = int(choice.integers(len(arrays["tokens"])))
    view = int(choice.integers(len(arrays["latent"])))
    return Record(
        key=key,
        latent=arrays["latent"][view].copy(),
        text=arrays["text"][caption].copy(),
        tokens=arrays["tokens"][caption].copy(),
    )


class Batches(IterableDataset[Any]):
    """A rank's batches from a step on; each of DataLoader's n workers makes every n-th.

    An item is (keys, latent, text, tokens), or an error: DataLoader would change the type of an
    error raised in a worker, so the consumer raises it.
    """

    def __init__(self, reading: Reading, batch_size: int, start: int) -> None:
        self.reading = reading
        self.batch_size = batch_size
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number = self.reading.num_workers
        worker = (self.start + (info.id if info else 0)) % number
        num_steps = len(range(worker, self.start, number))  # earlier steps of this worker
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
    """Fills batches from streams, step after step; any other step restarts the streams."""

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
        self._keys: deque[tuple[int, list[str]]] = deque(maxlen=KEPT_STEPS)

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        """Returns an uninitialised batch of this process's size."""
        return self._shards.buffer(self._batch_size, pin_memory=pin_memory)

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Writes this process's next batch into `out`.

        Raises RemoteError and FormatError if the shards cannot be read.
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
        """Returns this process's keys of a recent step; an empty list for an older step."""
        return next((keys for past, keys in self._keys if past == step), [])

    def close(self) -> None:
        """Stops the workers; the next step restarts them."""
        self._batches = iter(())
        self._next_step = -1

    def _begin(self, step: int) -> None:
        self.close()
        self._batches = iter(
            DataLoader(
                Batches(self._reading, self._batch_size, step),
                batch_size=None,
                num_workers=self._num_workers,
                generator=torch.Generator(),  # otherwise it would draw from the global generator
            )
        )


def _message(error: Exception) -> str:
    """Returns an error's text without what WebDataset appends to it."""
    return str(error.args[0]).partition(" @ <")[0]


def _describe(content: bytes, part: Field) -> str:
    """Describes a member that does not match its field."""
    if not part.header_bytes:
        return f"{len(content)} bytes"
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError):
        return f"{len(content)} bytes that are not a .npy array"
    return f"{array.dtype} {array.shape}"
