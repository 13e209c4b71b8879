"""A training step's data: records gathered from the shards, and the step's random numbers.

The random numbers of an example are a function of (seed, step, position in the global batch), so
batches and noise do not depend on the number of processes, each process draws those of its own
examples only, and a resumed run needs only the step. They are drawn on the CPU in the loader's
thread, for a GPU too, so all devices see the same bits. docs/log.md compares the alternatives.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.model.diffusion import ObjectiveConfig, sample_timesteps
from latent_t2i.shards.loader import Loader, head, num_buffers, prefetch
from latent_t2i.shards.order import mixed_seed, share
from latent_t2i.shards.reader import RawBatch

DRAWS_VERSION = "per example"
"""How noise is drawn, in the settings of a checkpoint: 0.1 drew it for the whole global batch."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of examples, along the first axis."""

    drop: Tensor  # (B,) bool: replace the caption by the empty prompt
    timesteps: Tensor  # (B,) int64, float32 for flow
    posterior_noise: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32


def empty_draws(
    num: int,
    latent_shape: tuple[int, int, int],
    objective: ObjectiveConfig,
    *,
    pin_memory: bool = False,
) -> Draws:
    """Returns uninitialised memory for the random numbers of `num` examples."""
    timesteps = torch.float32 if objective.prediction == "flow" else torch.int64
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "drop": ((num,), torch.bool),
        "timesteps": ((num,), timesteps),
        "posterior_noise": ((num, *latent_shape), torch.float32),
        "noise": ((num, *latent_shape), torch.float32),
    }
    return Draws(
        **{
            name: torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
            for name, (shape, dtype) in shapes.items()
        }
    )


def draw(
    seed: int,
    step: int,
    batch_size: int,
    mine: slice,
    objective: ObjectiveConfig,
    out: Draws,
) -> Draws:
    """Writes the random numbers of the positions `mine` of a global batch into `out`."""
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "draws", step)))
    # float64 resolves the tails of logit-normal timesteps, which float32 would round away.
    u = torch.from_numpy(generator.random((2, batch_size))[:, mine])
    out.drop.copy_(u[0] < objective.caption_dropout)
    out.timesteps.copy_(sample_timesteps(u[1], objective))
    normal = torch.Generator()
    for row, number in enumerate(example_seeds(seed, step, batch_size)[mine].tolist()):
        normal.manual_seed(number)
        out.posterior_noise[row].normal_(generator=normal)
        noise = out.noise[row].normal_(generator=normal)
        if objective.offset_noise:
            # Offset noise (Guttenberg 2023) is drawn last: the other numbers are the same without.
            noise += objective.offset_noise * torch.randn((len(noise), 1, 1), generator=normal)
    return out


def example_seeds(seed: int, step: int, batch_size: int) -> NDArray[np.uint32]:
    """Returns the seeds (B,) of the examples' generators, distinct for the first 2^32 of a run.

    torch's CPU generator uses 32 bits of its seed, of which hashes would collide in any long run.
    So the example's number in the run is mixed by a bijection: the finaliser of MurmurHash3.
    """
    first = step * batch_size
    mixed = np.arange(first, first + batch_size, dtype=np.uint64).astype(np.uint32)
    mixed ^= np.uint32(mixed_seed(seed, "draws") & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> np.uint32(shift)
        mixed *= np.uint32(factor)
    return mixed ^ (mixed >> np.uint32(16))


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
        shape = self._latent_shape(raw)
        draws = empty_draws(len(raw), shape, self.objective, pin_memory=self.pin_memory)
        return Batch(**vars(raw), **vars(draws))

    def fill(self, step: int, out: Batch) -> Batch:
        """Writes this process's share of a step into `out`.

        Returns `out`, or views of its memory if the step's bucket has a smaller shape.
        """
        filled = self.loader.fill(step, out)
        mine = share(self.batch_size, self.rank, self.num_processes)
        shape = (len(out), *self._latent_shape(filled))
        draws = Draws(
            drop=out.drop,
            timesteps=out.timesteps,
            posterior_noise=head(out.posterior_noise, shape),
            noise=head(out.noise, shape),
        )
        draw(self.seed, step, self.batch_size, mine, self.objective, draws)
        return replace(filled, **vars(draws))

    def _latent_shape(self, like: RawBatch) -> tuple[int, int, int]:
        """Returns the shape (C, h, w) of latents that are as high and wide as those of `like`."""
        height, width = like.latent.shape[-2:]
        return self.latent_channels, height, width

    def batch(self, step: int) -> Batch:
        """Returns this process's share of a step, in newly allocated memory."""
        return self.fill(step, self.buffer())

    def batches(
        self, start: int, stop: int, *, stream: torch.cuda.Stream | None = None
    ) -> Generator[Batch]:
        """Yields the batches of steps `start` to `stop`, each valid until the next is requested.

        `stream` is the CUDA stream that copies the batches to the device, if one does.
        """
        buffers = [self.buffer() for _ in range(num_buffers(self.pin_memory))]
        # On a CPU the steps use all cores. A second team of OpenMP threads would slow them down.
        one_core = not self.pin_memory
        return prefetch(
            self.fill, buffers, start=start, stop=stop, stream=stream, one_core=one_core
        )
