"""8-bit AdamW: it learns, skips non-finite steps and resumes bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.train import optim
from latent_t2i.train.config import OptimConfig
from latent_t2i.train.loop import train
from latent_t2i.train.setup import start
from tests import tiny
from tests.train.conftest import MakeConfig, assert_same_weights, metrics, weights

WIDE = DenoiserConfig(  # bitsandbytes keeps moments of fewer than 4,096 weights in float32
    channels=(32,), attention=(True,), layers_per_block=1, attention_head_dim=2, norm_num_groups=8
)
KIND = OptimConfig(kind="adamw8bit", learning_rate=1e-3)


def test_without_bitsandbytes_the_error_names_what_to_install(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"latent-t2i\[8bit\]"):
        start(make_config(optim=KIND))


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs the extra 8bit: bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
def test_it_resumes_bit_by_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim": KIND, "model": WIDE}
    whole = train(make_config(**settings, num_steps=6, out=str(tmp_path / "whole")))
    train(make_config(**settings, num_steps=3))
    run = start(make_config(**settings, num_steps=6))
    kinds = {
        str(value.dtype)
        for entry in run.state.optimizer.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    }
    assert kinds == {"torch.uint8", "torch.float32"}
    assert all(e["step"] == 3 for e in run.state.optimizer.optimizer.state.values())
    assert_same_weights(train(make_config(**settings, num_steps=6)), whole)


@pytest.mark.usefixtures("bitsandbytes")
def test_it_is_close_to_adamw_and_skips_non_finite_steps(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = tiny.make_shards(tmp_path / "shards")
    tiny.plant_nan(shards, shard=0, records=[5])
    losses = {}
    for kind in ("adamw", "adamw8bit"):
        out = tmp_path / kind
        run_optim = OptimConfig(kind=kind, learning_rate=1e-3)
        config = make_config(
            shards=str(shards), model=WIDE, optim=run_optim, out=str(out), num_steps=12
        )
        bundle = train(config)
        line = metrics(out)[-1]
        assert line["skipped"] == 2
        assert all(tensor.isfinite().all() for tensor in weights(bundle).values())
        losses[kind] = line["loss"]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.02)
