"""A training step's data: records gathered from the shards, and the step's random numbers.

The random numbers of a step are drawn for the global batch, from one CPU generator seeded by
(seed, step), and each process keeps its slice. Batches and noise therefore do not depend on the
number of processes, and a resumed run needs only the step. The cost: every process draws for the
whole global batch (0.3 ms for 64 latents of 8 x 8 x 8), in the loader's thread.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latent_t2i.model.diffusion import ObjectiveConfig, sample_timesteps
from latent_t2i.shards.loader import NUM_BUFFERS, Loader, head, prefetch
from latent_t2i.shards.order import mixed_seed, share
from latent_t2i.shards.reader import RawBatch


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a step, along the first axis by position in the batch."""

    drop: Tensor  # (B,) bool: replace the caption by the empty prompt
    timesteps: Tensor  # (B,) int64, float32 for flow
    posterior_noise: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32


def draw(
    seed: int,
    step: int,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    objective: ObjectiveConfig,
) -> Draws:
    """Draws the random numbers of a step's global batch."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, "draws", step))
    shape = (batch_size, *latent_shape)
    # float64 resolves the tails of logit-normal timesteps, which float32 would round away.
    u = torch.rand(2, batch_size, dtype=torch.float64, generator=generator)
    posterior_noise = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if objective.offset_noise:
        # Offset noise (Guttenberg 2023) is drawn last: the other numbers are the same without it.
        offset = torch.randn((*shape[:2], 1, 1), generator=generator)
        noise += objective.offset_noise * offset
    return Draws(
        drop=u[0] < objective.caption_dropout,
        timesteps=sample_timesteps(u[1], objective),
        posterior_noise=posterior_noise,
        noise=noise,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(RawBatch):
    """One process's share of a step: the gathered records and their random numbers (Draws)."""

    drop: Tensor  # (B,) bool
    timesteps: Tensor  # (B,) int64, float32 for flow
    posterior_noise: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Makes one process's batches from its loader and the step's random numbers."""

    loader: Loader
    seed: int
    batch_size: int  # global
    latent_channels: int
    objective: ObjectiveConfig
    rank: int
    num_processes: int
    pin_memory: bool

    def buffer(self) -> Batch:
        """Returns an uninitialised batch of the largest shape in the set."""
        raw = self.loader.buffer(pin_memory=self.pin_memory)
        draws = vars(self._draw(0, len(raw), raw))  # only for their dtypes and shapes
        empty = {name: torch.empty_like(draws[name]) for name in draws}
        if self.pin_memory:
            empty = {name: tensor.pin_memory() for name, tensor in empty.items()}
        return Batch(**vars(raw), **empty)

    def fill(self, step: int, out: Batch) -> Batch:
        """Writes this process's share of a step into `out`.

        Returns `out`, or views of its memory if the step's bucket has a smaller shape.
        """
        filled = self.loader.fill(step, out)
        mine = share(self.batch_size, self.rank, self.num_processes)
        draws = {
            name: head(getattr(out, name), values[mine].shape).copy_(values[mine])
            for name, values in vars(self._draw(step, self.batch_size, filled)).items()
        }
        return replace(filled, **draws)

    def _draw(self, step: int, batch_size: int, like: RawBatch) -> Draws:
        """Draws the numbers of a batch whose latents are as high and wide as those of `like`."""
        height, width = like.latent.shape[-2:]
        shape = (self.latent_channels, height, width)
        return draw(self.seed, step, batch_size, shape, self.objective)

    def batch(self, step: int) -> Batch:
        """Returns this process's share of a step, in newly allocated memory."""
        return self.fill(step, self.buffer())

    def batches(
        self, start: int, stop: int, *, stream: torch.cuda.Stream | None = None
    ) -> Generator[Batch]:
        """Yields the batches of steps `start` to `stop`, each valid until the next is requested.

        `stream` is the CUDA stream that copies the batches to the device, if one does.
        """
        buffers = [self.buffer() for _ in range(NUM_BUFFERS)]
        # On a CPU the steps use all cores. A second team of OpenMP threads would slow them down.
        one_core = not self.pin_memory
        return prefetch(
            self.fill, buffers, start=start, stop=stop, stream=stream, one_core=one_core
        )
