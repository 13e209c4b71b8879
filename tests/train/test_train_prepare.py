"""Compiled blocks, channels_last, activation checkpointing, and the compiler's check."""

import json
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from latent_t2i.model.denoiser import build
from latent_t2i.train import loop, prepare
from latent_t2i.train.config import PreviewConfig, ValidationConfig
from latent_t2i.train.setup import dry_run, start
from tests import tiny
from tests.train import process_groups
from tests.train.conftest import MODEL, MakeConfig, metrics
from tests.train.test_train_buckets import make_buckets

INPUTS = (torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), torch.ones(2, 7, 32))


def make_unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build(replace(MODEL, **changes), latent_channels=4, sample_size=8, text_width=32)


def gradient(unet: UNet2DConditionModel) -> torch.Tensor:
    """The gradient of the first layer for a fixed input."""
    unet.train()(*INPUTS, return_dict=False)[0].square().mean().backward()
    assert unet.conv_in.weight.grad is not None
    return unet.conv_in.weight.grad


@pytest.mark.slow
def test_two_compiled_processes_continue_a_run_of_one_that_is_not_compiled(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    """Each block is one graph; validation and previews run eagerly, in the run's precision.

    Only the main process reads the checkpoint and the records, and hashes the encoders.
    """
    held_out = tiny.make_shards(tmp_path / "val", sizes=(3,), first_seed=9)
    settings: dict[str, Any] = {
        "mixed_precision": "bf16",
        "log_every_steps": 1,
        "validation": ValidationConfig(shards=str(held_out), batch_size=2),
        "preview": PreviewConfig(every_steps=500, prompts=("a", "b"), num_steps=2),
    }
    loop.train(make_config(num_steps=3, out=str(tmp_path / "plain"), **settings))
    loop.train(make_config(num_steps=1, mixed_precision="bf16"))
    config = make_config(num_steps=3, compile=True, **settings)
    run = process_groups.run(forks, config, num_processes=2, before=process_groups.watch)
    found, expected = (
        [line["loss"] for line in metrics(folder) if "loss" in line]
        for folder in (run, tmp_path / "plain")
    )
    assert found == pytest.approx(expected, rel=1e-2)
    plain, compiled = (process_groups.newest(folder) for folder in (tmp_path / "plain", run))
    names = process_groups.tensors(plain).keys()
    assert process_groups.tensors(compiled).keys() == names
    assert not any("_orig_mod" in name for name in names)
    assert len({(run / f"rank-{rank}.json").read_text() for rank in range(2)}) == 1
    for rank, reads in enumerate([(3, 2, 1), (0, 0, 0)]):
        found = json.loads((run / f"watched-{rank}.json").read_text())
        assert found["graphs"] == 3  # down, middle, up: once each
        assert set(found["evaluated_in"]) == {"torch.bfloat16"}
        assert found["timeout_s"] == 3600
        assert tuple(found[name] for name in ("_read", "fingerprint", "check_overlap")) == reads


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # while torch traces
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("one_process")
def test_a_block_is_one_graph_however_many_buckets_its_gradients_fill(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    num_graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(prepare, "BACKEND", backend)
    unet = make_unet(channels=(64, 128), attention=(False, False))
    if checkpointing:
        prepare.checkpoint_activations(unet, dropout=0.0)
    model = DistributedDataParallel(unet, gradient_as_bucket_view=True, bucket_cap_mb=1)
    with torch._dynamo.config.patch(optimize_ddp=True):  # torch's default
        prepare.compile_blocks(unet, num_shapes=1)
        model(*INPUTS, return_dict=False)[0].square().mean().backward()
    assert num_graphs == len(prepare.blocks(unet))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # while torch traces
def test_no_bucket_exceeds_the_recompile_limit(
    make_config: MakeConfig, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BACKEND", "eager")
    sizes = {"32x32": (8,), "64x64": (8,), "96x64": (8,)}
    model = replace(MODEL, channels=(8, 8, 8), attention=(True, True, True))
    config = make_config(
        shards=str(make_buckets(tmp_path / "buckets", sizes, shards)),
        num_steps=12,
        compile=True,
        gradient_checkpointing=True,
        model=model,
    )
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        loop.train(config)


def test_activations_are_converted_where_weights_must_stay_contiguous() -> None:
    plain, converted = make_unet(), make_unet()
    prepare.use_channels_last(converted, sharded=True)
    layouts = []
    for module in converted.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous()
            module.register_forward_hook(lambda _, inputs, __: layouts.append(inputs[0]))
    torch.testing.assert_close(gradient(converted), gradient(plain), rtol=1e-4, atol=1e-6)
    assert layouts
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in layouts)


def test_checkpointing_without_dropout_reads_no_random_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading it is an error while a CUDA graph captures, on torch below 2.10."""
    reads = []
    get = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1) or get())
    plain, recomputed = make_unet(), make_unet()
    prepare.checkpoint_activations(recomputed, dropout=0.0)
    torch.testing.assert_close(gradient(recomputed), gradient(plain))
    assert reads == []
    dropping = make_unet(dropout=0.3)
    prepare.checkpoint_activations(dropping, dropout=0.3)
    gradient(dropping)
    assert reads


def test_a_graph_of_recomputed_dropout_is_refused(make_config: MakeConfig) -> None:
    settings: dict[str, Any] = {"cuda_graph": True, "gradient_checkpointing": True}
    make_config(**settings)
    with pytest.raises(ValueError, match=r"cuda_graph: .* expected model.dropout 0, found 0.1"):
        make_config(**settings, model=replace(MODEL, dropout=0.1))


def test_runs_check_the_compiler_before_the_shards(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = make_config(compile=True, shards="no/such")
    for begin in (start, dry_run):
        with pytest.raises(ValueError, match=r"compile: torch.compile needs a C\+\+ compiler"):
            begin(config)
