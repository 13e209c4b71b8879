"""Training on several sets as one: resumed exactly, on any number of processes, and refusals."""

import json
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.configs import cli
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.reader import open_shards
from latent_t2i.train.config import DataConfig, TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from tests import tiny
from tests.shard_sets import DOWNSCALE, SIDE
from tests.train import process_groups
from tests.train.conftest import (
    MakeConfig,
    assert_close_metrics,
    assert_same_weights,
    losses,
    skipped_lines,
)

WEIGHTS = DataConfig(weights=(1, 0.5, 2))


@pytest.fixture(scope="session")
def sets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Three sets of 24, 9 and 5 records."""
    root = tmp_path_factory.mktemp("sets")
    more = {"b": (6, 3), "c": (5,)}
    for number, (name, sizes) in enumerate(more.items()):
        tiny.make_shards(root / name, sizes=sizes, first_seed=10 + 10 * number)
    return (str(shards), *(str(root / name) for name in more))


@pytest.mark.parametrize(
    "data", [WEIGHTS, pytest.param(DataConfig(), marks=pytest.mark.slow)], ids=["weighted", "plain"]
)
def test_a_resumed_run_of_several_sets_is_the_uninterrupted_one(
    make_config: MakeConfig, sets: tuple[str, ...], tmp_path: Path, data: DataConfig
) -> None:
    whole = train(make_config(shards=sets, data=data, out=str(tmp_path / "whole")))
    train(make_config(shards=sets, data=data, num_steps=4))
    resumed = train(make_config(shards=sets, data=data))
    assert losses(tmp_path / "run")[1:] == losses(tmp_path / "whole")[1:]
    assert_same_weights(resumed, whole)


def test_other_sets_or_weights_are_refused_and_the_bundle_goes_on(
    make_config: MakeConfig, sets: tuple[str, ...], tmp_path: Path
) -> None:
    two, data = sets[:2], DataConfig(weights=(1, 2))
    bundle = train(make_config(shards=two, data=data, num_steps=1))
    for changes, name in (
        ({"shards": two, "data": DataConfig(weights=(1, 3))}, "data.weights"),
        ({"shards": sets, "data": WEIGHTS}, "data.weights"),
        ({"shards": two[::-1], "data": data}, "shards_sha256"),
        ({"shards": (two[0], sets[2]), "data": data}, "shards_sha256"),
    ):
        found = changes["shards"]
        message = rf"{name}: the run in .* has .*, of shards \[.*\], found .*{found[-1]}'\]; .*init"
        with pytest.raises(ValueError, match=message):
            train(make_config(num_steps=2, **changes))
    moved = [str(tmp_path / name) for name in "ab"]
    for target, given in zip(moved, two, strict=True):
        Path(target).symlink_to(given)
    train(make_config(shards=tuple(moved), data=data, num_steps=2))
    config = make_config(shards=sets, init_from=str(bundle), out=str(tmp_path / "on"), num_steps=1)
    train(config)
    info = json.loads((tmp_path / "on" / "bundle" / "bundle.json").read_text())
    assert info["shards_sha256"] == [open_shards(location).sha256 for location in sets]
    assert info["config"]["shards"] == list(sets)


def test_one_set_is_recorded_by_its_hash(make_config: MakeConfig, shards: Path) -> None:
    plan = validate(make_config(), 1)
    assert plan.settings["shards_sha256"] == open_shards(shards).sha256
    assert not [note for note in plan.notes if note.startswith("set ")]


def test_records_and_shares_of_the_sets_are_logged(
    make_config: MakeConfig, sets: tuple[str, ...]
) -> None:
    lines = [
        f"set 1 of 3: {sets[0]}: 24 records, weight 1, 24 visits per epoch (63.2%)",
        f"set 2 of 3: {sets[1]}: 9 records, weight 0.5, 4 visits per epoch (10.5%)",
        f"set 3 of 3: {sets[2]}: 5 records, weight 2, 10 visits per epoch (26.3%)",
    ]
    plan = validate(make_config(shards=sets, data=WEIGHTS), 1)
    assert [note for note in plan.notes if note.startswith("set ")] == lines
    plan = validate(make_config(shards=sets), 1)
    assert f"set 2 of 3: {sets[1]}: 9 records, weight 1, 9 visits per epoch (23.7%)" in plan.notes
    assert plan.order.num_steps(1) == 10  # 38 records in batches of 4


def test_impossible_sets_are_refused(
    make_config: MakeConfig, sets: tuple[str, ...], tmp_path: Path
) -> None:
    other = tiny.make_shards(tmp_path / "plain", vae=tiny.vae_folder("flux"), sizes=(4,))
    bucket = f"{SIDE * DOWNSCALE}x{SIDE * DOWNSCALE}"
    tiny.make_shards(tmp_path / "buckets" / bucket, sizes=(4,), first_seed=50)
    finish_buckets(tmp_path / "buckets", [bucket], quarantined={})
    cases: list[tuple[tuple[str, ...], DataConfig, str]] = [
        ((sets[0], f"{sets[0]}/"), DataConfig(), r"shards: expected each set once, found .* twice"),
        (sets[:2], DataConfig(access="stream"), r"data.access: stream reads one set, found 2"),
        ((sets[0], str(other)), DataConfig(), rf"shards: {other}: vae: expected .* found"),
        ((sets[0], "nowhere"), DataConfig(), r"shards: the folder 'nowhere' does not exist"),
        (
            (sets[0], str(tmp_path / "buckets")),
            DataConfig(weights=(1, 2)),
            r"data.weights: sets with buckets cannot be weighted; .* found 1 2",
        ),
        (sets[:2], DataConfig(weights=(1, 0.01)), r"data.weights: set 2 of 2: .* = 0 visits"),
    ]
    for locations, data, message in cases:
        with pytest.raises(ValueError, match=message):
            validate(make_config(shards=locations, data=data), 1)


@pytest.mark.parametrize(
    ("shards", "weights", "message"),
    [
        (("a", "b"), (1.0,), r"expected a weight for each of several --shards, found 1 weights"),
        (("a",), (1.0,), r"data.weights: .* found 1 weights for 1 sets"),
        (None, (1.0, 2.0), r"data.weights: .* found 2 weights for 1 sets"),
        (("a", "b"), (1.0, 0.0), r"data.weights: expected more than 0, found 0.0"),
        (("a", " "), (), r"shards: expected a name or path, found ' '"),
        ((), (), r"shards: expected one or more folders or URLs, found \(\)"),
        ("a", (), r"shards: expected one or more folders or URLs, found 'a'"),
    ],
)
def test_wrong_settings_of_sets_are_refused(
    shards: Any, weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(name="x", num_steps=1, shards=shards, data=DataConfig(weights=weights))


def test_sets_and_weights_are_flags() -> None:
    flags = ["--name", "x", "--num-steps", "1", "--shards", "a", "b", "--data.weights", "1", "0.5"]
    config = cli.parse(TrainConfig, "train", flags)
    assert config.shards == ("a", "b") and config.data.weights == (1.0, 0.5)
    assert cli.dump(config)["shards"] == ["a", "b"]
    assert cli.parse(TrainConfig, "train", [*flags[:4], "--shards", "a"]).shards == ("a",)


def test_broken_records_are_named_with_their_set(
    make_config: MakeConfig,
    sets: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tiny.make_shards(tmp_path / "bad", sizes=(4,), first_seed=70)
    tiny.plant_nan(bad, shard=0, records=[1])
    train(make_config(shards=(sets[2], str(bad)), num_steps=2, batch_size=8, log_every_steps=1))
    lines = skipped_lines(capsys)
    assert lines and all(f"records: 70-3-000001 of {bad}" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("data", [DataConfig(), WEIGHTS], ids=["plain", "weighted"])
def test_two_processes_train_like_one_on_several_sets(
    make_config: MakeConfig,
    sets: tuple[str, ...],
    tmp_path: Path,
    forks: ForkServerContext,
    data: DataConfig,
) -> None:
    made: dict[str, Any] = {"shards": sets, "data": data, "batch_size": 8, "log_every_steps": 1}
    one = process_groups.run(forks, make_config(**made, out=str(tmp_path / "one")))
    both = make_config(**made, out=str(tmp_path / "both"))
    process_groups.run(forks, replace(both, num_steps=5), num_processes=2)
    resumed = process_groups.run(forks, both, num_processes=2)
    assert_close_metrics(resumed, one, 1e-5)
