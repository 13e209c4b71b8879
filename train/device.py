"""Copies batches to the device; on a GPU, in parallel with the previous step.

The buffers are pinned and the copies run on a separate stream, so a copy blocks neither the host
nor the stream that runs the steps.
"""

import torch

from latent_t2i.train.batches import Batch


class DevicePrefetcher:
    """Copies batches to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """The stream of the copies; None without a GPU."""

    def to_device(self, batch: Batch) -> Batch:
        """Returns the batch on the device, ready for work on the current stream."""
        if self.stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self.stream):
            copied = batch.to(self._device)
            done = self.stream.record_event()
        steps = torch.cuda.current_stream(self._device)
        steps.wait_event(done)
        # The memory was allocated on the copies' stream. Without this, the allocator could reuse
        # it while the steps still read it.
        copied.map(lambda tensor: _record_use(tensor, steps))
        return copied


def _record_use(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor
