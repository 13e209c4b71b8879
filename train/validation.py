"""The loss on records that training never sees, at the same noise every time it is measured.

Records, captions, views, timesteps and noise are functions of the seed alone, not of the step or of
the number of processes, so two measurements differ by the weights only. The i-th of N examples gets
a timestep of the i-th of N equal parts of the recipe's distribution, in random order: a plain draw
would make the mean vary more. No caption is dropped, and dropout is off. Measured are the averaged
weights, which are what the bundle gets; they change places with the live ones, tensor by tensor, so
there is no third copy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from latent_t2i.model.diffusion import ObjectiveConfig, sample_timesteps
from latent_t2i.model.ema import EMA
from latent_t2i.shards.access import Access, open_set
from latent_t2i.shards.buckets import BucketedShards
from latent_t2i.shards.order import mixed_seed
from latent_t2i.shards.reader import ShardSet
from latent_t2i.shards.remote.transport import is_remote
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import ValidationConfig
from latent_t2i.train.fsdp import is_fsdp

NUM_PARTS = 4
MAX_KEYS_READ = 100_000
"""Of the training set; to read one costs a page of its shard."""
SAME_LATENT = 0.1
"""Two latents nearer than this share of their size are of the same picture. Of moments the means
count: log-variances are large, and nearly the same for all pictures."""
Shards = ShardSet | BucketedShards


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The examples to measure on."""

    config: ValidationConfig
    shards: Shards
    records: NDArray[np.int64]  # (N,) ascending
    caption_u: NDArray[np.float64]  # (N,) in [0, 1)
    view_u: NDArray[np.float64]  # (N,) in [0, 1)
    timesteps: Tensor  # (N,) int64
    num_timesteps: int
    latent_channels: int
    seed: int

    def pieces(self) -> list[range]:
        """Returns the places of the examples in batches, none of which spans two buckets."""
        ends = np.cumsum([len(part) for part in parts(self.shards)])
        edges = [0, *np.searchsorted(self.records, ends).tolist()]
        size = self.config.batch_size
        return [
            range(start, min(start + size, stop))
            for first, stop in pairwise(edges)
            for start in range(first, stop, size)
        ]

    def batch(self, places: range) -> Batch:
        """Returns some of the examples, which must be of one bucket."""
        piece = slice(places.start, places.stop)
        gathered = self.shards.gather(
            self.records[piece], self.caption_u[piece], self.view_u[piece]
        )
        shape = (2, self.latent_channels, *gathered.latent.shape[-2:])
        noise = torch.stack([self._noise(place, shape) for place in places], dim=1)
        return Batch(
            latent=gathered.latent,
            text=gathered.text,
            tokens=gathered.tokens,
            drop=torch.zeros(len(places), dtype=torch.bool),
            timesteps=self.timesteps[piece],
            posterior_noise=noise[0],
            noise=noise[1],
        )

    def _noise(self, place: int, shape: tuple[int, ...]) -> Tensor:
        """Returns an example's own noise, whatever the batch it comes in."""
        seed = mixed_seed(self.seed, "validation", 1 + place)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def open_validation(
    config: ValidationConfig,
    location: str,
    training: Shards,
    *,
    seed: int,
    objective: ObjectiveConfig,
    latent_channels: int,
) -> tuple[Validation, str]:
    """Opens the validation set and chooses its examples; returns them and what to say of them.

    Raises ValueError for a set of other encoders or shapes than the training set's, and for one
    that shares records with it.
    """
    if is_remote(location):
        raise ValueError(
            f"validation.shards: expected a folder on this machine, found {location!r}"
        )
    theirs = training.manifest
    shards = open_set(
        location,
        Access(kind="map"),
        vae_sha256=theirs.vae.sha256,
        text_sha256=theirs.text_encoder.sha256,
    )
    check_same(location, shards, training)
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "validation", 0)))
    num = min(config.num_examples, len(shards))
    records = np.sort(generator.permutation(len(shards))[:num])
    checked = check_apart(location, shards, records, training)
    caption_u, view_u, jitter = generator.random((3, num))
    levels = (generator.permutation(num) + jitter) / num
    found = Validation(
        config=config,
        shards=shards,
        records=records,
        caption_u=caption_u,
        view_u=view_u,
        timesteps=sample_timesteps(torch.from_numpy(levels), objective),
        num_timesteps=objective.num_timesteps,
        latent_channels=latent_channels,
        seed=seed,
    )
    note = f"validation: {num} of {len(shards)} records of {location}, with the averaged weights"
    return found, f"{note}; {checked}"


def no_validation(standard: Path) -> str:
    """Returns what to say where no validation set was asked for."""
    there = f"; {standard} is there to be named" if standard.is_dir() else ""
    return f"no validation set (validation.shards): only the training loss is measured{there}"


def parts(shards: Shards) -> tuple[ShardSet, ...]:
    """Returns the plain sets that a set consists of."""
    return shards.sets if isinstance(shards, BucketedShards) else (shards,)


def check_same(location: str, shards: Shards, training: Shards) -> None:
    """Raises ValueError for a set that the training set's denoiser and text do not fit."""
    for what in ("latent_kind", "latent_channels", "text_dtype", "max_tokens", "text_width"):
        found, expected = (getattr(which.manifest, what) for which in (shards, training))
        if found != expected:
            raise ValueError(
                f"validation.shards: {location}: {what}: expected {expected} as in the training "
                f"set, found {found}"
            )
    ours, theirs = shards.text_scale, training.text_scale
    if ours is not None and theirs is not None and not torch.equal(ours, theirs):
        raise ValueError(
            f"validation.shards: {location}: text_scale: expected the training set's, found "
            "another; make both with --text-dtype float16"
        )
    other = [shape for shape in shards.latent_shapes if shape not in training.latent_shapes]
    if other:
        raise ValueError(
            f"validation.shards: {location}: latents of {other[0]}; expected the training set's: "
            f"{', '.join(map(str, training.latent_shapes))}"
        )


def check_apart(location: str, shards: Shards, records: NDArray[np.int64], training: Shards) -> str:
    """Raises ValueError where a record of the training set is among these; returns what to say.

    A key alone proves nothing, since folders count their images from the same number: the latents
    must be near as well. Training sets that are not mapped are not read for it.
    """
    sets = parts(training)
    if any(type(part) is not ShardSet for part in sets):
        return "not compared with the training set, which lies elsewhere"
    held_out: dict[str, Tensor] = {}
    for numbers, part in of_sets(records, parts(shards)):
        zeros = np.zeros(len(numbers))
        latents = part.gather(numbers, zeros, zeros).latent[:, : part.manifest.latent_channels]
        held_out |= dict(zip(part.keys(numbers), latents, strict=True))
    every = -(-len(training) // MAX_KEYS_READ)
    for part in sets:
        numbers = np.arange(0, len(part), every)
        for number, key in zip(numbers, part.keys(numbers), strict=True):
            if key in held_out and is_same(held_out[key], first_latent(part, int(number))):
                raise ValueError(
                    f"validation.shards: {location}: record {key} is in the training set too; "
                    "expected records that training never sees"
                )
    which = "none" if every == 1 else f"none of every {every}th record"
    return f"{which} of the training set is among them"


def of_sets(
    records: NDArray[np.int64], sets: tuple[ShardSet, ...]
) -> Iterator[tuple[NDArray[np.int64], ShardSet]]:
    """Yields, for each plain set, which of its records these are."""
    first = 0
    for part in sets:
        yield records[(records >= first) & (records < first + len(part))] - first, part
        first += len(part)


def first_latent(part: ShardSet, number: int) -> Tensor:
    """Returns the first view of a record's latent, of moments the mean."""
    zero = np.zeros(1)
    return part.gather(np.array([number]), zero, zero).latent[0, : part.manifest.latent_channels]


def is_same(one: Tensor, other: Tensor) -> bool:
    """Returns whether two latents are of the same picture, up to rounding."""
    if one.shape != other.shape:
        return False
    difference = (one.float() - other.float()).norm()
    return bool(difference <= SAME_LATENT * one.float().norm())


@torch.no_grad()
def measure(
    validation: Validation,
    accelerator: Accelerator,
    unet: nn.Module,
    ema: EMA,
    objective: Callable[[nn.Module, Batch], Tensor],
) -> dict[str, Any]:
    """Returns the averaged weights' loss, also by quarter of the timesteps, least noise first.

    Batches are dealt out to the processes, all of which must call this and get the same figures. A
    mean of no examples, or one that is not finite, is None. The bare network is called, since a
    compiled one would be compiled once more for each other size of batch.
    """
    losses = torch.zeros(len(validation.records), device=accelerator.device)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    with ema.swapped_into(unet), accelerator.autocast():
        for places, counts in deal(validation.pieces(), rank, num_processes, is_fsdp(unet)):
            found = objective(unet, validation.batch(places).to(accelerator.device))
            if counts:
                losses[places.start : places.stop] = found
    total: Tensor = accelerator.reduce(losses, reduction="sum")
    means = total.cpu().double()
    quarter = validation.timesteps * NUM_PARTS // validation.num_timesteps
    quarters = [means[quarter == number] for number in range(NUM_PARTS)]
    return {
        "loss": finite_mean(means),
        "loss_by_quarter": {
            f"t{number + 1}of{NUM_PARTS}": finite_mean(part) for number, part in enumerate(quarters)
        },
        "num_examples": len(means),
        "weights": "ema",
    }


def deal(
    pieces: Sequence[range], rank: int, num_processes: int, evenly: bool
) -> list[tuple[range, bool]]:
    """Returns a process's pieces, and of each whether it counts.

    `evenly` gives all as many, since all must take part in each pass of a network shared out.
    """
    mine = [(piece, True) for piece in pieces[rank::num_processes]]
    if evenly and len(mine) < -(-len(pieces) // num_processes):
        mine.append((pieces[0], False))
    return mine


def finite_mean(losses: Tensor) -> float | None:
    """Returns the mean, or None where there is none that JSON could hold."""
    mean = losses.mean().item() if len(losses) else math.nan
    return mean if math.isfinite(mean) else None
