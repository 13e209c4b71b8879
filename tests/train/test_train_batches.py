"""Batches and draws are functions of (seed, step), for any process count and order of access."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.shards.loader import MapLoader
from latent_t2i.shards.order import share
from latent_t2i.shards.reader import open_shards
from latent_t2i.train.batches import BatchSource, Draws, empty_draws, example_seeds
from latent_t2i.train.batches import draw as draw_into
from tests.train.conftest import assert_same_batch, join

NUM_CHANNELS = 4
PLAIN = ObjectiveConfig(caption_dropout=0.5)
FLOW = ObjectiveConfig(caption_dropout=0.5, prediction="flow", flow_shift=2.0)
OFFSET = ObjectiveConfig(caption_dropout=0.5, offset_noise=0.1)
GOLDEN_DROP = [False, True, False, True, False, True]
GOLDEN_TIMESTEPS = [49, 216, 513, 93, 726, 280]
GOLDEN_NOISE = [
    [2.0780596733, -0.2206817418, 0.2547401190, -0.7487100959],
    [0.6473782659, 0.0616921373, 0.4675903022, -1.8639231920],
]


def draw(
    seed: int,
    step: int,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    objective: ObjectiveConfig,
    mine: slice = slice(None),
) -> Draws:
    """The random numbers of some positions of a global batch."""
    num = len(range(batch_size)[mine])
    out = empty_draws(num, latent_shape, objective)
    return draw_into(seed, step, batch_size, mine, objective, out)


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


def test_noise_has_the_distribution_of_a_normal() -> None:
    """Over examples too: the first number of each one's generator, at neighbouring seeds."""
    draws = [draw(1, step, 512, (1, 2, 2), PLAIN) for step in range(8)]
    for position in (0, 3):
        values = torch.cat([d.noise.flatten(1)[:, position] for d in draws]).double()
        distance = kolmogorov_smirnov(torch.special.ndtr(values))
        assert distance < 1.63 / len(values) ** 0.5  # 1 % level
        lagged = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
        assert abs(lagged) < 0.05


def kolmogorov_smirnov(u: torch.Tensor) -> float:
    """The largest distance of numbers' empirical distribution from the uniform one."""
    steps = torch.arange(len(u) + 1) / len(u)
    u = u.sort().values
    return float(torch.maximum((steps[1:] - u).abs(), (u - steps[:-1]).abs()).max())


def test_no_two_examples_of_a_run_share_a_seed() -> None:
    seeds = np.concatenate([example_seeds(0, step, 1000) for step in range(1000)])
    assert len(np.unique(seeds)) == len(seeds)
    assert example_seeds(0, 2**40, 2).dtype == np.uint32
    assert not np.array_equal(example_seeds(1, 0, 1000), seeds[:1000])


@settings(max_examples=20, deadline=None)
@given(
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**63 - 1),
    num_processes=st.sampled_from([1, 2, 4, 8]),
)
def test_each_process_draws_its_own_positions_of_the_global_batch(
    step: int, seed: int, num_processes: int
) -> None:
    shape = (2, 3, 3)
    whole = draw(seed, step, 8, shape, OFFSET)
    parts = [
        draw(seed, step, 8, shape, OFFSET, share(8, rank, num_processes))
        for rank in range(num_processes)
    ]
    for name, values in vars(whole).items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), values)


def test_a_process_draws_no_noise_of_others(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[int] = []
    normal_ = torch.Tensor.normal_

    def counted(self: torch.Tensor, **settings: torch.Generator) -> torch.Tensor:
        count.append(self.numel())
        return normal_(self, **settings)

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    source = make_source(shards, rank=1, num_processes=3)
    batch = source.batch(4)
    assert sum(count) == batch.noise.numel() + batch.posterior_noise.numel()


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
