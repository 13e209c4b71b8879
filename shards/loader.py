"""Prefetches the batches of one process in a background thread, into buffers used by turns.

    shards = open_shards("shards/data/demo/train")
    loader = MapLoader(shards, shards.order(batch_size=256, seed=0), rank=0, num_processes=1)
    for batch in batches(loader, start=0, stop=1000):
        ...

There are no worker processes: a batch is an indexed copy per field, and those release the GIL. A
batch is valid until the next one is requested; clone what must live longer.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.order import Epochs, choices, share
from latent_t2i.shards.reader import BatchT, RawBatch
from latent_t2i.shards.union import PlainShards

NUM_BUFFERS = 2
# A GPU reads a buffer long after the host has queued the copy, so more of them are in use.
NUM_PINNED_BUFFERS = 4
T = TypeVar("T")
U = TypeVar("U")


class Loader(Protocol):
    """Fills the batches of one process."""

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        """Returns an uninitialised batch of this process's size and the largest shape."""

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Writes this process's share of a step's global batch into `out` and returns it.

        The result is `out`, or the part of `out` that this step's bucket fills.
        """

    def nonfinite_keys(self, step: int) -> list[str]:
        """Returns the keys of a step's records that hold non-finite values.

        The list is empty if all values are finite: training itself overflowed then. Stream access
        does not read records again and returns all keys.
        """


@dataclass(frozen=True, kw_only=True)
class MapLoader:
    """Fills batches from mapped shards, for any step in any order."""

    shards: PlainShards
    order: Epochs
    rank: int = 0
    num_processes: int = 1

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        return self.shards.buffer(
            self.order.batch_size // self.num_processes, pin_memory=pin_memory
        )

    def fill(self, step: int, out: BatchT) -> BatchT:
        self.finish_epoch(step)
        mine = share(self.order.batch_size, self.rank, self.num_processes)
        caption_u, view_u = choices(self.order.seed, step, self.order.batch_size)
        records = self.order.records(step)[mine]
        self.shards.gather(records, caption_u[mine], view_u[mine], out)
        return out

    def finish_epoch(self, step: int) -> None:
        """At an epoch's first step, waits for the verification of the epoch before."""
        if step and self.order.cursor(step).epoch != self.order.cursor(step - 1).epoch:
            self.shards.finish_verification()

    def nonfinite_keys(self, step: int) -> list[str]:
        records = self.order.records(step)
        caption_u, view_u = choices(self.order.seed, step, len(records))
        keys, is_bad = np.empty(len(records), object), np.zeros(len(records), np.bool_)
        shards = self.shards.shards_of(records)
        for shard in np.unique(shards):  # one by one, because a cache may not hold all of them
            rows = np.flatnonzero(shards == shard)
            batch = self.shards.gather(records[rows], caption_u[rows], view_u[rows])
            keys[rows], is_bad[rows] = self.shards.keys(records[rows]), ~are_finite(batch)
        return list(keys[is_bad])


@dataclass(frozen=True, kw_only=True)
class BucketLoader:
    """Fills each batch from the step's bucket, with that bucket's loader.

    All buckets share one buffer of the largest size, because a buffer each would multiply memory.
    """

    order: BucketOrder
    loaders: tuple[Loader, ...]
    """One per bucket, for this process."""
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    """Shape of an item of each field, by bucket."""

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        buffer = self.loaders[0].buffer(pin_memory=pin_memory)
        tensors = buffer.gathered
        for name, tensor in tensors.items():
            shape = max((shapes[name] for shapes in self.shapes), key=prod)
            if shape != tensor.shape[1:]:
                tensors[name] = torch.empty(
                    (len(tensor), *shape), dtype=tensor.dtype, pin_memory=pin_memory
                )
        return buffer.with_gathered(tensors)

    def fill(self, step: int, out: BatchT) -> BatchT:
        bucket, local_step = self.order.locate(step)
        shapes = self.shapes[bucket]
        tensors = {
            name: head(tensor, (len(out), *shapes[name])) for name, tensor in out.gathered.items()
        }
        return self.loaders[bucket].fill(local_step, out.with_gathered(tensors))

    def nonfinite_keys(self, step: int) -> list[str]:
        bucket, local_step = self.order.locate(step)
        return self.loaders[bucket].nonfinite_keys(local_step)


def num_buffers(pin_memory: bool) -> int:
    """Returns the number of buffers to prefetch into: more of them for copies to a GPU."""
    return NUM_PINNED_BUFFERS if pin_memory else NUM_BUFFERS


def head(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a view of a contiguous tensor's first values in another shape."""
    return tensor if tensor.shape == shape else tensor.view(-1)[: prod(shape)].view(shape)


def are_finite(batch: RawBatch) -> NDArray[np.bool_]:
    """Returns which records (B,) of a batch have finite latents and text."""
    finite: NDArray[np.bool_] = (
        batch.latent.isfinite().flatten(1).all(1) & batch.text.isfinite().flatten(1).all(1)
    ).numpy()
    return finite


def batches(
    loader: Loader,
    *,
    start: int,
    stop: int,
    pin_memory: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> Generator[RawBatch]:
    """Yields this process's batches of steps `start` to `stop`; each is valid until the next."""
    buffers = [loader.buffer(pin_memory=pin_memory) for _ in range(num_buffers(pin_memory))]
    return prefetch(loader.fill, buffers, start=start, stop=stop, stream=stream)


def prefetch(
    fill: Callable[[int, T], U],
    buffers: Sequence[T],
    *,
    start: int,
    stop: int,
    stream: torch.cuda.Stream | None = None,
    one_core: bool = False,
) -> Generator[U]:
    """Yields the results of `fill(step, buffer)` for steps `start` to `stop`, in order.

    A background thread fills the buffers by turns. A result, its buffer or a part of it, is valid
    until the next one is requested. If `stream` copies from the buffers, a buffer is refilled only
    after the work that was queued on the stream by then. An error in `fill` is raised when its step
    is requested.

    `one_core` limits PyTorch to one thread in the background. Use it if the steps run on the CPU: a
    second pool of OpenMP threads on the same cores slows each step by a quarter.
    """

    def refill(step: int, buffer: T, used: torch.cuda.Event | None) -> tuple[T, U]:
        if used is not None:
            used.synchronize()  # a copy to the GPU may still read this buffer
        return buffer, fill(step, buffer)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        if one_core:
            pool.submit(_keep_to_one_core).result()
            torch.set_num_threads(torch.get_num_threads())  # for new threads: back to the default
        steps = iter(range(start, stop))
        pending = deque(
            pool.submit(refill, step, buffer, None)
            for buffer, step in zip(buffers, steps, strict=False)
        )
        try:
            while pending:
                buffer, filled = pending.popleft().result()
                yield filled
                step = next(steps, None)
                # Recorded now, after the consumer has queued its copies from this buffer.
                queued = None if stream is None else stream.record_event(_blocking_event())
                if step is not None:
                    pending.append(pool.submit(refill, step, buffer, queued))
        finally:
            for future in pending:
                future.cancel()


def _blocking_event() -> torch.cuda.Event:
    """Returns an event whose `synchronize` sleeps: by default it spins and takes a core."""
    return torch.cuda.Event(blocking=True)


def _keep_to_one_core() -> None:
    """Limits PyTorch to one thread, here and in threads started later."""
    torch.get_num_threads()  # initialises the value, else the first operation would reset it
    torch.set_num_threads(1)
