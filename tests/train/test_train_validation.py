"""The loss on held-out records: fixed, divided over processes, without a trace in training."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from latent_t2i.shards.order import USES, mixed_seed
from latent_t2i.shards.reader import open_shards
from latent_t2i.train import loop
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import TrainConfig, ValidationConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from latent_t2i.train.setup import Run, start
from latent_t2i.train.validation import Validation, measure
from tests import shard_sets, tiny
from tests.train.conftest import MakeConfig
from tests.train.test_train_buckets import make_buckets
from tests.train.test_train_launch import SCRIPT, TIMEOUT_S, environment, flags
from tests.train.test_train_loop import assert_same_weights, metrics


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 11 records of other noise than the training set's."""
    folder = tmp_path_factory.mktemp("held-out") / "val"
    tiny.make_shards(folder, sizes=(7, 4), first_seed=50)
    return folder


@pytest.fixture
def validated(make_config: MakeConfig, held_out: Path) -> Any:
    """Makes the settings of a run that measures itself every third step."""

    def make(num_examples: int = 9, batch_size: int = 4, **changes: Any) -> TrainConfig:
        validation = ValidationConfig(
            shards=str(held_out), every_steps=3, num_examples=num_examples, batch_size=batch_size
        )
        return make_config(validation=validation, **changes)

    return make


def validation_of(config: TrainConfig) -> Validation:
    """The examples that a run measures on."""
    found = validate(config, 1).validation
    assert found is not None
    return found


def measure_now(run: Run) -> dict[str, Any]:
    """The validation loss of a run as it stands."""
    assert run.plan.validation is not None
    state = run.state
    return measure(run.plan.validation, run.accelerator, state.unet, state.ema, run.objective)


def lines_of(folder: str | Path | None) -> list[dict[str, Any]]:
    """The validation's lines of metrics.jsonl."""
    return [line for line in metrics(folder) if "validation" in line]


def test_the_loss_is_measured_at_the_interval_and_at_the_end(validated: Any) -> None:
    config = validated()
    train(config)
    lines = metrics(config.out)
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 10]
    found = lines_of(config.out)[-1]["validation"]
    assert (found["num_examples"], found["weights"]) == (9, "ema")
    assert 0.3 < found["loss"] < 3
    train(config)  # is over: nothing is measured again
    assert metrics(config.out) == lines


def test_validation_leaves_no_trace_in_training(
    validated: Any, make_config: MakeConfig, tmp_path: Path
) -> None:
    model = replace(make_config().model, dropout=0.3)
    config = validated(model=model)
    plain = train(make_config(out=str(tmp_path / "plain"), model=model))
    assert_same_weights(train(config), plain)
    ours, theirs = (
        Path(folder) / "checkpoints" / "step-00000010" for folder in (str(config.out), plain.parent)
    )
    for name in ("unet", "ema", "optimizer"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (ours, theirs))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_resumed_run_writes_the_lines_of_one_that_never_stopped(
    validated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validated(out=str(tmp_path / "whole"))
    config = validated()
    take, count = loop.accumulate_gradients, iter(range(10**6))

    def crash(run: Run, batch: Batch) -> torch.Tensor:
        if next(count) == 8:  # two steps after the checkpoint of step 6, one after that of step 7
            raise KeyboardInterrupt
        return take(run, batch)

    monkeypatch.setattr(loop, "accumulate_gradients", crash)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, validation=replace(config.validation, every_steps=1)))
    assert lines_of(config.out)[-1]["step"] == 8
    with_all = replace(config, validation=replace(config.validation, every_steps=1))
    train(with_all)
    train(replace(whole, validation=with_all.validation))
    assert len(lines_of(config.out)) == 10
    assert lines_of(config.out) == lines_of(whole.out)


def test_the_examples_are_fixed_and_their_timesteps_spread_evenly(validated: Any) -> None:
    one, other = (validation_of(validated(num_examples=8, batch_size=n)) for n in (3, 8))
    first = [one.batch(places) for places in one.pieces()]
    (second,) = (other.batch(places) for places in other.pieces())
    assert [len(batch) for batch in first] == [3, 3, 2]
    for name in ("latent", "text", "tokens", "timesteps", "posterior_noise", "noise", "drop"):
        together = torch.cat([getattr(batch, name) for batch in first])
        assert torch.equal(together, getattr(second, name)), name
    eighths = (second.timesteps * 8 // 1000).sort().values
    assert eighths.tolist() == list(range(8))
    assert not second.drop.any()
    assert not torch.equal(second.noise, second.posterior_noise)
    reseeded = validation_of(validated(num_examples=8, batch_size=8, seed=1))
    assert not torch.equal(reseeded.batch(range(8)).noise, second.noise)


def test_the_averaged_weights_are_measured_and_the_live_ones_come_back(validated: Any) -> None:
    run = start(validated(num_examples=11))
    before = measure_now(run)
    for parameter in run.state.unet.parameters():
        parameter.data.add_(1.0)
    kept = {name: p.detach().clone() for name, p in run.state.unet.named_parameters()}
    places = [p.data_ptr() for p in run.state.unet.parameters()]
    average = {name: tensor.clone() for name, tensor in run.state.ema.average.items()}
    assert measure_now(run) == before
    assert run.state.unet.training
    assert all(torch.equal(p, kept[name]) for name, p in run.state.unet.named_parameters())
    assert all(torch.equal(t, average[name]) for name, t in run.state.ema.average.items())
    assert [p.data_ptr() for p in run.state.unet.parameters()] == places
    next(iter(run.state.ema.average.values())).add_(1.0)
    assert measure_now(run)["loss"] != before["loss"]


def test_the_weights_come_back_where_measuring_breaks_off(validated: Any) -> None:
    run = start(validated())
    with torch.no_grad():
        run.state.unet.conv_in.weight.add_(1.0)
    kept = run.state.unet.conv_in.weight.detach().clone()

    def objective(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        assert not model.training
        raise KeyError("broken")

    assert run.plan.validation is not None
    with pytest.raises(KeyError, match="broken"):
        measure(run.plan.validation, run.accelerator, run.state.unet, run.state.ema, objective)
    assert torch.equal(run.state.unet.conv_in.weight, kept)
    assert run.state.unet.training


def test_quarters_are_means_over_their_timesteps(validated: Any) -> None:
    run = start(validated(num_examples=3))
    assert run.plan.validation is not None
    validation = replace(run.plan.validation, timesteps=torch.tensor([0, 249, 750]))

    def objective(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return batch.timesteps.float() + 1

    found = measure(validation, Accelerator(cpu=True), run.state.unet, run.state.ema, objective)
    assert found["loss_by_quarter"] == {"t1of4": 125.5, "t2of4": None, "t3of4": None, "t4of4": 751}
    assert found["loss"] == pytest.approx((1 + 250 + 751) / 3)


def test_processes_share_the_examples(validated: Any) -> None:
    run = start(validated())
    validation = run.plan.validation
    assert validation is not None
    whole = measure_now(run)
    seen: list[torch.Tensor] = []
    counts = []

    class Part:
        """Stands for an accelerator of one of two processes."""

        device, num_processes, autocast = torch.device("cpu"), 2, run.accelerator.autocast

        def __init__(self, rank: int) -> None:
            self.process_index = rank

        def reduce(self, losses: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            seen.append(losses)
            return sum(seen[1:], seen[0])

    def objective(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        counts.append(len(batch))
        return run.objective(model, batch)

    for rank in range(2):
        found = measure(validation, Part(rank), run.state.unet, run.state.ema, objective)  # type: ignore[arg-type]
    assert found == whole
    assert sorted(counts) == [1, 4, 4]


@pytest.mark.slow
def test_two_processes_measure_the_loss_of_one(
    validated: Any, held_out: Path, tmp_path: Path, elsewhere: Path
) -> None:
    train(validated(out=str(tmp_path / "one")))
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    asked = ["--validation.shards", str(held_out), "--validation.every-steps", "3"]
    asked += ["--validation.num-examples", "9", "--validation.batch-size", "4"]
    subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *flags(validated()), *asked],
        env=environment(ACCELERATE_USE_CPU="1"),
        cwd=elsewhere,
        check=True,
        timeout=TIMEOUT_S,
        stderr=subprocess.DEVNULL,
    )
    one, two = (lines_of(tmp_path / name) for name in ("one", "run"))
    assert [line["step"] for line in two] == [3, 6, 9, 10]
    for first, second in zip(one, two, strict=True):
        assert second["validation"]["loss"] == pytest.approx(first["validation"]["loss"], rel=1e-5)


def test_a_bucketed_set_is_measured_bucket_by_bucket(
    validated: Any, shards: Path, tmp_path: Path
) -> None:
    training = make_buckets(tmp_path / "t", {"32x96": (3,), "64x64": (10,)}, shards)
    val = make_buckets(tmp_path / "v", {"64x64": (6,), "32x96": (5,)}, shards)  # of other seeds
    config = validated(shards=str(training))
    config = replace(config, validation=replace(config.validation, shards=str(val)))
    found = validation_of(config)
    shapes = [found.batch(places).noise.shape[-2:] for places in found.pieces()]
    assert set(shapes) == {(12, 4), (8, 8)}
    assert sum(len(places) for places in found.pieces()) == 9
    assert np.isfinite(measure_now(start(config))["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": "flux"}, "vae"),
        ({"text_dtype": "int8"}, "text_dtype: expected float16 as in the training set, found int8"),
    ],
)
def test_a_set_of_other_encoders_or_types_is_refused(
    validated: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if "vae" in change:
        change = {"vae": tiny.vae_folder(change["vae"])}
    other = tiny.make_shards(tmp_path / "other", sizes=(4,), first_seed=50, **change)
    config = validated()
    config = replace(config, validation=replace(config.validation, shards=str(other)))
    with pytest.raises(ValueError, match=message):
        validate(config, 1)


def test_a_set_of_other_shapes_is_refused(validated: Any, shards: Path, tmp_path: Path) -> None:
    other = make_buckets(tmp_path / "v", {"32x96": (5,)}, shards)
    config = validated()
    config = replace(config, validation=replace(config.validation, shards=str(other)))
    with pytest.raises(ValueError, match=r"validation\.shards: .* latents of .*12, 4"):
        validate(config, 1)


def test_records_of_the_training_set_are_refused_but_not_their_names(
    validated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = shard_sets.make_examples

    def make_set(name: str, sign: int) -> Path:
        """Ten records whose log-variances, as real ones, are large and much alike."""

        def signed(*args: Any, **settings: Any) -> Any:
            examples = make(*args, **settings)
            for example in examples:
                example.latent[:, : shard_sets.CHANNELS] *= sign
                example.latent[:, shard_sets.CHANNELS :] = -60
            return examples

        monkeypatch.setattr(shard_sets, "make_examples", signed)
        return tiny.make_shards(tmp_path / name, sizes=(10,))

    def check(val: Path) -> str:
        config = validated(shards=str(training))
        config = replace(config, validation=replace(config.validation, shards=str(val)))
        return validate(config, 1).notes[-1]

    training, same_names = make_set("train", 1), make_set("val", -1)
    ours, theirs = (open_shards(folder).keys(np.arange(10)) for folder in (training, same_names))
    assert ours == theirs
    assert check(same_names).endswith("none of the training set is among them")
    with pytest.raises(ValueError, match=r"record 00-3-\d+ is in the training set too"):
        check(make_set("copy", 1))


def test_no_set_is_said_and_a_wrong_place_refused(
    make_config: MakeConfig, validated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("latent_t2i.train.preflight.output_root", lambda: tmp_path)
    assert "no validation set (validation.shards)" in validate(make_config(), 1).notes[-1]
    (tmp_path / "shards" / "data" / "tiny" / "val").mkdir(parents=True)
    assert validate(make_config(), 1).notes[-1].endswith("tiny/val is there to be named")
    for place, message in (
        ("nowhere", "validation.shards: the folder 'nowhere'"),
        ("https://host/val", "expected a folder on this machine, found 'https://host/val'"),
    ):
        config = validated()
        config = replace(config, validation=replace(config.validation, shards=place))
        with pytest.raises(ValueError, match=message):
            validate(config, 1)


@pytest.mark.parametrize("name", ["every_steps", "num_examples", "batch_size"])
def test_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=rf"validation\.{name}: expected 1 or more, found 0"):
        ValidationConfig(**{name: 0})


def test_seeds_of_other_uses_are_what_they_were() -> None:
    assert USES[:5] == ("order", "draws", "dropout", "choice", "buckets")
    assert mixed_seed(0, "draws", 1) != mixed_seed(0, "validation", 1)


def test_a_loss_that_is_not_finite_is_none(validated: Any) -> None:
    run = start(validated(num_examples=3))
    next(iter(run.state.ema.average.values())).fill_(torch.nan)
    found = measure_now(run)
    assert found["loss"] is None
    assert set(found["loss_by_quarter"].values()) == {None}
