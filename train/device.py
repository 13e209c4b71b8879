"""Batches on their way to the device: on a GPU by a stream of their own, beside the step before.

The loader's memory is pinned, so a copy does not hold up the host; on a stream of its own it does
not hold up the GPU either. The stream of the steps waits for a batch's copy only, and the loader
for the copy before it writes into that memory again. Without a GPU a batch is where it has to be.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from latent_t2i.train.batches import Batch


class DevicePrefetcher:
    """Brings batches to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch, in the loader's memory.

        Asked for in the copies' stream: the loader waits for what that was told about the batch
        before (shards/loader.py `prefetch`), and need not wait for the steps.
        """
        with self._in_stream():
            return next(batches)

    def bring(self, batch: Batch) -> Batch:
        """Returns the batch on the device, where the current stream's further work may use it."""
        if self._stream is None:
            return batch.to(self._device)
        with self._in_stream():
            there = batch.to(self._device)
            copied = self._stream.record_event()
        steps = torch.cuda.current_stream(self._device)
        steps.wait_event(copied)
        # Its memory belongs to the copies' stream: kept until the steps are done with it too.
        there.map(lambda tensor: _used_by(tensor, steps))
        return there

    def _in_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _used_by(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor
