"""Batches of a set for one process, made ahead in a background thread, into buffers used in turn.

    shards = open_shards("shards/data/demo/train")
    loader = MapLoader(shards, shards.order(batch_size=256, seed=0), rank=0, num_processes=1)
    for batch in batches(loader, start=0, stop=1000):
        ...

No worker processes: a batch is three indexed copies, which release Python's lock. There are two
buffers, and a batch is overwritten when the next but one is made: it is good until the next is
asked for, so copy what is to be kept. With pinned buffers the copy to a GPU may still be under way
then; the thread waits for it before it writes.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.order import Order, choices, share
from latent_t2i.shards.reader import BatchT, RawBatch, ShardSet

NUM_BUFFERS = 2
T = TypeVar("T")
U = TypeVar("U")


class Loader(Protocol):
    """What fills the batches of one process."""

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        """Returns an empty batch of this process's size, and of the largest shape there is."""

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Puts this process's share of a step's global batch into `out`, and returns it.

        That is `out` itself, or where batches differ in shape what of it the step's takes up.
        """

    def nonfinite_keys(self, step: int) -> list[str]:
        """Returns the keys of a step's records with values that are not finite.

        All its keys where every value is finite: then numbers overflowed in training.
        """


@dataclass(frozen=True, kw_only=True)
class MapLoader:
    """Fills batches from mapped shards; any step, in any order."""

    shards: ShardSet
    order: Order
    rank: int = 0
    num_processes: int = 1

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        """Returns an empty batch of this process's size."""
        return self.shards.buffer(
            self.order.batch_size // self.num_processes, pin_memory=pin_memory
        )

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Puts this process's share of a step's global batch into `out`."""
        mine = share(self.order.batch_size, self.rank, self.num_processes)
        caption_u, view_u = choices(self.order.seed, step, self.order.batch_size)
        records = self.order.records(step)[mine]
        self.shards.gather(records, caption_u[mine], view_u[mine], out)
        return out

    def nonfinite_keys(self, step: int) -> list[str]:
        """Returns the keys of a step's records, of all processes, that are not finite; or all."""
        records = self.order.records(step)
        batch = self.shards.gather(records, *choices(self.order.seed, step, len(records)))
        bad = ~are_finite(batch)
        return self.shards.keys(records[bad] if bad.any() else records)


@dataclass(frozen=True, kw_only=True)
class BucketLoader:
    """Fills each batch from the bucket whose turn it is, by that bucket's own loader.

    One buffer serves all buckets: it is of the largest, and a smaller batch lies at its start. The
    areas of buckets are much alike, so a buffer for each would take as many times the memory.
    """

    order: BucketOrder
    loaders: tuple[Loader, ...]
    """Of each bucket, for the same process."""
    latent_shapes: tuple[tuple[int, ...], ...]
    """Of each bucket: (2C, h, w) or (C, h, w)."""

    def buffer(self, *, pin_memory: bool = False) -> RawBatch:
        """Returns an empty batch of this process's size, of the largest bucket."""
        sizes = [prod(shape) for shape in self.latent_shapes]
        return self.loaders[sizes.index(max(sizes))].buffer(pin_memory=pin_memory)

    def fill(self, step: int, out: BatchT) -> BatchT:
        """Puts this process's share of a step's global batch into the start of `out`."""
        bucket, local_step = self.order.place(step)
        shape = (len(out.latent), *self.latent_shapes[bucket])
        part = replace(out, latent=head(out.latent, shape))
        return self.loaders[bucket].fill(local_step, part)

    def nonfinite_keys(self, step: int) -> list[str]:
        """Returns the keys of a step's records that are not finite; or all."""
        bucket, local_step = self.order.place(step)
        return self.loaders[bucket].nonfinite_keys(local_step)


def head(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the first values of a contiguous tensor as one of another shape, in its memory."""
    return tensor if tensor.shape == shape else tensor.view(-1)[: prod(shape)].view(shape)


def are_finite(batch: RawBatch) -> NDArray[np.bool_]:
    """Returns which records (B,) of a batch have finite latents and text."""
    finite: NDArray[np.bool_] = (
        batch.latent.isfinite().flatten(1).all(1) & batch.text.isfinite().flatten(1).all(1)
    ).numpy()
    return finite


def batches(
    loader: Loader, *, start: int, stop: int, pin_memory: bool = False
) -> Generator[RawBatch]:
    """Yields this process's batches of steps `start` to `stop`; each is good until the next."""
    buffers = [loader.buffer(pin_memory=pin_memory) for _ in range(NUM_BUFFERS)]
    return prefetch(loader.fill, buffers, start=start, stop=stop)


def prefetch(
    fill: Callable[[int, T], U],
    buffers: Sequence[T],
    *,
    start: int,
    stop: int,
    one_core: bool = False,
) -> Generator[U]:
    """Yields what `fill` makes of the buffers in turn, in a background thread, step after step.

    Steps go from `start` to `stop`, in order. What `fill` returns, its buffer or a part of it, is
    good until the next is asked for; what the caller's GPU stream was told to do with it until then
    is waited for. An error while filling comes out when its step is asked for.

    `one_core` keeps PyTorch from using more than the thread itself: for steps on a CPU, which a
    second team of OpenMP threads slows by a quarter, as both then hand over by system calls.
    """

    def refill(step: int, buffer: T, used: torch.cuda.Event | None) -> tuple[T, U]:
        if used is not None:
            used.synchronize()
        return buffer, fill(step, buffer)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        if one_core:
            pool.submit(_keep_to_one_core).result()
            torch.set_num_threads(torch.get_num_threads())  # of threads to come, as it was
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
                if step is not None:
                    pending.append(pool.submit(refill, step, buffer, _mark()))
        finally:
            for future in pending:
                future.cancel()


def _keep_to_one_core() -> None:
    """Keeps PyTorch's work in this thread from being shared out, and that of threads to come."""
    torch.get_num_threads()  # or the thread's first work would set it anew
    torch.set_num_threads(1)


def _mark() -> torch.cuda.Event | None:
    """Returns an event after all that the current GPU stream was told so far."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
