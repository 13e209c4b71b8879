"""Captures a whole training step as a CUDA graph and replays it.

A GPU step on few or small latents is limited by launching about a thousand kernels; a replay
launches one graph: the forward and backward passes, clipping, and the update or its skipping
(optim.py). The first steps run eagerly, so that libraries can select their kernels. See
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from latent_t2i.train.batches import Batch

NUM_WARMUP_STEPS = 4
# Loss, gradient norm, and 1.0 if the step was skipped, all on the device.
StepResult = tuple[Tensor, Tensor, Tensor]
StepFunction = Callable[[Batch, Tensor], StepResult]


class GraphBackend(Protocol):
    """Runs work eagerly and captures it."""

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        """Runs the work eagerly."""

    def capture(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """Captures the work without running it.

        Returns a function that replays it, and the tensors that a replay overwrites.
        """


class StepGraph:
    """Runs training steps: the first few eagerly, later ones by replay."""

    def __init__(self, step: StepFunction, device: torch.device, backend: GraphBackend) -> None:
        self._step = step
        self._backend = backend
        self._rate = torch.zeros((), device=device)
        self._num_eager = 0
        self._batch: Batch | None = None
        self._captured: tuple[Callable[[], None], StepResult] | None = None

    def __call__(self, batch: Batch, rate: float) -> StepResult:
        """Runs a step. All batches have one shape; the next call overwrites the result."""
        static = self._copy_in(batch)  # a replay reads the addresses of the capture
        self._rate.fill_(rate)  # a Python number would be a constant of the graph
        if self._num_eager < NUM_WARMUP_STEPS:
            self._num_eager += 1
            return self._backend.run(lambda: self._step(static, self._rate))
        if self._captured is None:
            self._captured = self._backend.capture(lambda: self._step(static, self._rate))
        replay, result = self._captured
        replay()
        return result

    def _copy_in(self, batch: Batch) -> Batch:
        """Copies a batch into the graph's static memory, and returns that."""
        if self._batch is None:
            self._batch = batch.map(torch.empty_like)
        for target, tensor in zip(self._batch.tensors(), batch.tensors(), strict=True):
            target.copy_(tensor)
        return self._batch


class CudaGraphBackend:
    """Captures CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], StepResult]) -> StepResult:
        """Runs the work on the stream that is used for capture, as PyTorch requires."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        for tensor in result:
            tensor.record_stream(current)
        return result

    def capture(self, work: Callable[[], StepResult]) -> tuple[Callable[[], None], StepResult]:
        """Captures the work."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may use the GPU during the capture.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result
