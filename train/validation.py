"""The loss of the EMA weights on held-out records.

Records, captions, views, timesteps and noise depend on the seed only, so two measurements differ by
the weights alone, for any number of processes. Captions are never dropped and dropout is off.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
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
from latent_t2i.shards.duplicates import read_image_hashes
from latent_t2i.shards.joining import Shards
from latent_t2i.shards.order import mixed_seed
from latent_t2i.shards.reader import ShardSet
from latent_t2i.shards.remote.transport import is_remote
from latent_t2i.train.batches import Batch, make_positions
from latent_t2i.train.config import ValidationConfig
from latent_t2i.train.draws import Draws, draw
from latent_t2i.train.fsdp import is_fsdp
from latent_t2i.train.on_main import on_main

FLAG = "validation.shards"
NUM_QUARTERS = 4
# Reading the hash of a training record's image costs a page of its shard: larger sets are sampled.
MAX_HASHES_READ = 100_000


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation examples."""

    config: ValidationConfig
    shards: Shards
    records: NDArray[np.int64]  # (N,) ascending
    caption_u: NDArray[np.float64]  # (N,) in [0, 1)
    view_u: NDArray[np.float64]  # (N,) in [0, 1)
    timesteps: Tensor  # (N,) int64, of flow float32
    objective: ObjectiveConfig
    seed: int

    def batches(self) -> list[range]:
        """Returns the positions of the examples of each batch; a batch is of one bucket."""
        ends = np.cumsum([len(part) for part in self.shards.sets])
        edges = [0, *np.searchsorted(self.records, ends).tolist()]
        size = self.config.batch_size
        return [
            range(start, min(start + size, stop))
            for first, stop in pairwise(edges)
            for start in range(first, stop, size)
        ]

    def batch(self, positions: range) -> Batch:
        """Returns the examples at some positions."""
        piece = slice(positions.start, positions.stop)
        raw = self.shards.gather(self.records[piece], self.caption_u[piece], self.view_u[piece])
        return Batch(**vars(raw), positions=make_positions(0, positions))

    def draw(self, positions: range, batch: Batch) -> Draws:
        """Returns the random numbers of a batch, on its device."""
        shape = (self.shards.manifest.latent_channels, *batch.latent.shape[-2:])
        seed = mixed_seed(self.seed, "validation", 1)
        timesteps = self.timesteps[positions.start : positions.stop].to(batch.latent.device)
        return replace(draw(batch.positions, seed, shape, self.objective), timesteps=timesteps)


def open_validation(
    config: ValidationConfig,
    location: str,
    training: Shards,
    *,
    seed: int,
    objective: ObjectiveConfig,
) -> tuple[Validation, str]:
    """Opens the validation set and chooses its examples; returns them and a line about them.

    Raises ValueError if the set does not match the training set or shares records with it.
    """
    if is_remote(location):
        raise ValueError(f"{FLAG}: expected a local folder, found {location!r}")
    manifest = training.manifest
    shards = open_set(
        location,
        Access(kind="map"),
        vae_sha256=manifest.vae.sha256,
        text_sha256=manifest.text_encoder.sha256,
    )
    require_match(location, shards, training)
    generator = np.random.Generator(np.random.PCG64(mixed_seed(seed, "validation", 0)))
    num = min(config.num_examples, len(shards))
    records = np.sort(generator.permutation(len(shards))[:num])
    overlap = on_main(lambda: check_overlap(location, shards, records, training))
    caption_u, view_u, jitter = generator.random((3, num))
    # Stratified: the i-th of N examples gets a timestep of the i-th of N equal parts of the
    # distribution, in random order. Independent draws would make the mean vary more.
    levels = (generator.permutation(num) + jitter) / num
    validation = Validation(
        config=config,
        shards=shards,
        records=records,
        caption_u=caption_u,
        view_u=view_u,
        timesteps=sample_timesteps(torch.from_numpy(levels), objective),
        objective=replace(objective, caption_dropout=0.0, offset_noise=0.0),
        seed=seed,
    )
    return validation, f"validation: {num} of {len(shards)} records of {location}; {overlap}"


def no_validation(default: Path) -> str:
    """Returns the line of a run without a validation set; `default` is where one usually is."""
    hint = f"; to validate: --{FLAG} {default}" if default.is_dir() else ""
    return f"no validation set ({FLAG}): only the training loss is measured{hint}"


def require_match(location: str, shards: Shards, training: Shards) -> None:
    """Raises ValueError if the denoiser of the training set cannot read the validation set."""
    same = ("latent_kind", "latent_channels", "text_dtype", "max_tokens", "text_width")
    for name in (*same, "tokenizer.sha256"):
        found, expected = (attrgetter(name)(which.manifest) for which in (shards, training))
        if found != expected:
            raise ValueError(
                f"{FLAG}: {location}: {name}: expected {expected} as in the training set, "
                f"found {found}"
            )
    ours, theirs = shards.text_scale, training.text_scale
    if ours is not None and theirs is not None and not torch.equal(ours, theirs):
        raise ValueError(
            f"{FLAG}: {location}: text_scale: expected the training set's, found another; "
            "encode both with --text-dtype float16"
        )
    other = [shape for shape in shards.latent_shapes if shape not in training.latent_shapes]
    if other:
        raise ValueError(
            f"{FLAG}: {location}: expected latents of the training set's shapes "
            f"{', '.join(map(str, training.latent_shapes))}, found {other[0]}"
        )


def check_overlap(
    location: str, shards: Shards, records: NDArray[np.int64], training: Shards
) -> str:
    """Raises ValueError if the training set has the image of one of `records`.

    Images are compared by the hash of their files. Returns what was compared.
    """
    sets = [part for part in training.sets if type(part) is ShardSet]
    if not sets:
        return "not compared with the training set, which is not local"
    unknown = "not compared with the training set: a set of format 2 has no image hashes"
    keys: dict[bytes, str] = {}
    for numbers, part in by_set(records, shards.sets):
        hashes = part.image_hashes(numbers)
        if hashes is None:
            return unknown
        keys |= zip(hashes.tolist(), part.keys(numbers), strict=True)
    every = -(-sum(map(len, sets)) // MAX_HASHES_READ)
    num_skipped = len(training.sets) - len(sets)
    for part in sets:
        for numbers, hashes in read_image_hashes(part, every):
            if hashes is None:
                num_skipped += 1
                break
            (shared,) = np.nonzero(np.isin(hashes, [*keys]))
            if len(shared):
                (key,) = part.keys(numbers[shared[:1]])
                raise ValueError(
                    f"{FLAG}: {location}: expected images that are not in the training set, but "
                    f"the image of record {keys[hashes[shared[0]]]} is that of its record {key}"
                )
    if num_skipped == len(training.sets):
        return unknown
    found = f"no image is in {'all' if every == 1 else f'every {every}th'} of the training records"
    if num_skipped:
        found += f" of {len(training.sets) - num_skipped} sets; {num_skipped} sets, which are "
        found += "remote or have no image hashes, were not compared"
    return found


def by_set(
    records: NDArray[np.int64], sets: Sequence[ShardSet]
) -> Iterator[tuple[NDArray[np.int64], ShardSet]]:
    """Yields each plain set with the numbers of its records among `records`."""
    first = 0
    for part in sets:
        yield records[(records >= first) & (records < first + len(part))] - first, part
        first += len(part)


@torch.no_grad()
def measure(
    validation: Validation,
    accelerator: Accelerator,
    unet: nn.Module,
    ema: EMA,
    objective: Callable[[nn.Module, Batch, Draws], Tensor],
) -> dict[str, Any]:
    """Returns the EMA weights' loss, in total and by quarter of the timesteps, low noise first.

    All processes call this and get the same result. A mean of no examples, or one that is not
    finite, is None.
    """
    losses = torch.zeros(len(validation.records), device=accelerator.device)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    with ema.swapped_into(unet), accelerator.autocast():
        for positions, counts in deal(validation.batches(), rank, num_processes, is_fsdp(unet)):
            batch = validation.batch(positions).to(accelerator.device)
            found = objective(unet, batch, validation.draw(positions, batch))
            if counts:
                losses[positions.start : positions.stop] = found
    # Each loss was measured in one process and is 0 in the others.
    total: Tensor = accelerator.reduce(losses, reduction="sum")
    means = total.cpu().double()
    quarter = validation.timesteps * NUM_QUARTERS // validation.objective.num_timesteps
    return {
        "loss": finite_mean(means),
        "loss_by_quarter": {
            f"t{number + 1}of{NUM_QUARTERS}": finite_mean(means[quarter == number])
            for number in range(NUM_QUARTERS)
        },
        "num_examples": len(means),
        "weights": "ema",
    }


def deal(
    batches: Sequence[range], rank: int, num_processes: int, evenly: bool
) -> list[tuple[range, bool]]:
    """Returns a process's batches, each with whether its loss counts.

    `evenly` gives every process the same number, which FSDP's collectives require.
    """
    mine = [(batch, True) for batch in batches[rank::num_processes]]
    if evenly and len(mine) < -(-len(batches) // num_processes):
        mine.append((batches[0], False))
    return mine


def finite_mean(losses: Tensor) -> float | None:
    """Returns the mean, or None if it is not finite; JSON has no NaN."""
    mean = losses.mean().item() if len(losses) else math.nan
    return mean if math.isfinite(mean) else None
