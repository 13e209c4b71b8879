"""Training on a bucketed set: batches of several shapes; resuming and several processes."""

from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from latent_t2i.shards.buckets import BucketedShards
from latent_t2i.shards.schema import Manifest, Provenance
from latent_t2i.train.batches import Batch, BatchSource
from latent_t2i.train.config import DataConfig, TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import count_steps, validate
from latent_t2i.train.setup import make_objective, make_source
from tests import shard_sets, tiny
from tests.servers import serve
from tests.train import process_groups
from tests.train.conftest import (
    MakeConfig,
    assert_close_metrics,
    assert_same_batch,
    assert_same_weights,
    join,
    metrics,
    skipped_lines,
)

SIZES = {"32x96": (3,), "64x64": (10, 4), "96x32": (9,)}


def make_buckets(folder: Path, sizes: dict[str, tuple[int, ...]], like: Path) -> Path:
    """Writes buckets of noise made with the encoders of a plain set."""
    manifest = Manifest.load(like)
    provenance = Provenance(
        **{name: getattr(manifest, name) for name in Provenance.__dataclass_fields__}
    )
    shard_sets.write_buckets(folder, sizes, provenance)
    return folder


@pytest.fixture(scope="module")
def bucketed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 records of noise in three buckets, one of them smaller than a batch."""
    return make_buckets(tmp_path_factory.mktemp("bucketed") / "train", SIZES, shards)


def source_of(config: TrainConfig, num_processes: int = 1, rank: int = 0) -> BatchSource:
    """A process's source of batches."""
    process: Any = SimpleNamespace(
        process_index=rank, num_processes=num_processes, device=torch.device("cpu")
    )
    return make_source(validate(config, num_processes), process)


def copies(source: BatchSource, start: int, stop: int) -> list[Batch]:
    """Prefetched batches, cloned."""
    return [batch.map(torch.clone) for batch in source.batches(start, stop)]


def test_batches_and_noise_have_the_shape_of_their_bucket(
    make_config: MakeConfig, bucketed: Path
) -> None:
    config = make_config(shards=str(bucketed))
    source = source_of(config)
    objective = make_objective(validate(config, 1), torch.device("cpu"))
    found = copies(source, 0, 14)
    noises = [objective.draw(batch).noise for batch in found]
    assert {noise.shape for noise in noises} == {(4, 4, 8, 8), (4, 4, 12, 4), (4, 4, 4, 12)}
    for step, (batch, noise) in enumerate(zip(found, noises, strict=True)):
        assert batch.latent.shape[-2:] == noise.shape[-2:]
        assert batch.positions.tolist() == [[step, position] for position in range(4)]
        assert_same_batch(batch, source.batch(step))
    for first, second in pairwise(noises):
        assert not torch.equal(first.flatten()[:9], second.flatten()[:9])


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_divide_the_same_batches(
    make_config: MakeConfig, bucketed: Path, num_processes: int
) -> None:
    config = make_config(shards=str(bucketed))
    whole = copies(source_of(config), 0, 14)
    shares = [
        copies(source_of(config, num_processes, rank), 0, 14) for rank in range(num_processes)
    ]
    for step, batch in enumerate(whole):
        assert_same_batch(join(share[step] for share in shares), batch)


def test_a_run_reports_its_buckets_and_writes_a_stock_pipeline(
    make_config: MakeConfig, bucketed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = train(make_config(shards=str(bucketed)))
    stderr = capsys.readouterr().err
    for line in (
        "3 buckets of 26 records: 8 batches of 4 in the first epoch, each from one bucket",
        "bucket 32x96: 3 records, less than a batch, one every 1.33 epochs with repeated records",
        "bucket 64x64: 14 records, 3.5 batches per epoch",
        "bucket 96x32: 9 records, 2.25 batches per epoch",
    ):
        assert line in stderr
    lines = metrics(bundle.parent)
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert lines[1]["epoch"] == 1
    pipeline = StableDiffusionPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("red", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    tall = pipeline("red", height=96, width=32, num_inference_steps=2, output_type="np").images
    assert tall.shape == (1, 96, 32, 3)


def test_without_a_square_bucket_images_have_the_most_frequent_size(
    make_config: MakeConfig, shards: Path, tmp_path: Path
) -> None:
    folder = make_buckets(tmp_path / "set", {"32x96": (2,), "96x32": (9,)}, shards)
    bundle = train(make_config(shards=str(folder), num_steps=1))
    pipeline = StableDiffusionPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("red", num_inference_steps=1, output_type="np").images
    assert drawn.shape == (1, 32, 96, 3)


def test_a_resumed_run_equals_an_uninterrupted_one(
    make_config: MakeConfig, bucketed: Path, tmp_path: Path
) -> None:
    whole = train(make_config(shards=str(bucketed), out=str(tmp_path / "whole")))
    train(make_config(shards=str(bucketed), num_steps=5))
    assert_same_weights(train(make_config(shards=str(bucketed))), whole)
    assert metrics(tmp_path / "run")[-1] == metrics(tmp_path / "whole")[-1]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(
    make_config: MakeConfig, bucketed: Path, tmp_path: Path, forks: ForkServerContext
) -> None:
    train(make_config(shards=str(bucketed), out=str(tmp_path / "one")))
    process_groups.run(forks, make_config(shards=str(bucketed)), num_processes=2)
    assert_close_metrics(tmp_path / "run", tmp_path / "one", rel=1e-5)


def test_micro_batches_add_up_to_the_batch(
    make_config: MakeConfig, bucketed: Path, tmp_path: Path
) -> None:
    train(make_config(shards=str(bucketed)))
    train(make_config(shards=str(bucketed), out=str(tmp_path / "micro"), micro_batch_size=1))
    assert_close_metrics(tmp_path / "micro", tmp_path / "run", rel=1e-5)


def test_a_run_from_a_url_is_the_run_from_the_folder(
    make_config: MakeConfig, bucketed: Path, tmp_path: Path
) -> None:
    train(make_config(shards=str(bucketed)))
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    with serve(bucketed) as server:
        train(make_config(shards=server.url, out=str(tmp_path / "remote"), data=data))
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "run")


def test_other_buckets_are_refused_in_the_same_folder(
    make_config: MakeConfig, bucketed: Path, shards: Path, tmp_path: Path
) -> None:
    train(make_config(shards=str(bucketed), num_steps=1))
    other = make_buckets(tmp_path / "other", SIZES | {"32x96": (4,)}, shards)
    with pytest.raises(ValueError, match=r"shards_sha256: the run in .* has"):
        train(make_config(shards=str(other), num_steps=2))


def test_non_finite_records_are_named(
    make_config: MakeConfig, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_buckets(tmp_path / "set", SIZES, shards)
    tiny.plant_nan(folder / "96x32", shard=0, records=[2])
    train(make_config(shards=str(folder)))
    lines = skipped_lines(capsys)
    assert lines and all(line.endswith("records: 20-3-000002") for line in lines)


def test_epochs_become_steps(make_config: MakeConfig, bucketed: Path) -> None:
    config = make_config(shards=str(bucketed), num_steps=None, num_epochs=4)
    plan = validate(config, num_processes=1)
    assert plan.num_steps == 3 + 14 + 9
    assert isinstance(plan.shards, BucketedShards)
    assert plan.settings["shards_sha256"] == plan.shards.buckets.sha256
    data = DataConfig(last_batch="drop")
    dropped = validate(replace(config, data=data), num_processes=1)
    assert count_steps(config, dropped.order) == 4 * (3 + 2)
    assert dropped.notes[1:3] == (
        "bucket 32x96: 3 records, less than a batch, never visited (data.last_batch drop)",
        "bucket 64x64: 14 records, 3 batches per epoch, 2 records dropped from each",
    )


def test_a_plain_set_reports_no_buckets(make_config: MakeConfig) -> None:
    assert not any("bucket" in note for note in validate(make_config(), num_processes=1).notes)


def test_sides_that_cannot_be_halved_are_refused(
    make_config: MakeConfig, shards: Path, tmp_path: Path
) -> None:
    folder = make_buckets(tmp_path / "set", {"64x64": (4,), "80x48": (4,)}, shards)
    model = make_config().model
    two = replace(model, channels=(8, 8), attention=(True, True))
    validate(make_config(shards=str(folder), model=two), num_processes=1)
    three = replace(model, channels=(8, 8, 8), attention=(True, True, True))
    message = r"latents of 10 x 6; a denoiser of 3 levels .* halves them 2 times, .* of 32 px"
    with pytest.raises(ValueError, match=message):
        validate(make_config(shards=str(folder), model=three), num_processes=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(access="stream"), "is a bucketed set, which cannot be streamed"),
        (
            DataConfig(access="cache", cache_dir="CACHE", cache_bytes=90_000),
            "the cache must hold all 3 buckets of",
        ),
    ],
)
def test_impossible_access_is_refused(
    make_config: MakeConfig, bucketed: Path, tmp_path: Path, data: DataConfig, message: str
) -> None:
    if data.cache_dir:
        data = replace(data, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        validate(make_config(shards=str(bucketed), data=data), num_processes=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_of_any_shape_reach_the_gpu(make_config: MakeConfig, bucketed: Path) -> None:
    source = replace(source_of(make_config(shards=str(bucketed))), pin_memory=True)
    device = torch.device("cuda")
    plain = replace(source, pin_memory=False)
    stream = torch.cuda.current_stream()
    for step, batch in enumerate(source.batches(0, 200, stream=stream)):
        assert batch.latent.is_pinned() and batch.positions.is_pinned()
        assert_same_batch(batch.to(device).map(torch.Tensor.cpu), plain.batch(step))
