"""Whole runs in this process: what they write, how they end and how they resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

from latent_t2i.configs import cli
from latent_t2i.model.bundle import read_info
from latent_t2i.train import setup
from latent_t2i.train.config import OptimConfig, TrainConfig
from latent_t2i.train.loop import train
from tests import tiny
from tests.train.conftest import (
    MakeConfig,
    assert_close_metrics,
    assert_same_weights,
    losses,
    metrics,
    skipped_lines,
    weights,
)


def test_a_run_writes_a_stock_pipeline_and_its_metrics(make_config: MakeConfig) -> None:
    config = make_config()
    bundle = train(config)
    assert bundle == Path(str(config.out)) / "bundle"
    lines = [
        json.loads(line) for line in (bundle.parent / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert lines[-1]["epoch"] == pytest.approx(10 * 4 / 24)
    assert sum(lines[0]["time_breakdown"].values()) == pytest.approx(1.0)
    checkpoints = sorted(p.name for p in (bundle.parent / "checkpoints").iterdir())
    assert checkpoints == ["step-00000009", "step-00000010"]
    info = read_info(bundle)
    assert (info["step"], info["metrics"]) == (10, lines[-1])
    assert info["config"]["optim"]["learning_rate"] == config.optim.learning_rate
    pipeline = StableDiffusionPipeline.from_pretrained(bundle)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("red", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    assert pipeline.tokenizer.model_max_length == 7


def test_the_loss_falls(make_config: MakeConfig) -> None:
    config = make_config(
        num_steps=60, log_every_steps=20, optim=OptimConfig(learning_rate=1e-2, warmup_steps=5)
    )
    train(config)
    assert losses(config.out)[-1] < 0.9 * losses(config.out)[0]


def test_the_saved_config_is_a_preset_of_the_same_run(make_config: MakeConfig) -> None:
    config = make_config(num_steps=1)
    train(config)
    kept = Path(str(config.out)) / "config.json"
    assert cli.parse(TrainConfig, "train", ["--config", str(kept)]) == config


def test_a_crashed_run_resumes_from_its_last_checkpoint(
    make_config: MakeConfig, on_step: Any, tmp_path: Path
) -> None:
    def crash() -> None:
        raise OSError("disk gone")

    changes = {"num_steps": 8, "checkpoint_every_steps": 5, "log_every_steps": 3}
    changes["model"] = replace(make_config().model, dropout=0.3)
    whole = train(make_config(out=str(tmp_path / "whole"), **changes))
    on_step(7, crash)
    with pytest.raises(OSError, match="disk gone"):
        train(make_config(**changes))
    assert_same_weights(train(make_config(**changes)), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_finished_run_resumes_with_more_steps(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(make_config(out=str(tmp_path / "whole")))
    train(make_config(num_steps=5))
    assert_same_weights(train(make_config()), whole)
    assert "num_steps changed from 5 to 10" in capsys.readouterr().err


def test_another_model_or_other_shards_are_refused_in_the_same_folder(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config(num_steps=1))
    wider = replace(make_config().model, channels=(16,))
    with pytest.raises(ValueError, match=r"model.channels: .* has \[8\], found \[16\]"):
        train(make_config(num_steps=2, model=wider))

    other = tiny.make_shards(tmp_path / "other", sizes=(9,))
    with pytest.raises(ValueError, match=r"shards_sha256: the run in .* has"):
        train(make_config(num_steps=2, shards=str(other)))


def test_a_used_up_budget_ends_the_run_with_a_bundle(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(num_steps=10**6, max_train_s=0.5)
    bundle = train(config)
    info = read_info(bundle)
    assert 0 < info["step"] < 1000
    assert 0.5 <= info["train_seconds"] < 5
    train(config)
    assert f"finished at step {info['step']} (time budget used up)" in capsys.readouterr().err


def test_micro_batches_add_up_to_the_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config())
    train(make_config(out=str(tmp_path / "micro"), micro_batch_size=1))
    assert_close_metrics(tmp_path / "micro", tmp_path / "run", rel=1e-5)


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"channels_last": True}])
def test_other_arithmetic_gives_nearly_the_same_losses(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(make_config())
    AcceleratorState._reset_state(True)
    train(make_config(out=str(tmp_path / "other"), **changes))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), rel=0.01)


def test_fp16_without_a_gpu_falls_back_with_one_warning(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(make_config())
    capsys.readouterr()
    fp16 = train(make_config(out=str(tmp_path / "fp16"), mixed_precision="fp16"))
    assert capsys.readouterr().err.count("fp16 needs a GPU") == 1
    assert_same_weights(whole, fp16)


def test_bf16_on_a_cpu_that_emulates_it_falls_back_with_one_warning(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = train(make_config(num_steps=2))
    monkeypatch.setattr(setup, "multiplies_bf16", lambda: False)
    capsys.readouterr()
    bf16 = train(make_config(num_steps=2, out=str(tmp_path / "bf16"), mixed_precision="bf16"))
    assert capsys.readouterr().err.count("bf16 needs bfloat16 instructions") == 1
    assert_same_weights(whole, bf16)


def test_non_finite_steps_are_skipped_counted_and_named(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make_shards(tmp_path / "bad")
    tiny.plant_nan(folder, shard=1, records=[3])
    config = make_config(shards=str(folder))
    bundle = train(config)
    # In two epochs.
    assert skipped_lines(capsys) == [
        f"step {step}: skipped, not finite; records: 01-3-000003" for step in (1, 9)
    ]
    assert metrics(config.out)[-1]["skipped"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(bundle).values())


def test_a_run_of_skipped_steps_stops_and_names_the_records(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = tiny.make_shards(tmp_path / "bad", sizes=(3,))
    tiny.plant_nan(folder, shard=0, records=[0, 1, 2])
    message = r"steps 0 to 3: 4 steps in a row had .* \(max_bad_steps: 3\).*00-3-00000"
    with pytest.raises(ValueError, match=message):
        train(make_config(shards=str(folder), max_bad_steps=3))


def test_a_wrong_setting_gives_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--name", "nobody", "--num-steps", "3"])
    with pytest.raises(SystemExit) as exit_:
        cli.main(train, TrainConfig, "train")
    assert exit_.value.code == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if not s.startswith("warning")]
    assert line.startswith("error: shards: the folder")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's compiler
def test_a_compiled_denoiser_gives_nearly_the_same_losses(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    train(make_config())
    train(make_config(out=str(tmp_path / "other"), compile=True))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), rel=1e-3)
