"""The validation loss: fixed examples, any number of processes, no effect on training."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.shards.order import USES, mixed_seed
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Manifest
from latent_t2i.train import loop, validation
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import PreviewConfig, TrainConfig, ValidationConfig
from latent_t2i.train.draws import Draws
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from latent_t2i.train.setup import Run, start
from latent_t2i.train.validation import Validation, measure
from tests import shard_sets, tiny
from tests.train import process_groups
from tests.train.conftest import MakeConfig
from tests.train.test_train_buckets import make_buckets
from tests.train.test_train_loop import assert_same_weights, metrics

Objective = Callable[[torch.nn.Module, Batch, Draws], torch.Tensor]


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 11 records that differ from the training set's."""
    folder = tmp_path_factory.mktemp("held-out") / "val"
    return tiny.make_shards(folder, sizes=(7, 4), first_seed=50)


@pytest.fixture
def validated(make_config: MakeConfig, held_out: Path) -> Any:
    """Makes the settings of a run that is validated every third step, by default on 9 records.

    `val` replaces settings of the validation, other keywords those of the run.
    """

    def make(val: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        values = {"shards": str(held_out), "every_steps": 3, "num_examples": 9, "batch_size": 4}
        return make_config(validation=ValidationConfig(**(values | (val or {}))), **changes)

    return make


def validation_of(config: TrainConfig) -> Validation:
    """Returns the validation examples of a run."""
    found = validate(config, 1).validation
    assert found is not None
    return found


def measure_now(
    run: Run,
    objective: Objective | None = None,
    accelerator: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    """Returns the validation loss of a run; `changes` replace fields of its Validation."""
    assert run.plan.validation is not None
    validation = replace(run.plan.validation, **changes)
    accelerator = accelerator or run.accelerator
    state = run.state
    return measure(validation, accelerator, state.unet, state.ema, objective or run.objective)


def validation_lines(folder: str | Path | None) -> list[dict[str, Any]]:
    """Returns the validation lines of metrics.jsonl."""
    return [line for line in metrics(folder) if "validation" in line]


def test_the_loss_is_measured_at_the_interval_and_at_the_end(validated: Any) -> None:
    config = validated()
    train(config)
    lines = metrics(config.out)
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 10]
    found = validation_lines(config.out)[-1]["validation"]
    assert (found["num_examples"], found["weights"]) == (9, "ema")
    assert 0.3 < found["loss"] < 3
    train(config)  # finished: nothing is measured again
    assert metrics(config.out) == lines


def test_validation_and_previews_do_not_change_training(
    validated: Any, make_config: MakeConfig, tmp_path: Path
) -> None:
    model = replace(make_config().model, dropout=0.3)
    plain = train(make_config(out=str(tmp_path / "plain"), model=model))
    preview = PreviewConfig(every_steps=4, prompts=("red",), num_steps=2)
    watched = train(validated(model=model, preview=preview))
    assert_same_weights(watched, plain)
    for name in ("unet", "ema", "optimizer"):
        file = Path("checkpoints") / "step-00000010" / f"{name}.safetensors"
        one, other = (load_file(bundle.parent / file) for bundle in (watched, plain))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(
    validated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validated({"every_steps": 1})
    take, count = loop.accumulate_gradients, iter(range(10**6))

    def crash(run: Run, batch: Batch) -> torch.Tensor:
        if next(count) == 8:  # two steps after the checkpoint
            raise KeyboardInterrupt
        return take(run, batch)

    monkeypatch.setattr(loop, "accumulate_gradients", crash)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert validation_lines(config.out)[-1]["step"] == 8
    train(config)
    train(replace(config, out=str(tmp_path / "whole")))
    assert len(validation_lines(config.out)) == 10
    assert validation_lines(config.out) == validation_lines(tmp_path / "whole")


def test_the_examples_are_fixed_and_their_timesteps_stratified(validated: Any) -> None:
    one, other = (
        validation_of(validated({"num_examples": 8, "batch_size": size})) for size in (3, 8)
    )
    parts = [examples(one, positions) for positions in one.batches()]
    (whole,) = (examples(other, positions) for positions in other.batches())
    assert [len(part["latent"]) for part in parts] == [3, 3, 2]
    for name, expected in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), expected), name
    assert (whole["timesteps"] * 8 // 1000).sort().values.tolist() == list(range(8))
    assert not whole["drop"].any()
    assert not torch.equal(whole["noise"], whole["posterior_noise"])
    reseeded = validation_of(validated({"num_examples": 8}, seed=1))
    assert not torch.equal(examples(reseeded, range(8))["noise"], whole["noise"])
    # Offset noise is part of training only, and its first noise differs from the validation's.
    config = validated({"num_examples": 8}, objective=ObjectiveConfig(offset_noise=0.5))
    assert torch.equal(examples(validation_of(config), range(8))["noise"], whole["noise"])
    training = start(config).objective.draw(other.batch(range(8)))
    assert abs((training.noise * whole["noise"]).mean()) < 0.1


def examples(validation: Validation, positions: range) -> dict[str, torch.Tensor]:
    """The records and random numbers of a batch."""
    batch = validation.batch(positions)
    return batch.gathered | {"positions": batch.positions} | vars(validation.draw(positions, batch))


def test_the_ema_weights_are_measured_and_the_live_ones_restored(validated: Any) -> None:
    run = start(validated({"num_examples": 11}))
    before = measure_now(run)
    for parameter in run.state.unet.parameters():
        parameter.data.add_(1.0)
    kept = {name: p.detach().clone() for name, p in run.state.unet.named_parameters()}
    addresses = [p.data_ptr() for p in run.state.unet.parameters()]
    average = {name: tensor.clone() for name, tensor in run.state.ema.average.items()}
    assert measure_now(run) == before
    assert run.state.unet.training
    assert all(torch.equal(p, kept[name]) for name, p in run.state.unet.named_parameters())
    assert all(torch.equal(t, average[name]) for name, t in run.state.ema.average.items())
    assert [p.data_ptr() for p in run.state.unet.parameters()] == addresses
    next(iter(run.state.ema.average.values())).add_(1.0)
    assert measure_now(run)["loss"] != before["loss"]


def test_the_live_weights_are_restored_after_an_error(validated: Any) -> None:
    run = start(validated())
    with torch.no_grad():
        run.state.unet.conv_in.weight.add_(1.0)
    kept = run.state.unet.conv_in.weight.detach().clone()

    def objective(model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        assert not model.training
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        measure_now(run, objective)
    assert torch.equal(run.state.unet.conv_in.weight, kept)
    assert run.state.unet.training


def test_quarters_are_means_over_their_timesteps(validated: Any) -> None:
    run = start(validated({"num_examples": 3}))
    found = measure_now(
        run,
        lambda model, batch, draws: draws.timesteps.float() + 1,
        Accelerator(cpu=True),
        timesteps=torch.tensor([0, 249, 750]),
    )
    assert found["loss_by_quarter"] == {"t1of4": 125.5, "t2of4": None, "t3of4": None, "t4of4": 751}
    assert found["loss"] == pytest.approx((1 + 250 + 751) / 3)


def test_processes_share_the_examples(validated: Any) -> None:
    run = start(validated())
    seen: list[torch.Tensor] = []
    counts = []

    class Process:
        """The accelerator of one of two processes; the second one gets the sum of both."""

        device, num_processes, autocast = torch.device("cpu"), 2, run.accelerator.autocast

        def __init__(self, rank: int) -> None:
            self.process_index = rank

        def reduce(self, losses: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            seen.append(losses)
            return sum(seen[1:], seen[0])

    def objective(model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        counts.append(len(batch))
        return run.objective(model, batch, draws)

    found = [measure_now(run, objective, Process(rank)) for rank in range(2)]
    assert found[1] == measure_now(run)
    assert sorted(counts) == [1, 4, 4]


@pytest.mark.slow
def test_two_processes_measure_the_loss_of_one(
    validated: Any, tmp_path: Path, forks: ForkServerContext
) -> None:
    train(validated(out=str(tmp_path / "one")))
    process_groups.finish(process_groups.start(forks, validated(), num_processes=2))
    one, two = (validation_lines(tmp_path / name) for name in ("one", "run"))
    assert [line["step"] for line in two] == [3, 6, 9, 10]
    for first, second in zip(one, two, strict=True):
        assert second["validation"]["loss"] == pytest.approx(first["validation"]["loss"], rel=1e-5)


def test_a_bucketed_set_is_measured_bucket_by_bucket(
    validated: Any, shards: Path, tmp_path: Path
) -> None:
    training = make_buckets(tmp_path / "t", {"32x96": (3,), "64x64": (10,)}, shards)
    val = make_buckets(tmp_path / "v", {"64x64": (6,), "32x96": (5,)}, shards)  # of other seeds
    config = validated({"shards": str(val)}, shards=str(training))
    found = validation_of(config)
    shapes = [examples(found, positions)["noise"].shape[-2:] for positions in found.batches()]
    assert set(shapes) == {(12, 4), (8, 8)}
    assert sum(map(len, found.batches())) == 9
    assert np.isfinite(measure_now(start(config))["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vae", "vae"),
        ("text_dtype", "text_dtype: expected float16 as in the training set, found int8"),
        ("tokenizer", r"tokenizer\.sha256: expected \w+ as in the training set, found 000"),
        ("shape", r"validation\.shards: .* expected latents of .* found .*12, 4"),
    ],
)
def test_a_set_that_does_not_match_the_training_set_is_refused(
    validated: Any, shards: Path, tmp_path: Path, change: str, message: str
) -> None:
    folder = tmp_path / "other"
    if change == "shape":
        make_buckets(folder, {"32x96": (5,)}, shards)
    elif change == "vae":
        tiny.make_shards(folder, sizes=(4,), first_seed=50, vae=tiny.vae_folder("flux"))
    elif change == "text_dtype":
        tiny.make_shards(folder, sizes=(4,), first_seed=50, text_dtype="int8")
    else:
        manifest = Manifest.load(tiny.make_shards(folder, sizes=(4,), first_seed=50))
        tokenizer = replace(manifest.tokenizer, sha256="0" * 64)
        (folder / "manifest.json").write_text(replace(manifest, tokenizer=tokenizer).dump())
    with pytest.raises(ValueError, match=message):
        validate(validated({"shards": str(folder)}), 1)


@pytest.fixture
def make_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes ten records with the keys of the training set and the hashes of other images."""
    make = shard_sets.make_examples

    def make_set(name: str, first_image: int | None) -> Path:
        def hashed(*args: Any, **settings: Any) -> Any:
            images = itertools.count(first_image)
            return [
                replace(example, meta={"image_sha256": f"{next(images):064x}", **example.meta})
                for example in make(*args, **settings)
            ]

        monkeypatch.setattr(shard_sets, "make_examples", make if first_image is None else hashed)
        return tiny.make_shards(tmp_path / name, sizes=(10,))

    return make_set


def test_images_of_the_training_set_are_refused(
    validated: Any, make_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are not compared by key, because folders may number their images alike."""

    def check(val: Path) -> str:
        return validate(validated({"shards": str(val)}, shards=str(training)), 1).notes[-1]

    training, others, overlapping = (
        make_set(name, first) for name, first in (("train", 0), ("val", 10), ("overlap", 9))
    )
    ours, theirs = (open_shards(folder).keys(np.arange(10)) for folder in (training, others))
    assert ours == theirs
    assert check(others).endswith("no image is in all of the training records")
    message = rf"the image of record {ours[0]} is that of its record {ours[9]}$"
    with pytest.raises(ValueError, match=message):
        check(overlapping)
    monkeypatch.setattr(validation, "MAX_HASHES_READ", 5)  # not record 9
    assert check(overlapping).endswith("no image is in every 2th of the training records")


def test_sets_without_hashes_of_images_are_not_compared(
    validated: Any, make_set: Callable[..., Path]
) -> None:
    old, new = make_set("old", None), make_set("new", 0)
    for training, val in ((old, new), (new, old), (old, old)):
        (*_, note) = validate(validated({"shards": str(val)}, shards=str(training)), 1).notes
        assert "not compared with the training set: a set of format 2 has no image hashes" in note


def test_a_missing_set_is_reported_and_a_wrong_location_refused(
    make_config: MakeConfig, validated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("latent_t2i.train.preflight.output_root", lambda: tmp_path)
    assert "no validation set (validation.shards)" in validate(make_config(), 1).notes[-1]
    usual = tmp_path / "shards" / "data" / "tiny" / "val"
    usual.mkdir(parents=True)
    assert validate(make_config(), 1).notes[-1].endswith(f"--validation.shards {usual}")
    for location, message in (
        ("nowhere", "validation.shards: .* 'nowhere'"),
        ("https://host/val", "expected a local folder, found 'https://host/val'"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(validated({"shards": location}), 1)


def test_seeds_of_other_uses_do_not_change() -> None:
    assert USES[:5] == ("order", "draws", "dropout", "choice", "buckets")
    assert mixed_seed(0, "draws", 1) != mixed_seed(0, "validation", 1)


def test_a_loss_that_is_not_finite_is_none(validated: Any) -> None:
    run = start(validated({"num_examples": 3}))
    next(iter(run.state.ema.average.values())).fill_(torch.nan)
    found = measure_now(run)
    assert found["loss"] is None
    assert set(found["loss_by_quarter"].values()) == {None}


def test_images_of_all_training_sets_are_compared(
    validated: Any, make_set: Callable[..., Path]
) -> None:
    """Of several sets, those without hashes are left out."""
    names = {"first": 0, "second": 20, "old": None, "val": 40, "overlap": 25}
    first, second, old, val, overlap = (make_set(name, image) for name, image in names.items())

    def check(val: Path, *training: Path) -> str:
        locations = tuple(map(str, training))
        return validate(validated({"shards": str(val)}, shards=locations), 1).notes[-1]

    assert check(val, first, second).endswith("no image is in all of the training records")
    left_out = "of 1 sets; 1 sets, which are remote or have no image hashes, were not compared"
    assert check(val, old, second).endswith(left_out)
    for training in ((first, second), (old, second)):
        with pytest.raises(ValueError, match=r"the image of record .* is that of its record"):
            check(overlap, *training)
