"""Batches and draws are functions of (seed, step), for any process count and order of access."""

from pathlib import Path

import pytest
import torch

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.reader import open_shards
from latent_t2i.train.batches import BatchSource, draw
from tests.train.conftest import assert_same_batch, join

NUM_CHANNELS = 4
PLAIN = ObjectiveConfig(caption_dropout=0.5)
FLOW = ObjectiveConfig(caption_dropout=0.5, prediction="flow", flow_shift=2.0)
OFFSET = ObjectiveConfig(caption_dropout=0.5, offset_noise=0.1)
GOLDEN_DROP = [False, True, False, False, False, False]
GOLDEN_TIMESTEPS = [122, 630, 661, 372, 226, 260]
GOLDEN_NOISE = [
    [-0.0043835933, 0.7148037553, -0.8508150578, -0.7317996025],
    [-1.5581511259, 0.6144677997, -1.9882444143, 0.7645993233],
]


def make_source(
    folder: Path,
    *,
    rank: int = 0,
    num_processes: int = 1,
    seed: int = 0,
    objective: ObjectiveConfig = PLAIN,
) -> BatchSource:
    """A source of batches of six records."""
    shards = open_shards(folder)
    order = shards.order(batch_size=6, seed=seed)
    return BatchSource(
        loader=MapLoader(shards=shards, order=order, rank=rank, num_processes=num_processes),
        seed=seed,
        batch_size=6,
        latent_channels=NUM_CHANNELS,
        objective=objective,
        rank=rank,
        num_processes=num_processes,
        pin_memory=False,
    )


def test_draws_are_uniform_and_normal() -> None:
    draws = draw(0, 5, 4096, (1, 2, 2), ObjectiveConfig(num_timesteps=10))
    assert 0.08 < draws.drop.float().mean() < 0.12
    assert torch.bincount(draws.timesteps).min() > 340
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(noise.mean()) < 0.03
        assert abs(noise.std() - 1) < 0.03
    assert abs((draws.noise * draws.posterior_noise).mean()) < 0.03


def test_draws_match_golden_values() -> None:
    """Other numbers would change every existing run."""
    draws = draw(3, 7, 6, (2, 2, 2), ObjectiveConfig(caption_dropout=0.5))
    assert draws.drop.tolist() == GOLDEN_DROP
    assert draws.timesteps.tolist() == GOLDEN_TIMESTEPS
    for noise, expected in zip((draws.posterior_noise, draws.noise), GOLDEN_NOISE, strict=True):
        torch.testing.assert_close(noise[-1, 1].flatten(), torch.tensor(expected))


def test_offset_noise_is_one_number_per_channel() -> None:
    shape = (4, 4, 4)
    plain = draw(0, 5, 2048, shape, ObjectiveConfig())
    draws = draw(0, 5, 2048, shape, ObjectiveConfig(offset_noise=0.5))
    for name in ("drop", "timesteps", "posterior_noise"):
        assert torch.equal(getattr(draws, name), getattr(plain, name))
    offset = draws.noise - plain.noise
    assert torch.allclose(offset, offset[..., :1, :1], atol=1e-6)
    offset = offset[..., 0, 0]  # (B, C)
    assert abs(offset.mean()) < 0.02
    assert abs(offset.std() - 0.5) < 0.01
    assert torch.corrcoef(offset.T).fill_diagonal_(0).abs().max() < 0.06
    assert abs((offset * plain.noise.mean(dim=(2, 3))).mean()) < 0.01  # independent of the noise
    assert abs(draws.noise.var() - 1.25) < 0.03  # 1 + 0.5^2


def test_flow_timesteps_are_continuous() -> None:
    settings = {"timestep_sampling": "logit_normal", "logit_mean": 0.4}
    whole = draw(0, 5, 512, (1, 2, 2), ObjectiveConfig(**settings)).timesteps
    flow = ObjectiveConfig(prediction="flow", **settings)
    exact = draw(0, 5, 512, (1, 2, 2), flow).timesteps
    assert whole.dtype == torch.int64 and exact.dtype == torch.float32
    assert torch.equal(exact.long(), whole)  # both come from the same uniform number
    assert 0.4 < exact.frac().mean() < 0.6


@pytest.mark.parametrize(
    ("num_processes", "objective"), [(1, PLAIN), (2, PLAIN), (3, FLOW), (3, OFFSET), (6, PLAIN)]
)
def test_processes_divide_the_same_batch(
    shards: Path, num_processes: int, objective: ObjectiveConfig
) -> None:
    whole = make_source(shards, objective=objective).batch(11)
    parts = [
        make_source(shards, rank=rank, num_processes=num_processes, objective=objective).batch(11)
        for rank in range(num_processes)
    ]
    assert_same_batch(join(parts), whole)


def test_micro_batches_divide_the_batch(shards: Path) -> None:
    batch = make_source(shards).batch(0)
    pieces = batch.split(4)
    assert [len(piece) for piece in pieces] == [4, 2]
    assert torch.equal(torch.cat([piece.noise for piece in pieces]), batch.noise)


def test_prefetched_batches_equal_single_ones(shards: Path) -> None:
    source = make_source(shards)
    step = 3
    for step, batch in enumerate(source.batches(3, 9), start=3):
        assert_same_batch(batch, source.batch(step))
    assert step == 8


def test_a_record_gets_other_noise_in_the_next_epoch(shards: Path) -> None:
    source = make_source(shards)
    order = open_shards(shards).order(batch_size=6, seed=0)
    first, later = ({int(r): i for i, r in enumerate(order.records(s))} for s in (0, 4))
    record = next(iter(first.keys() & later.keys()), None)
    assert record is not None, "seed 0 has a record in both batches"
    noise = [source.batch(s).noise[p[record]] for s, p in ((0, first), (4, later))]
    assert not torch.equal(*noise)
