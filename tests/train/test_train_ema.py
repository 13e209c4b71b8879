"""Several averages in a run: kept, resumed, snapshotted, and mixed into another one afterwards."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_t2i.configs import cli
from latent_t2i.model.bundle import read_info
from latent_t2i.model.ema import EMA, EMAConfig, gamma_of
from latent_t2i.model.posthoc import find_folders, synthesise
from latent_t2i.shards.reader import ShardSet
from latent_t2i.train.checkpoint import hash_state
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.loop import train
from tests import tiny
from tests.train import process_groups
from tests.train.conftest import MakeConfig

SEVERAL = EMAConfig(decay=0.9, sigma_rels=(0.05, 0.1), snapshot_every_steps=2)
POWERS = EMAConfig(decay=None, sigma_rels=(0.05, 0.1), snapshot_every_steps=2)


def network(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same bit by bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def files(folder: Path) -> dict[str, bytes]:
    """All snapshots' tensors as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "snapshots").rglob("*.safetensors"))
    }


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Does something while the n-th batch of this process is gathered."""
    gather, count = ShardSet.gather, iter(range(10**6))

    def wrapped(self: ShardSet, *args: Any) -> Any:
        if next(count) == number:
            action()
        return gather(self, *args)

    monkeypatch.setattr(ShardSet, "gather", wrapped)


def test_more_averages_change_neither_the_weights_nor_the_bundle(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    plain = train(make_config(out=str(tmp_path / "plain")))
    several = train(make_config(ema=SEVERAL))
    assert different(network(plain), network(several)) == []
    kept = [p / "checkpoints" / "step-00000010" for p in (plain.parent, several.parent)]
    names = load_file(kept[0] / "unet.safetensors").keys()
    plain_ema, several_ema = (load_file(each / "ema.safetensors") for each in kept)
    assert plain_ema.keys() == names
    assert several_ema.keys() == {f"{label}{n}" for label in ("", "0.05/", "0.1/") for n in names}
    assert not (plain.parent / "snapshots").exists()


def test_snapshots_come_at_their_interval_and_at_the_end(make_config: MakeConfig) -> None:
    bundle = train(make_config(num_steps=7, ema=POWERS))
    folders = find_folders(bundle.parent / "snapshots")
    assert [int(p.name[-8:]) for p in folders] == [2, 4, 6, 7]
    last = load_file(folders[-1] / "sigma_rel-0.05.safetensors")
    halved = {name: tensor.half() for name, tensor in network(bundle).items()}
    assert different(last, halved) == []


def test_the_last_snapshot_replaces_one_of_an_earlier_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "run" / "snapshots" / "step-00000003" / "stale").mkdir(parents=True)
    run = train(make_config(num_steps=3, ema=replace(POWERS, snapshot_every_steps=50))).parent
    (folder,) = find_folders(run / "snapshots")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", *[".safetensors"] * 2]


@pytest.mark.parametrize("number", [5, 7])
def test_a_run_that_was_stopped_keeps_the_averages_of_one_that_was_not(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = train(make_config(out=str(tmp_path / "whole"), ema=SEVERAL)).parent
    interrupt_at(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(make_config(ema=SEVERAL))
    stopped = train(make_config(ema=SEVERAL)).parent
    ends = [load_file(p / "checkpoints/step-00000010/ema.safetensors") for p in (whole, stopped)]
    assert different(*ends) == []
    assert files(whole) == files(stopped)


def test_a_crash_and_a_restart_from_an_older_checkpoint_give_the_same_snapshots(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise OSError("disk gone")

    changes = {"checkpoint_every_steps": 5, "ema": SEVERAL}
    whole = train(make_config(out=str(tmp_path / "whole"), **changes)).parent
    interrupt_at(monkeypatch, 9, crash)
    with pytest.raises(OSError, match="disk gone"):
        train(make_config(**changes))
    run = tmp_path / "run"
    assert find_folders(run / "snapshots")[-1].name > "step-00000005"
    train(make_config(**changes))
    assert files(run) == files(whole)


def test_two_processes_keep_the_averages_of_one(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    one = train(make_config(out=str(tmp_path / "one"), ema=SEVERAL)).parent
    process_groups.finish(process_groups.start(forks, make_config(ema=SEVERAL), num_processes=2))
    two = tmp_path / "run"
    assert files(one).keys() == files(two).keys()
    ends = [load_file(p / "checkpoints/step-00000010/ema.safetensors") for p in (one, two)]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_snapshots_that_were_lost_at_the_end_are_taken_again(make_config: MakeConfig) -> None:
    run = train(make_config(ema=POWERS)).parent
    before = files(run)
    newest = find_folders(run / "snapshots")[-1]
    shutil.rmtree(newest)
    train(make_config(ema=POWERS))
    assert files(run) == before


def test_a_skipped_step_is_an_update_like_any_other(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Tensor]] = []
    update = EMA.update

    def watched(self: EMA, parameters: Any, num_updates: int) -> None:
        parameters = list(parameters)
        seen.append((num_updates, parameters[0].detach().clone()))
        update(self, parameters, num_updates)

    monkeypatch.setattr(EMA, "update", watched)
    folder = tiny.make_shards(tmp_path / "bad")
    tiny.plant_nan(folder, shard=1, records=[3])  # met in steps 1 and 9, from 0
    run = train(make_config(shards=str(folder), ema=POWERS)).parent
    assert [number for number, _ in seen] == list(range(10))
    assert torch.equal(seen[1][1], seen[0][1])
    assert torch.equal(seen[9][1], seen[8][1])
    powers = torch.arange(11, dtype=torch.float64) ** (gamma_of(0.05) + 1)
    shares = powers.diff() / powers[-1]
    expected = torch.einsum("t,t...->...", shares, torch.stack([w for _, w in seen]).double())
    kept = load_file(run / "checkpoints" / "step-00000010" / "ema.safetensors")
    torch.testing.assert_close(kept["0.05/conv_in.weight"], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ema", [SEVERAL, POWERS])
def test_the_settings_are_flags_and_come_back_from_the_runs_config(
    make_config: MakeConfig, ema: EMAConfig
) -> None:
    config = make_config(num_steps=1, ema=ema)
    kept = train(config).parent / "config.json"
    assert cli.parse(TrainConfig, "train", ["--config", str(kept)]) == config
    flags = ["--name", "a", "--num-steps", "1", "--ema.decay", str(ema.decay)]
    flags += ["--ema.sigma-rels", "0.05", "0.1", "--ema.snapshot-every-steps", "2"]
    assert cli.parse(TrainConfig, "train", flags).ema == ema


def test_other_profiles_are_refused_in_the_same_folder(make_config: MakeConfig) -> None:
    train(make_config(num_steps=1, ema=POWERS))
    other = EMAConfig(decay=None, sigma_rels=(0.05, 0.15))
    message = r"checkpoint has averages of sigma_rel 0.05, sigma_rel 0.1, the settings are for"
    with pytest.raises(ValueError, match=message):
        train(make_config(num_steps=2, ema=other))


def test_a_checkpoint_with_a_single_average_resumes(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = train(make_config(out=str(tmp_path / "whole")))
    run = train(make_config(num_steps=5)).parent
    checkpoint = run / "checkpoints" / "step-00000005"
    record = json.loads((checkpoint / "state.json").read_text())
    for name in ("sigma_rels", "snapshot_every_steps", "snapshot_dtype"):
        del record["settings"]["ema"][name]
    record["sha256"] = hash_state(record)
    (checkpoint / "state.json").write_text(json.dumps(record, indent=1) + "\n")
    assert different(network(train(make_config())), network(whole)) == []


def test_another_width_is_synthesised_after_the_run(make_config: MakeConfig) -> None:
    ema = EMAConfig(
        decay=None, sigma_rels=(0.05, 0.1), snapshot_every_steps=2, snapshot_dtype="float32"
    )
    bundle = train(make_config(num_steps=30, ema=ema))
    out, mixture = synthesise(bundle.parent, 0.05)
    ours, theirs = network(out), network(bundle)
    for name, tensor in theirs.items():  # what the run kept itself
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    assert mixture.error < 1e-6
    out, mixture = synthesise(bundle.parent, 0.15)
    assert 0 < mixture.error < 0.1
    assert read_info(out)["step"] == 30
    assert different(network(out), theirs) != []


def test_a_snapshot_of_a_run_of_another_seed_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    mine = train(make_config(ema=POWERS)).parent
    other = train(make_config(ema=POWERS, seed=1, out=str(tmp_path / "other"))).parent
    stray = "snapshots/step-00000004"
    shutil.rmtree(mine / stray)
    shutil.copytree(other / stray, mine / stray)
    with pytest.raises(ValueError, match=r"snapshot of another run: seed is 1, in the bundle 0"):
        synthesise(mine, 0.1)


def test_a_snapshot_of_a_wider_network_is_refused(make_config: MakeConfig) -> None:
    run = train(make_config(ema=POWERS)).parent
    path = find_folders(run / "snapshots")[0] / "sigma_rel-0.05.safetensors"
    save_file({n: t.repeat(2, *[1] * (t.ndim - 1)) for n, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"snapshot of another network: the shape of"):
        synthesise(run, 0.1)
