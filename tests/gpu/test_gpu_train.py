"""Training on a GPU: what a CPU cannot show. Run with: pytest tests/gpu

Without a GPU every test is skipped. The rest of the suite hides GPUs (tests/conftest.py), because
its bitwise comparisons hold on CPUs only.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.ema import EMAConfig
from latent_t2i.train import checkpoint, loop
from latent_t2i.train.batches import make_positions
from latent_t2i.train.config import PreviewConfig, TrainConfig
from latent_t2i.train.draws import draw
from latent_t2i.train.estimate import count_memory, measure
from latent_t2i.train.philox import philox
from latent_t2i.train.setup import Run, make_source, start
from tests.train import process_groups
from tests.train.conftest import MakeConfig, assert_same_batch, losses, metrics
from tests.train.test_train_checkpoint import SETTINGS
from tests.train.test_train_estimate import CAST_ON_CUDA, denoiser_operations

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Other drivers and versions warn about other things.
    pytest.mark.filterwarnings("default"),
]
FLOW = ObjectiveConfig(
    prediction="flow", timestep_sampling="logit_normal", flow_shift=2.0, offset_noise=0.1
)
WIDE = DenoiserConfig(channels=(128, 256), attention=(True, True), layers_per_block=1)


@pytest.fixture(autouse=True)
def _quiet_gpu() -> Iterator[None]:
    """Frees the GPU's memory of the test before."""
    torch.cuda.empty_cache()
    yield


def start_with_low_scale(config: TrainConfig) -> Run:
    """Starts a run with a loss scale with which no gradient of the small network overflows."""
    run = start(config)
    scaler = run.state.optimizer.scaler
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "channels_last": True},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "compile": True, "channels_last": True},
        {"mixed_precision": "fp16", "cuda_graph": True},
        {"mixed_precision": "bf16", "cuda_graph": True, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "cuda_graph": True, "compile": True},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_losses_are_close_to_float32_ones(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    """Ten steps, of which the last six replay the graph, with a preview and checkpoints.

    With fp16 the loss scale is low from the start. A skipped step would leave its loss out of the
    mean of its interval, which could then not be compared.
    """
    monkeypatch.setattr(loop, "start", start_with_low_scale)
    preview = PreviewConfig(every_steps=5, prompts=("a",), num_steps=2)
    config = make_config(preview=preview, **changes)
    loop.train(config)
    AcceleratorState._reset_state(True)  # another precision
    loop.train(make_config(out=str(tmp_path / "whole"), tf32=False))
    assert losses(config.out) == pytest.approx(losses(tmp_path / "whole"), rel=0.03)
    assert metrics(config.out)[-1]["skipped"] == 0


def test_a_run_resumes_from_its_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    loop.train(make_config(num_steps=5, mixed_precision="bf16", channels_last=True))
    config = make_config(num_steps=10, mixed_precision="bf16", channels_last=True)
    loop.train(config)
    whole = replace(config, out=str(tmp_path / "whole"))
    loop.train(whole)
    last, expected = metrics(config.out)[-1], metrics(whole.out)[-1]
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_batches_are_those_of_a_cpu_bit_by_bit(make_config: MakeConfig) -> None:
    run = start(make_config(batch_size=8))
    on_gpu = [
        run.prefetcher.to_device(batch).to(torch.device("cpu"))
        for batch in run.source.batches(0, 6, stream=run.prefetcher.stream)
    ]
    on_cpu = replace(make_source(run.plan, run.accelerator), pin_memory=False)
    for step, batch in enumerate(on_gpu):
        assert_same_batch(batch, on_cpu.batch(step))


def test_random_numbers_are_those_of_a_cpu() -> None:
    """Words and uniform numbers bit by bit, noise up to the rounding of functions."""
    positions = make_positions(2**40 + 3, range(300))
    words = philox((positions[:, :1], torch.arange(5000), positions[:, 1:], positions[:, :1]), 7)
    on_gpu = positions.cuda()
    counter = (on_gpu[:, :1], torch.arange(5000).cuda(), on_gpu[:, 1:], on_gpu[:, :1])
    for word, expected in zip(philox(counter, 7), words, strict=True):
        assert torch.equal(word.cpu(), expected)
    for config in (ObjectiveConfig(caption_dropout=0.5), FLOW):
        expected, found = (draw(p, 7, (4, 64, 64), config) for p in (positions, on_gpu))
        assert found.noise.is_cuda
        assert torch.equal(found.drop.cpu(), expected.drop)
        torch.testing.assert_close(found.timesteps.cpu(), expected.timesteps, rtol=1e-6, atol=0)
        for name in ("noise", "posterior_noise"):
            values = getattr(found, name).cpu()
            torch.testing.assert_close(values, getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_saving_takes_no_memory_of_the_gpu(make_config: MakeConfig, tmp_path: Path) -> None:
    run = start(make_config(channels_last=True, model=WIDE, mixed_precision="bf16"))
    for parameter in run.state.unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.state.optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checkpoint.save(tmp_path, run.state, SETTINGS, keep=1)
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_autocast_follows_the_rules_that_the_estimate_counts_with() -> None:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        on_gpu = denoiser_operations("cuda")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        on_cpu = denoiser_operations("cpu")
    assert {name for name, dtype in on_gpu.items() if dtype != on_cpu[name]} == CAST_ON_CUDA


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_estimate_is_close_to_the_peak(
    make_config: MakeConfig, tmp_path: Path, checkpointing: bool
) -> None:
    settings: dict[str, Any] = {
        "mixed_precision": "bf16",
        "model": replace(WIDE, channels=(256, 512)),
        "batch_size": 24,
        "gradient_checkpointing": checkpointing,
        "ema": EMAConfig(decay=0.9),
    }
    # cuDNN's search for kernels takes memory of its own, once per shape and process.
    loop.train(make_config(num_steps=1, out=str(tmp_path / "warm-up"), **settings))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loop.train(make_config(num_steps=3, **settings))
    peak = torch.cuda.max_memory_allocated() - before
    passes = measure(
        settings["model"],
        latent_shape=(4, 8, 8),
        text_shape=(7, 32),
        micro_batch_size=24,
        precision="bf16",
        device_type="cuda",
        checkpointing=checkpointing,
    )
    assert sum(count_memory(passes, 1, keeps_gradients=False)) == pytest.approx(peak, rel=0.25)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("changes", [{}, {"fsdp": True}, {"fsdp": True, "compile": True}])
def test_two_gpus_give_the_losses_of_one(
    make_config: MakeConfig, tmp_path: Path, forks: ForkServerContext, changes: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"mixed_precision": "bf16", "channels_last": True}
    loop.train(make_config(out=str(tmp_path / "one"), **settings))
    config = make_config(**settings, **changes)
    run = process_groups.run(forks, config, num_processes=2)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=0.02)
