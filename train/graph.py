"""A whole step recorded once as a CUDA graph, and played back from then on.

With few or small latents a GPU step is bound by the launches of some thousand kernels; played back
they are one. Recorded are the forward and backward passes, clipping, the loss scale and the update
or its skipping (optim.py), all of which stays on the device; the averages, one call, follow.

The first steps are taken as they come, so that libraries choose their kernels; no step is taken
that would not be taken otherwise. What changes from step to step is put into memory that stays: the
batch and the learning rate. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from latent_t2i.train.batches import Batch

NUM_STEPS_BEFORE = 4
Outcome = tuple[Tensor, Tensor, Tensor]
"""Loss, norm of the gradients, and whether the step was skipped; on the device."""
TakeStep = Callable[[Batch, Tensor], Outcome]


class Recorder(Protocol):
    """Runs work and records it."""

    def run(self, work: Callable[[], Outcome]) -> Outcome:
        """Does the work as it comes."""

    def record(self, work: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        """Returns what does the work again, and where its results then lie; does not do it."""


class StepGraph:
    """Takes steps: the first few as they come, later ones played back."""

    def __init__(self, take_step: TakeStep, device: torch.device, recorder: Recorder) -> None:
        self._take_step = take_step
        self._recorder = recorder
        self._rate = torch.zeros((), device=device)
        self._num_before = 0
        self._batch: Batch | None = None
        self._play: Callable[[], None] | None = None
        self._outcome: Outcome | None = None

    def __call__(self, batch: Batch, rate: float) -> Outcome:
        """Takes a step, on a batch of always the same shape; its outcome is good until the next."""
        mine = self._put(batch)
        self._rate.fill_(rate)
        if self._num_before < NUM_STEPS_BEFORE:
            self._num_before += 1
            return self._recorder.run(lambda: self._take_step(mine, self._rate))
        if self._play is None or self._outcome is None:
            self._play, self._outcome = self._recorder.record(
                lambda: self._take_step(mine, self._rate)
            )
        self._play()
        return self._outcome

    def _put(self, batch: Batch) -> Batch:
        """Copies a batch into the memory that stays, and returns that."""
        if self._batch is None:
            self._batch = batch.map(torch.empty_like)
        for part in fields(Batch):
            getattr(self._batch, part.name).copy_(getattr(batch, part.name))
        return self._batch


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], Outcome]) -> Outcome:
        """Does the work in the stream that it will be recorded in."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = work()
        current.wait_stream(self._stream)
        for tensor in outcome:
            tensor.record_stream(current)
        return outcome

    def record(self, work: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        """Records the work; other threads, such as the loader's, may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outcome = work()
        return graph.replay, outcome
