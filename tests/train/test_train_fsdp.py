"""FSDP: a sharded network trains like a whole one and is saved as full tensors."""

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from latent_t2i.model.denoiser import build
from latent_t2i.model.ema import EMA, EMAConfig
from latent_t2i.train import fsdp, optim, prepare
from latent_t2i.train.config import OptimConfig, PreviewConfig, ValidationConfig
from latent_t2i.train.loop import train
from tests import tiny
from tests.train import process_groups
from tests.train.conftest import MODEL, MakeConfig, metrics


@pytest.fixture
def one_of_two() -> Iterator[Accelerator]:
    """The first of two processes; the other is fake and sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    accelerator.state._shared_state["num_processes"] = 2
    yield accelerator
    dist.destroy_process_group()


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = replace(MODEL, channels=(8, 16), attention=(True, False))
    return build(config, latent_channels=4, sample_size=8, text_width=32)


def test_each_process_keeps_its_shard_of_weights_and_averages(one_of_two: Accelerator) -> None:
    before = {name: p.detach().clone() for name, p in make_unet().named_parameters()}
    unet = make_unet()
    prepare.use_channels_last(unet, sharded=True)  # FSDP refuses parameters that are not contiguous
    fsdp.apply_fsdp(unet, one_of_two)
    averages = EMA(EMAConfig(), unet.named_parameters()).average
    for name, parameter in unet.named_parameters():
        rows = -(-len(before[name]) // 2)
        for shared in (parameter, averages[name]):
            assert isinstance(shared, DTensor)
            assert shared.to_local().equal(before[name][:rows])
    for name, parameter in unet.named_parameters():
        part = fsdp.local_shard(before[name], parameter)
        assert part.to_local().equal(parameter.to_local())  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # while torch traces
@pytest.mark.parametrize(
    ("precision", "compiled"),
    [("no", False), ("bf16", False), pytest.param("no", True, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_scaled_and_skipped_on_the_device(
    monkeypatch: pytest.MonkeyPatch, precision: str, compiled: bool
) -> None:
    """As on a GPU: the clipping factor and the flag are plain tensors, the weights are sharded."""
    accelerator: Any = SimpleNamespace(
        mixed_precision=precision, device=torch.device("cpu"), num_processes=1
    )
    unets = [make_unet(), make_unet()]
    prepare.use_channels_last(unets[0], sharded=True)
    fsdp.apply_fsdp(unets[0], accelerator)
    if compiled:
        monkeypatch.setattr(prepare, "BACKEND", "eager")
        prepare.compile_blocks(unets[0], num_shapes=1)
    found = [update_on_device(unet.train(), precision) for unet in unets]
    for one, other in zip(*found, strict=True):
        assert type(one) is torch.Tensor
        rtol = 2e-2 if precision == "bf16" else 1e-4
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5, equal_nan=True)


def update_on_device(unet: UNet2DConditionModel, precision: str) -> list[torch.Tensor]:
    """Takes a clipped step and one that is skipped; returns norms, flags and a weight."""
    adamw = optim.make_optimizer(OptimConfig(), unet.parameters())
    optimizer: Any = SimpleNamespace(
        optimizer=adamw, scaler=None, step=adamw.step, zero_grad=adamw.zero_grad
    )
    found = []
    for scale in (1.0, torch.inf):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            inputs = torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), torch.ones(2, 7, 32)
            output = unet(*inputs, return_dict=False)[0]
        (output.float().square().mean() * scale).backward()
        found += optim.update(
            optimizer, list(unet.parameters()), rate=1e-3, max_norm=1e-3, on_device=True
        )
        found += fsdp.full_tensors({"": unet.conv_out.bias.detach()}, keep=True).values()
    return found


def test_plain_tensors_are_not_copied() -> None:
    tensors = {"a": torch.arange(3.0)}
    assert fsdp.full_tensors(tensors, keep=True)["a"] is tensors["a"]
    assert fsdp.full_tensors(tensors, keep=False) == {}
    assert fsdp.local_shard(tensors["a"], torch.zeros(3)) is tensors["a"]


@pytest.mark.slow
def test_a_sharded_run_resumed_on_one_process_equals_one_of_one_process(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    """Eight sharded steps with accumulation in channels_last, then four by one process."""
    held_out = tiny.make_shards(tmp_path / "val", sizes=(5,), first_seed=9)
    settings: dict[str, Any] = {
        "ema": EMAConfig(decay=0.9, sigma_rels=(0.05, 0.1), snapshot_every_steps=8),
        "validation": ValidationConfig(
            shards=str(held_out), batch_size=2, every_steps=4, num_examples=5
        ),
    }
    preview = PreviewConfig(every_steps=8, prompts=("a",), num_steps=2)
    config = make_config(
        num_steps=8,
        fsdp=True,
        channels_last=True,
        micro_batch_size=1,
        preview=preview,
        **settings,
    )
    process_groups.run(forks, config, num_processes=2)
    assert (tmp_path / "run" / "previews" / "step-00000008.png").is_file()
    alone = train(make_config(num_steps=12, out=str(tmp_path / "one"), **settings))
    shared = train(make_config(num_steps=12, **settings))
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "run"), strict=True):
        if "validation" in first:
            expected = pytest.approx(first["validation"]["loss"], rel=1e-5)
            assert second["validation"]["loss"] == expected
            continue
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    weights = "unet/diffusion_pytorch_model.safetensors"
    snapshot = "snapshots/step-00000008"
    for one, two in (
        (alone / weights, shared / weights),
        *(
            (tmp_path / "one" / snapshot / name, tmp_path / "run" / snapshot / name)
            for name in sorted(path.name for path in (tmp_path / "one" / snapshot).glob("*.safet*"))
        ),
    ):
        expected = load_file(one)
        for name, found in load_file(two).items():
            torch.testing.assert_close(found, expected[name], rtol=2e-3, atol=2e-5)


def test_fsdp_with_one_process_is_reported(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(num_steps=1, fsdp=True))
    assert "fsdp: has no effect with one process" in capsys.readouterr().err


def test_fsdp_refuses_fp16(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"fsdp: .* bf16 or no, found fp16"):
        make_config(fsdp=True, mixed_precision="fp16")
