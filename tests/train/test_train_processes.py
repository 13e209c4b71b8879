"""The same run on 1, 2 and 4 processes, with and without accumulation, resumed on other counts."""

from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.train.config import DataConfig
from tests import tiny
from tests.train import process_groups
from tests.train.conftest import MakeConfig, assert_close_metrics, metrics

RELATIVE = 1e-5


def train_on(
    forks: ForkServerContext, make_config: MakeConfig, num_processes: int, **changes: Any
) -> Path:
    """Trains, checks that all processes end with the same weights, and returns the run."""
    config = make_config(batch_size=8, log_every_steps=1, checkpoint_every_steps=100, **changes)
    run = process_groups.run(forks, config, num_processes=num_processes)
    assert len({(run / f"rank-{rank}.json").read_text() for rank in range(num_processes)}) == 1
    return run


def test_a_run_of_two_processes_resumes_on_one(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    one = train_on(forks, make_config, 1, num_steps=12, out=str(tmp_path / "one"))
    out = str(tmp_path / "both")
    train_on(forks, make_config, 2, num_steps=5, micro_batch_size=2, out=out)
    resumed = train_on(forks, make_config, 1, num_steps=12, out=out)
    assert_close_metrics(resumed, one, RELATIVE)


def test_two_processes_roll_back_together(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    """Steps 1 and 2 of an epoch of three have a broken record each, on different processes."""
    folder = tiny.make_shards(tmp_path / "bad", sizes=(8, 16))
    tiny.plant_nan(folder, shard=1, records=[0, 15])
    config = make_config(
        shards=str(folder),
        batch_size=8,
        checkpoint_every_steps=1,
        max_bad_steps=1,
        data=DataConfig(shuffle="none"),
    )
    process_groups.finish(process_groups.start(forks, config, num_processes=2), exit_code=1)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000001"]
    assert metrics(tmp_path / "run")[-1]["skipped"] == 2


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    one = train_on(forks, make_config, 1, num_steps=50, out=str(tmp_path / "one"))
    for num_processes, micro in ((1, 2), (2, None), (2, 1), (4, None), (4, 1)):
        out = str(tmp_path / f"{num_processes}-{micro}")
        changes = {"num_steps": 50, "micro_batch_size": micro, "out": out}
        run = train_on(forks, make_config, num_processes, **changes)
        assert_close_metrics(run, one, RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (4, 2)])
def test_a_run_resumes_on_another_number_of_processes(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext, first: int, then: int
) -> None:
    one = train_on(forks, make_config, 1, num_steps=50, out=str(tmp_path / "one"))
    out = str(tmp_path / "both")
    train_on(forks, make_config, first, num_steps=23, micro_batch_size=2, out=out)
    resumed = train_on(forks, make_config, then, num_steps=50, out=out)
    assert_close_metrics(resumed, one, RELATIVE)
