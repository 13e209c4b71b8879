"""Estimates of memory, compute and disk, and the refusal of runs that do not fit."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from latent_t2i.model.denoiser import DenoiserConfig, build
from latent_t2i.model.ema import EMAConfig
from latent_t2i.train import estimate
from latent_t2i.train.config import PreviewConfig, ValidationConfig
from latent_t2i.train.estimate import (
    Memory,
    Passes,
    cast_as_on_cuda,
    count_disk,
    count_memory,
    measure,
    measure_run,
)
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import validate
from latent_t2i.train.setup import make_accelerator
from tests import tiny
from tests.train.conftest import MakeConfig
from tests.train.test_train_buckets import make_buckets

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = DenoiserConfig(
    channels=(32, 64), attention=(True, False), layers_per_block=1, norm_num_groups=8
)
MEASURE_RSS = """
import resource, torch
from latent_t2i.model import denoiser
from latent_t2i.model.denoiser import DenoiserConfig, build
from latent_t2i.train.config import OptimConfig
from latent_t2i.train.optim import make_optimizer

def step(config, batch_size):
    unet = denoiser.build(config, latent_channels=4, sample_size=16, text_width=64)
    optimizer = make_optimizer(OptimConfig(), unet.parameters())
    for _ in range(2):
        sizes = (4, 16, 16), (), (32, 64)
        inputs = [torch.ones(batch_size, *size) for size in sizes]
        unet(*inputs, return_dict=False)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def peak_rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
small = DenoiserConfig(channels=(32,), attention=(True,), layers_per_block=1)
step(small, 1)  # libraries allocate once
before = peak_rss()
step(DenoiserConfig(channels=(96, 192), attention=(True, True), layers_per_block=1), 24)
print(peak_rss() - before)
"""


def measure_small(model: DenoiserConfig = SMALL, **changes: object) -> Passes:
    settings = {"latent_shape": (4, 16, 16), "text_shape": (7, 32), "micro_batch_size": 4}
    return measure(model, **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pretends that the disk has 10 free bytes."""
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("latent_t2i.model.paths.shutil.disk_usage", lambda path: usage)


@pytest.mark.slow
def test_flop_is_per_image_and_the_same_for_every_attention_kernel() -> None:
    one = measure_small(micro_batch_size=1).forward_flop
    assert measure_small().forward_flop == one
    plain = replace(SMALL, attention_kernel="plain")
    assert measure_small(plain, micro_batch_size=1).forward_flop == one


@pytest.mark.slow
def test_flop_of_stable_diffusion_is_the_published_one() -> None:
    passes = measure(
        DenoiserConfig(), latent_shape=(4, 64, 64), text_shape=(77, 768), micro_batch_size=1
    )
    assert passes.num_parameters == 859_520_964
    assert passes.forward_flop == pytest.approx(803e9, rel=0.01)


def test_memory_depends_on_batch_checkpointing_and_precision() -> None:
    peak_bytes = measure_small().peak_bytes
    assert measure_small(micro_batch_size=8).peak_bytes > 1.6 * peak_bytes
    assert measure_small(checkpointing=True).peak_bytes < 0.7 * peak_bytes
    assert measure_small(precision="bf16", device_type="cuda").peak_bytes < peak_bytes


CAST_ON_CUDA = {"group_norm", "layer_norm", "softmax", "functional.softmax", "interpolate"}


def denoiser_operations(device: str) -> dict[str, torch.dtype]:
    """The data types of a denoiser's operations on mixed inputs, under the active autocast."""
    short, number = torch.bfloat16, torch.device(device)
    image = torch.empty(2, 8, 4, 4, device=number, dtype=short)
    tokens = torch.empty(2, 16, 8, device=number, dtype=short)
    heads = tokens.float().unflatten(-1, (2, 4)).transpose(1, 2)
    norm, square = torch.empty(8, device=number), torch.empty(8, 8, device=number)
    kernel = torch.empty(8, 8, 3, 3, device=number)
    results = {
        "group_norm": functional.group_norm(image, 4, norm, norm),
        "layer_norm": functional.layer_norm(tokens, (8,), norm, norm),
        "softmax": tokens.softmax(dim=-1),
        "functional.softmax": functional.softmax(tokens, dim=-1),
        "interpolate": functional.interpolate(image, scale_factor=2.0, mode="nearest"),
        "conv2d": functional.conv2d(image.float(), kernel),
        "linear": functional.linear(tokens.float(), square),
        "bmm": torch.bmm(tokens.float(), tokens.float().mT),
        "attention": functional.scaled_dot_product_attention(heads, heads, heads),
        "silu": functional.silu(image),
        "gelu": functional.gelu(tokens),
        "add": image + image.float(),
        "cat": torch.cat([image, image.float()], dim=1),
    }
    return {name: result.dtype for name, result in results.items()}


def test_autocast_differs_on_cuda_in_what_the_estimate_casts() -> None:
    """Compared with torch's own rules, which fake tensors on CUDA follow without a GPU."""
    with FakeTensorMode(), torch.no_grad():
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            on_cuda = denoiser_operations("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)
        with torch.autocast("cpu", torch.bfloat16):
            on_cpu = denoiser_operations("cpu")
    different = {name for name, dtype in on_cuda.items() if dtype != on_cpu[name]}
    assert different == CAST_ON_CUDA
    assert {on_cuda[name] for name in different} == {torch.float32}


def test_a_network_is_cast_as_on_cuda() -> None:
    seen: dict[str, set[torch.dtype]] = {}
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        unet = build(SMALL, latent_channels=4, sample_size=16, text_width=32)
        cast_as_on_cuda(unet)
        for module in unet.modules():
            kind = type(module).__name__
            module.register_forward_hook(
                lambda _, inputs, __, kind=kind: (
                    seen.setdefault(kind, set()).add(inputs[0].dtype) if inputs else None
                )
            )
            if isinstance(module, Attention):
                assert module.upcast_softmax
        unet(torch.empty(2, 4, 16, 16), torch.tensor([1, 2]), torch.empty(2, 7, 32))
    for kind in ("GroupNorm", "LayerNorm", "Upsample2D"):
        assert seen[kind] == {torch.float32}


def test_normalisation_in_float32_takes_memory_on_a_gpu() -> None:
    on_cpu, on_gpu, whole = (
        measure_small(replace(SMALL, attention_kernel="sdpa"), **settings).peak_bytes
        for settings in (
            {"precision": "bf16"},
            {"precision": "bf16", "device_type": "cuda"},
            {"precision": "no", "device_type": "cuda"},
        )
    )
    assert 1.2 * on_cpu < on_gpu < whole
    settings = {"precision": "bf16", "device_type": "cuda", "checkpointing": True}
    assert measure_small(**settings).peak_bytes < 0.7 * on_gpu


def test_measuring_leaves_the_random_state_alone() -> None:
    measure.cache_clear()
    before = torch.get_rng_state()
    measure_small()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_memory_is_close_to_that_of_a_process() -> None:
    command = [sys.executable, "-c", MEASURE_RSS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    model = DenoiserConfig(channels=(96, 192), attention=(True, True), layers_per_block=1)
    passes = measure_small(model, text_shape=(32, 64), micro_batch_size=24)
    counted = sum(count_memory(passes, 0, keeps_gradients=False))
    assert counted == pytest.approx(int(done.stdout), rel=0.25)


def test_memory_is_the_sum_of_its_parts() -> None:
    passes = Passes(num_parameters=100, forward_flop=1.0, peak_bytes=1000)
    assert count_memory(passes, 2, keeps_gradients=False) == Memory(
        state_bytes=400 * (1 + 2 + 2), peak_bytes=1000
    )
    assert count_memory(passes, 1, keeps_gradients=True).state_bytes == 400 * (1 + 2 + 1 + 1)
    small = count_memory(passes, 1, keeps_gradients=True, moments_bytes=2, fsdp_size=2)
    assert small.state_bytes == 100 * (4 + 2 + 4 + 4) // 2
    settings = {"keeps_gradients": True, "fsdp_size": 4}
    once = count_memory(passes, 1, **settings)  # type: ignore[arg-type]
    whole = count_memory(passes, 1, accumulates=True, **settings)  # type: ignore[arg-type]
    assert whole.state_bytes == once.state_bytes + 400  # gradients in float32, of all parameters
    few_activations = replace(passes, peak_bytes=7)
    assert count_memory(few_activations, 1, keeps_gradients=False).peak_bytes == 400


def test_disk_is_that_of_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        ema=EMAConfig(sigma_rels=(0.05, 0.1), snapshot_every_steps=4, snapshot_dtype="float32"),
        keep_checkpoints=2,
    )
    bundle = train(config)
    unet = sum(p.stat().st_size for p in (bundle / "unet").glob("*.safetensors"))
    frozen = sum(p.stat().st_size for p in bundle.rglob("*.safetensors")) - unet
    parts = count_disk(config, unet // 4, 10, frozen)
    for name, factor in (("checkpoints", 1.5), ("snapshots", 1.0), ("bundle", 1.0)):
        files = (tmp_path / "run" / name).rglob("*.safetensors")
        found = factor * sum(path.stat().st_size for path in files)
        assert parts[name] == pytest.approx(found, rel=0.1), name


def test_memory_covers_large_validation_batches(make_config: MakeConfig, tmp_path: Path) -> None:
    held_out = tiny.make_shards(tmp_path / "val", sizes=(24,), first_seed=50)
    accelerator = make_accelerator("no")
    peaks = []
    for batch_size in (1, 24):
        validation = ValidationConfig(shards=str(held_out), batch_size=batch_size)
        plan = validate(make_config(micro_batch_size=1, validation=validation), 1)
        peaks.append(measure_run(plan, accelerator, keeps_gradients=True).peak_bytes)
    forward = measure_small(
        plan.config.model, latent_shape=(4, 8, 8), micro_batch_size=24, backward=False
    )
    assert peaks[0] < peaks[1] == forward.peak_bytes


def test_a_run_that_does_not_fit_into_memory_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"memory: .* 0.1 MB are free; .* --micro-batch-size"):
        train(make_config())


@pytest.mark.usefixtures("full_disk")
def test_a_run_that_does_not_fit_on_the_disk_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"run: the run needs .* 0.0 MB are free; .*--keep-che"):
        train(make_config())
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("full_disk")
def test_files_that_a_run_already_wrote_need_no_disk(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "file").write_bytes(b"x" * 95)
    estimate.require_disk(tmp_path, {"checkpoints": 100, "bundle": 5})
    with pytest.raises(ValueError, match=r"needs 0.0 MB more disk"):
        estimate.require_disk(tmp_path, {"checkpoints": 100, "bundle": 6})


def test_available_memory_honours_limits_and_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert estimate.read_meminfo(tmp_path / "meminfo") == 5120
    assert estimate.read_meminfo(tmp_path / "none") is None
    for text, num in (("max\n", None), ("4096\n", 4096)):
        (tmp_path / "limit").write_text(text)
        assert estimate.read_limit(tmp_path / "limit") == num
    monkeypatch.setattr(estimate, "read_meminfo", lambda path: 9000)
    monkeypatch.setattr(estimate, "read_limit", lambda path: 8000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert estimate.available_bytes(torch.device("cpu")) == 4000
    assert estimate.available_bytes(torch.device("meta")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert estimate.available_bytes(SimpleNamespace(type="cuda")) == 7  # type: ignore[arg-type]


def test_a_dry_run_prints_the_estimate_and_writes_nothing(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(dry_run=True, micro_batch_size=2, preview=PreviewConfig(prompts=("a",)))
    assert train(config) == tmp_path / "run"
    assert not (tmp_path / "run").exists()
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line[0] != " "]
    expected = ["data", "batch", "network", "step", "memory", "disk", "preview", "no"]
    assert names == expected  # the last one: no validation set
    assert "preview  none: preview.prompts has no effect without preview.every_steps" in lines
    assert all(len(line) <= 80 for line in lines)
    assert "batch    4 = 1 x 2 x 2 (processes x micro-batch x accumulation); latents 8x8" in lines


def test_flop_of_buckets_is_that_of_the_mean_image(
    make_config: MakeConfig, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"32x32": (12,), "64x64": (3,), "96x64": (5,)}
    folder = make_buckets(tmp_path / "buckets", sizes, shards)
    config = make_config(shards=str(folder), dry_run=True)
    train(config)
    text = " ".join(capsys.readouterr().out.split())
    gflop = float(text.partition("M parameters, ")[2].split()[0])
    each = [
        measure_small(config.model, latent_shape=(4, *size), text_shape=(7, 32)).forward_flop
        for size in ((4, 4), (8, 8), (8, 12))
    ]
    mean = (12 * each[0] + 3 * each[1] + 5 * each[2]) / 20
    assert gflop == pytest.approx(mean / 1e9, rel=0.03)
    assert gflop < 0.5 * each[2] / 1e9
    assert "latents 4x4, 8x8, 12x8" in text


def test_a_dry_run_compares_settings_with_the_checkpoint(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(num_steps=3))
    train(make_config(num_steps=9, dry_run=True))
    printed = capsys.readouterr().out
    assert "num_steps changed from 3 to 9" in printed
    assert "step-00000003" in printed
    assert "dry_run changed" not in printed
    with pytest.raises(ValueError, match="seed: the run in"):
        train(make_config(seed=5, dry_run=True))
