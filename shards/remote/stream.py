"""Stream access: reads shards from start to end, local or remote, and stores nothing.

    loader = StreamLoader(shards=open_streamed("s3://bucket/train"), order=order)

The shards of an epoch come in an order by (seed, epoch) and are divided among ranks and workers. A
worker shuffles records within a window, of which it keeps only the chosen caption and view. Memory
holds one window, and nothing is written to disk. The costs:

* records are shuffled within a window only, and ranks do not stay in the same epoch;
* a damaged shard is noticed at its end, after some of its records were used;
* a run resumes at a shard: partly read shards are read again from their start, and records that
  were left in a window are skipped until the next epoch.
"""

import hashlib
import random
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from latent_t2i.shards.checks import hash_fault
from latent_t2i.shards.order import Order, mixed_seed
from latent_t2i.shards.reader import FIELDS, BatchT, Items, RawBatch, ShardSet, check_record
from latent_t2i.shards.remote.transport import (
    RemoteError,
    Retry,
    fetch_document,
    fetch_small_files,
    iterate,
    join,
    open_stream,
    without_query,
)
from latent_t2i.shards.schema import FormatError, Layout, Manifest, ShardTable

KEPT_STEPS = 1000
"""Number of recent steps whose keys are kept for `nonfinite_keys`."""


class StreamedShards(ShardSet):
    """A set that is read from start to end; only its manifest and small files are loaded."""

    def __init__(
        self,
        location: str,
        folder: Path,
        manifest: Manifest,
        *,
        fields: Sequence[str] = FIELDS,
        retry: Retry | None = None,
    ) -> None:
        super().__init__(folder, manifest, fields=fields)
        self.location = location
        self.retry = retry or Retry()

    def _open_one(self, shard: int, *, replace: bool = True) -> None:
        raise ValueError(f"{self.location}: stream access cannot read records by number")


def open_streamed(
    location: str, *, fields: Sequence[str] = FIELDS, retry: Retry | None = None
) -> StreamedShards:
    """Reads a set's manifest and small files.

    Raises RemoteError and FormatError for a location without a finished set.
    """
    with tempfile.TemporaryDirectory(prefix="shards-") as temporary:
        folder = Path(temporary)
        manifest = fetch_document(Manifest, location, folder, retry=retry)
        fetch_small_files(location, folder, manifest, retry=retry)
        return StreamedShards(location, folder, manifest, fields=fields, retry=retry)


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
    shards: ShardTable
    layouts: tuple[Layout, ...]
    items: dict[str, Items]
    """The fields of a batch."""
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
            total = int(self.shards.records[mine].sum())
            if num_visited < total:
                while num_visited >= self.shards.records[mine[0]]:
                    num_visited -= int(self.shards.records[mine.pop(0)])
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
        records = (record for shard in shards for record in self.shard(shard, epoch, choice))
        if self.order.shuffle == "none":
            return records
        mix = random.Random(mixed_seed(self.order.seed, "order", epoch, self.rank, worker))
        mixed: Iterator[Record] = shuffle(self.window_records, self.window_records, rng=mix)(
            records
        )
        return mixed

    def shard(self, index: int, epoch: int, choice: np.random.Generator) -> Iterator["Record"]:
        """Yields the records of a shard.

        Raises FormatError if a record's headers differ from the layout, and, after the last record,
        ShardHashError if the shard's hash differs from the manifest's.
        """
        entry = self.shards[index]
        url, layout = join(self.location, entry.name), self.layouts[entry.layout]
        digest = hashlib.sha256()
        with open_stream(url, size=entry.bytes, retry=self.retry) as stream:
            for _ in range(entry.records):
                content = stream.read(layout.record_bytes)
                digest.update(content)
                key = check_record(without_query(url), partial(_bytes_at, content), layout)
                yield self.choose(key, content, entry.layout, choice, visit=(epoch, index))
            for chunk in iterate(stream):  # the end of the tar, which has no records
                digest.update(chunk)
        if digest.hexdigest() != entry.sha256:
            message = hash_fault(without_query(url), entry, digest.hexdigest())
            raise ShardHashError(message, visit=(epoch, index))

    def choose(
        self,
        key: str,
        content: bytes,
        layout: int,
        choice: np.random.Generator,
        *,
        visit: tuple[int, int],
    ) -> "Record":
        """Returns one caption and one view, copied so that the rest of the record can be freed."""
        fields = self.layouts[layout].fields
        drawn = {
            "caption": int(choice.integers(fields["text"].shape[0])),
            "view": int(choice.integers(fields["latent"].shape[0])),
            "record": 0,
        }
        chosen = {}
        for name, items in self.items.items():
            start = int(items.offsets[layout]) + drawn[items.per] * items.item_bytes
            array = np.frombuffer(content, fields[name].dtype, prod(items.shape), start)
            chosen[name] = array.reshape(items.shape).copy()
        return Record(key, chosen, visit)

    def generator(self, use: Any, *numbers: int) -> np.random.Generator:
        """Returns a random generator from the run's seed."""
        return np.random.Generator(np.random.PCG64(mixed_seed(self.order.seed, use, *numbers)))


class ShardHashError(FormatError):
    """A shard's hash differs from the manifest's."""

    def __init__(self, message: str, visit: tuple[int, int]) -> None:
        super().__init__(message)
        self.visit = visit


@dataclass(frozen=True)
class Record:
    """The chosen view and caption of a record."""

    key: str
    items: dict[str, NDArray[Any]]
    """An item of each field."""
    visit: tuple[int, int]
    """Epoch and index of its shard."""


def _bytes_at(content: bytes, offset: int, size: int) -> bytes:
    return content[offset : offset + size]


class Batches(IterableDataset[Any]):
    """A rank's batches from a step on; each of DataLoader's n workers makes every n-th.

    An item is (keys, tensors by field), or an error: DataLoader would change the type of an error
    raised in a worker, so the consumer raises it.
    """

    def __init__(self, reading: Reading, batch_size: int, start: int) -> None:
        self.reading = reading
        self.batch_size = batch_size
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number = self.reading.num_workers
        # DataLoader takes the first batch from worker 0, the next from worker 1, and so on.
        step = self.start + (info.id if info else 0)
        worker = step % number
        num_steps = len(range(worker, self.start, number))  # earlier steps of this worker
        records = self.reading.records(worker, num_steps * self.batch_size)
        used: dict[tuple[int, int], tuple[int, int]] = {}  # first and last step, by visit
        try:
            while True:
                batch = list(islice(records, self.batch_size))
                for record in batch:
                    first, _ = used.get(record.visit, (step, step))
                    used[record.visit] = first, step
                while len(used) > 2 * len(self.reading.shards):
                    del used[next(iter(used))]  # the oldest; its shard was read to the end
                tensors = {
                    name: torch.from_numpy(np.stack([record.items[name] for record in batch]))
                    for name in self.reading.items
                }
                yield [record.key for record in batch], tensors
                step += number
        except RemoteError as error:
            yield RemoteError(str(error))
        except ShardHashError as error:
            first, last = used.get(error.visit, (-1, -1))
            steps = "no step used it" if first < 0 else f"steps {first} to {last} used it"
            yield FormatError(f"{error}; {steps}")
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
            items=shards.items,
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
        keys, tensors = item
        for name, tensor in tensors.items():
            out.gathered[name].copy_(tensor)
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
