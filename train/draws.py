"""The random numbers of training examples: noise, timesteps, caption dropout.

They are a function of (seed, step, position in the global batch), drawn on the device by a
counter-based generator (philox.py). So they do not depend on the number of processes, each process
draws those of its own examples only, and a resumed run needs only the step. Caption and view are
chosen by the loader, which needs them on the host (shards/order.py).
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from latent_t2i.model.diffusion import ObjectiveConfig, sample_timesteps
from latent_t2i.train.philox import WORD, Words, normal, philox, uniform

DRAWS_VERSION = "philox per example"
"""How numbers are drawn, in the settings of a checkpoint.

Before: "per example" with a CPU generator for each; 0.1 drew for the whole global batch.
"""
USE_SHIFT = 28
"""A word of the counter holds a use in its upper bits, and the number of a block in the others."""
SCALARS, NOISE, POSTERIOR, OFFSET = range(4)
"""The uses, which enter the counter: new ones belong at the end."""
# On a CPU, what is drawn at once fits the cache. On a GPU, 2^20 blocks take about 100 MB.
MAX_BLOCKS_CPU, MAX_BLOCKS_GPU = 2**16, 2**20


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of examples, along the first axis."""

    drop: Tensor  # (B,) bool: replace the caption by the empty prompt
    timesteps: Tensor  # (B,) int64, float32 for flow
    posterior_noise: Tensor  # (B, C, h, w) float32
    noise: Tensor  # (B, C, h, w) float32


def draw(
    positions: Tensor, key: int, latent_shape: tuple[int, int, int], objective: ObjectiveConfig
) -> Draws:
    """Draws the random numbers of examples, on the device of `positions`.

    `positions` (B, 2) int64 holds the step and the position in the global batch of each example,
    `key` is a seed of 64 bits, and `latent_shape` is (C, h, w).
    """
    num_blocks = 2 * math.ceil(math.prod(latent_shape) / 4)
    most = MAX_BLOCKS_CPU if positions.device.type == "cpu" else MAX_BLOCKS_GPU
    pieces = [
        _draw_piece(piece, key, latent_shape, objective)
        for piece in positions.split(max(1, most // num_blocks))
    ]
    if len(pieces) == 1:
        return pieces[0]
    return Draws(
        **{f.name: torch.cat([getattr(piece, f.name) for piece in pieces]) for f in fields(Draws)}
    )


def _draw_piece(
    positions: Tensor, key: int, latent_shape: tuple[int, int, int], objective: ObjectiveConfig
) -> Draws:
    """Draws all numbers from one evaluation of the generator, because it is many operations."""
    num_values = math.prod(latent_shape)
    counts = {SCALARS: 2, NOISE: num_values, POSTERIOR: num_values}
    if objective.offset_noise:
        counts[OFFSET] = latent_shape[0]
    blocks = {use: math.ceil(count / 4) for use, count in counts.items()}
    words = philox(_counter(positions, blocks), key)
    # float64 resolves the tails of logit-normal timesteps, which float32 would round away.
    first = [word[:, 0] for word in words]
    timestep_u, drop_u = uniform(*first[:2]), uniform(*first[2:])
    normals = normal(torch.stack(words)).split(list(blocks.values()), dim=-1)
    values = {
        use: part.transpose(0, 1).flatten(1)[:, : counts[use]]  # from (4, B, blocks of the use)
        for use, part in zip(blocks, normals, strict=True)
    }
    shape = (len(positions), *latent_shape)
    noise = values[NOISE].reshape(shape)
    if objective.offset_noise:  # Guttenberg 2023
        noise += objective.offset_noise * values[OFFSET][:, :, None, None]
    return Draws(
        drop=drop_u < objective.caption_dropout,
        timesteps=sample_timesteps(timestep_u, objective),
        posterior_noise=values[POSTERIOR].reshape(shape),
        noise=noise,
    )


def _counter(positions: Tensor, blocks: dict[int, int]) -> Words:
    """Returns the counters of each example's blocks, in the order of `blocks`."""
    step, position = positions[:, :1], positions[:, 1:]  # (B, 1)
    parts = [
        torch.arange(use << USE_SHIFT, (use << USE_SHIFT) + num, device=positions.device)
        for use, num in blocks.items()
    ]
    return position, torch.cat(parts), step & WORD, step >> 32
