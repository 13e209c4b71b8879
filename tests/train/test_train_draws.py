"""Random numbers of examples: functions of (seed, step, position), uniform, normal, independent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.shards.order import share
from latent_t2i.train import draws as module
from latent_t2i.train.batches import make_positions
from latent_t2i.train.draws import Draws
from latent_t2i.train.draws import draw as draw_numbers
from tests.train.conftest import assert_same_tensors

PLAIN = ObjectiveConfig(caption_dropout=0.5)
OFFSET = ObjectiveConfig(caption_dropout=0.5, offset_noise=0.1)
GOLDEN_DROP = [True, True, False, False, True, False]
GOLDEN_TIMESTEPS = [175, 747, 13, 42, 160, 28]
GOLDEN_NOISE = [
    [-0.6423963308, 0.0102898804, -0.4262403846, 0.7711694837],
    [0.5029196143, 0.4841995239, -0.5586383939, 0.1475129575],
]


def draw(
    seed: int,
    step: int,
    positions: range,
    latent_shape: tuple[int, int, int],
    objective: ObjectiveConfig = PLAIN,
) -> Draws:
    """The random numbers of some positions of a global batch."""
    return draw_numbers(make_positions(step, positions), seed, latent_shape, objective)


def test_draws_match_golden_values() -> None:
    """Other numbers would change every existing run."""
    draws = draw(3, 7, range(6), (2, 2, 2))
    assert draws.drop.tolist() == GOLDEN_DROP
    assert draws.timesteps.tolist() == GOLDEN_TIMESTEPS
    for noise, expected in zip((draws.posterior_noise, draws.noise), GOLDEN_NOISE, strict=True):
        torch.testing.assert_close(noise[-1, 1].flatten(), torch.tensor(expected))


@settings(max_examples=15)
@given(
    step=st.integers(0, 2**50),
    seed=st.integers(0, 2**64 - 1),
    num_processes=st.sampled_from([1, 2, 4, 8]),
    shape=st.sampled_from([(2, 3, 3), (4, 8, 8), (1, 1, 1), (3, 5, 7)]),
)
def test_each_process_draws_its_own_positions_of_the_global_batch(
    step: int, seed: int, num_processes: int, shape: tuple[int, int, int]
) -> None:
    whole = draw(seed, step, range(8), shape, OFFSET)
    assert whole.noise.shape == whole.posterior_noise.shape == (8, *shape)
    parts = [
        draw(seed, step, range(8)[share(8, rank, num_processes)], shape, OFFSET)
        for rank in range(num_processes)
    ]
    assert_same_tensors(joined(parts), vars(whole))


def joined(parts: list[Draws]) -> dict[str, Tensor]:
    """The random numbers of several processes as those of one."""
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}


def test_pieces_that_bound_memory_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(5, 9, range(7), (4, 8, 8), OFFSET)
    for most in (1, 256):  # one and two examples at a time
        monkeypatch.setattr(module, "MAX_BLOCKS_CPU", most)
        assert_same_tensors(vars(draw(5, 9, range(7), (4, 8, 8), OFFSET)), vars(whole))


def test_a_process_evaluates_no_numbers_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    num_blocks: list[int] = []
    philox = module.philox

    def counted(counter: module.Words, key: int) -> module.Words:
        num_blocks.append(torch.broadcast_tensors(*counter)[0].numel())
        return philox(counter, key)

    monkeypatch.setattr(module, "philox", counted)
    draw(0, 4, range(32, 48), (4, 8, 8))
    assert sum(num_blocks) == 16 * (2 * 64 + 1)  # four numbers a block, and one for the scalars


@pytest.mark.parametrize("change", ["seed", "step", "later step", "position"])
def test_other_seeds_steps_and_positions_give_other_numbers(change: str) -> None:
    one = draw(1, 2, range(256), (1, 4, 4))
    other = {
        "seed": draw(2, 2, range(256), (1, 4, 4)),
        "step": draw(1, 3, range(256), (1, 4, 4)),
        "later step": draw(1, 2 + 2**32, range(256), (1, 4, 4)),
        "position": draw(1, 2, range(256, 512), (1, 4, 4)),
    }[change]
    for name in ("noise", "posterior_noise"):
        assert abs(correlation(getattr(one, name), getattr(other, name))) < 4 / 4096**0.5
    assert abs(correlation(one.timesteps, other.timesteps)) < 4 / 256**0.5
    assert 0.35 < (one.drop == other.drop).double().mean() < 0.65


def correlation(one: Tensor, other: Tensor) -> float:
    """The correlation of two tensors of equally many numbers."""
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1])


def test_noise_has_the_moments_and_the_distribution_of_a_normal() -> None:
    draws = [draw(0, step, range(64), (4, 8, 8)) for step in range(16)]
    for name in ("noise", "posterior_noise"):
        values = torch.stack([getattr(d, name) for d in draws]).double()
        flat = values.flatten()
        num = len(flat)  # 262,144: the bounds are four standard errors
        assert abs(flat.mean()) < 4 / num**0.5
        assert abs(flat.var() - 1) < 4 * (2 / num) ** 0.5
        assert abs((flat**3).mean()) < 4 * (15 / num) ** 0.5
        assert abs((flat**4).mean() - 3) < 4 * (96 / num) ** 0.5
        assert flat.abs().max() > 4
        assert kolmogorov_smirnov(flat) < 1.63 / num**0.5
        steps, examples = values.transpose(0, 1).flatten(1), values.flatten(0, 1).flatten(1)
        for neighbours in (flat, steps.T.flatten(), examples.T.flatten()):
            assert abs(correlation(neighbours[1:], neighbours[:-1])) < 4 / num**0.5
            assert abs(correlation(neighbours[1:] ** 2, neighbours[:-1] ** 2)) < 4 / num**0.5


def kolmogorov_smirnov(values: Tensor) -> float:
    """The largest distance of the values' empirical distribution from the normal one."""
    u = torch.special.ndtr(values).sort().values
    steps = torch.arange(len(u) + 1) / len(u)
    return float(torch.maximum((steps[1:] - u).abs(), (u - steps[:-1]).abs()).max())


def test_numbers_of_one_example_are_independent() -> None:
    draws = draw(0, 5, range(4096), (2, 4, 4), ObjectiveConfig(num_timesteps=10))
    columns = [
        draws.drop[:, None],
        draws.timesteps[:, None],
        draws.noise.flatten(1),
        draws.posterior_noise.flatten(1),
    ]
    table = torch.corrcoef(torch.cat([c.double() for c in columns], dim=1).T)
    assert table.fill_diagonal_(0).abs().max() < 5 / 4096**0.5  # of 2,145 pairs
    assert 0.08 < draws.drop.double().mean() < 0.12
    assert torch.bincount(draws.timesteps).min() > 340
    squares = torch.cat([c.double() ** 2 for c in columns[2:]], dim=1)
    assert torch.corrcoef(squares.T).fill_diagonal_(0).abs().max() < 5 / 4096**0.5


def test_offset_noise_is_one_number_per_channel() -> None:
    shape = (4, 4, 4)
    plain = draw(0, 5, range(2048), shape, ObjectiveConfig())
    draws = draw(0, 5, range(2048), shape, ObjectiveConfig(offset_noise=0.5))
    for name in ("drop", "timesteps", "posterior_noise"):
        assert torch.equal(getattr(draws, name), getattr(plain, name))
    offset = draws.noise - plain.noise
    assert torch.allclose(offset, offset[..., :1, :1], atol=1e-6)
    offset = offset[..., 0, 0]  # (B, C)
    assert abs(offset.mean()) < 0.02
    assert abs(offset.std() - 0.5) < 0.02
    assert torch.corrcoef(offset.T).fill_diagonal_(0).abs().max() < 0.08
    assert abs((offset * plain.noise.mean(dim=(2, 3))).mean()) < 0.01  # independent of the noise
    assert abs(draws.noise.var() - 1.25) < 0.03  # 1 + 0.5^2


def test_flow_timesteps_are_continuous() -> None:
    settings = {"timestep_sampling": "logit_normal", "logit_mean": 0.4}
    whole = draw(0, 5, range(512), (1, 2, 2), ObjectiveConfig(**settings)).timesteps
    flow = ObjectiveConfig(prediction="flow", **settings)
    exact = draw(0, 5, range(512), (1, 2, 2), flow).timesteps
    assert whole.dtype == torch.int64 and exact.dtype == torch.float32
    assert torch.equal(exact.long(), whole)  # both come from the same uniform number
    assert 0.4 < exact.frac().mean() < 0.6
