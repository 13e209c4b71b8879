"""Training from int8 text: it equals float16 text within the error that the manifest states."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.stage import build
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import FormatError
from latent_t2i.shards.verify import verify
from latent_t2i.train import setup
from latent_t2i.train.config import OptimConfig
from latent_t2i.train.loop import train
from latent_t2i.train.objective import Objective
from latent_t2i.train.preflight import validate
from latent_t2i.train.setup import make_objective
from tests import tiny
from tests.coco_folders import make_coco
from tests.train.conftest import MakeConfig, losses

NUM_IMAGES = 24
LOSS_TOLERANCE = 2e-3
"""Relative difference of a step's loss from that with float16 text."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same noise and captions, through the tiny encoders into shards of either dtype."""
    root = tmp_path_factory.mktemp("sets")
    source = make_coco(root / "coco", [3] * NUM_IMAGES)
    encoders = tiny.encoders()
    for text_dtype in ("float16", "int8"):
        build(
            PipelineConfig(
                name="noise",
                vae=encoders.vae,
                text_encoder=encoders.clip,
                source=SourceConfig(images=str(source.images), captions=str(source.captions)),
                max_tokens=16,
                records_per_shard=10,
                text_dtype=text_dtype,
                out=str(root / text_dtype),
                device="cpu",
            )
        )
    return {name: root / name for name in ("float16", "int8")}


def test_text_after_the_scale_is_within_the_stated_error(folders: dict[str, Path]) -> None:
    """Over the distinct captions, all of which are in the sample, the error is the stated one."""
    exact, stored = (open_shards(folders[name]) for name in ("float16", "int8"))
    assert stored.manifest.text_scale is not None and stored.text_scale is not None
    stated = stored.manifest.text_scale
    assert stated.num_captions == NUM_IMAGES + 1
    records = np.array([0, *range(NUM_IMAGES)])
    # The caption that all images share, and each image's own.
    draws = np.array([0.0, *[0.99] * NUM_IMAGES])
    text = exact.gather(records, draws, draws).text.float()
    found = stored.gather(records, draws, draws)
    assert found.text.dtype == torch.int8
    restored = found.text * stored.text_scale
    error = ((restored - text).norm() / text.norm()).item()
    assert error == pytest.approx(stated.relative_error, rel=0.01)
    assert 0 < error < 0.01


def test_the_denoiser_gets_scaled_text_and_the_empty_prompt_unscaled(
    folders: dict[str, Path], make_config: MakeConfig
) -> None:
    config = make_config(shards=str(folders["int8"]), batch_size=NUM_IMAGES)
    plan = validate(config, num_processes=1)
    batch = setup.make_source(plan, Accelerator(cpu=True)).batch(0)
    objective = setup.make_objective(plan, torch.device("cpu"))
    draws = replace(objective.draw(batch), drop=torch.arange(NUM_IMAGES) < 4)
    given: list[torch.Tensor] = []

    class Recorder(nn.Module):
        def forward(self, noisy: torch.Tensor, *_: Any, **keywords: Any) -> tuple[torch.Tensor]:
            given.append(keywords["encoder_hidden_states"])
            return (noisy,)

    objective(Recorder(), batch, draws)
    assert plan.shards.text_scale is not None
    assert given[0].dtype == torch.float32
    assert given[0][:4].equal(plan.shards.empty_text.float().expand(4, -1, -1))
    assert given[0][4:].equal(batch.text[4:] * plan.shards.text_scale)


def without_scale(*args: Any) -> Objective:
    """An objective that uses int8 text without its scale."""
    return replace(make_objective(*args), text_scale=None)


def test_losses_are_nearly_those_of_float16(
    folders: dict[str, Path],
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step by step, in a run that learns. Without the scale the losses differ far more."""

    def run(name: str, folder: Path) -> list[float]:
        AcceleratorState._reset_state(True)
        train(
            make_config(
                shards=str(folder),
                out=str(tmp_path / name),
                num_steps=30,
                log_every_steps=1,
                checkpoint_every_steps=30,
                optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
            )
        )
        return losses(tmp_path / name)

    exact, found = (run(name, folders[name]) for name in ("float16", "int8"))
    assert len(found) == 30 and found != exact
    np.testing.assert_allclose(found, exact, rtol=LOSS_TOLERANCE)
    monkeypatch.setattr(setup, "make_objective", without_scale)
    wrong = run("wrong", folders["int8"])
    assert np.abs(np.array(wrong) / exact - 1).max() > 50 * LOSS_TOLERANCE


def test_int8_shards_without_their_scale_are_refused(
    folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["int8"], tmp_path / "copy")
    path = folder / "text_scale.npy"
    whole = path.read_bytes()
    open_shards(folder, verify="full")
    path.write_bytes(whole[:-4])
    with pytest.raises(FormatError, match=r"text_scale\.npy: truncated: expected \d+ bytes, found"):
        open_shards(folder)
    path.unlink()
    with pytest.raises(FormatError, match=r"text_scale\.npy: missing, expected a file of \d+"):
        open_shards(folder)
    with pytest.raises(ValueError, match=r"text_scale\.npy: missing"):
        validate(make_config(shards=str(folder)), num_processes=1)
    path.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    with pytest.raises(FormatError, match=r"text_scale\.npy: sha256: expected \w{64}, found \w"):
        open_shards(folder, verify="full")
    assert any("text_scale.npy: sha256" in fault for fault in verify(folder))
