"""Memory, compute and disk that a run needs, estimated and checked before its first step.

The forward and backward pass run once on FakeTensors, which allocate nothing: a few seconds for 860
million parameters. The tensors are on the CPU, but autocast follows the rules of the run's device.
Allocator fragmentation, kernel workspaces and the savings of torch.compile are
not counted, so a run is refused only if it certainly does not fit.
"""

import functools
import os
import textwrap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from latent_t2i.model import denoiser
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.paths import format_bytes, free_bytes
from latent_t2i.shards.reader import ShardSet
from latent_t2i.train.config import Precision, TrainConfig
from latent_t2i.train.preflight import Plan

FLOAT_BYTES = 4
# Both of AdamW's moments of one parameter, by `optim.kind`.
MOMENTS_BYTES = {"adamw": 8, "adamw8bit": 2}
# The backward pass computes twice as much as the forward pass.
TRAINING_FLOP = 3
# Shares of the counted peak that a run certainly needs. torch.compile fuses much of the rest.
SURE_SHARE = 0.7
SURE_SHARE_COMPILED = 0.3
WIDTH = 80
SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Cost of a forward and a backward pass."""

    num_parameters: int
    forward_flop: float  # of one example
    peak_bytes: int  # without the weights; with gradients unless `keeps_gradients`


class Memory(NamedTuple):
    """Memory of one training process; the sum is what it needs at its peak."""

    state_bytes: int  # weights, AdamW's moments, averages, and gradients that outlive a pass
    peak_bytes: int  # activations, gradients and temporary tensors


class AllocationCounter(TorchDispatchMode):
    """Counts the current and peak bytes of tensors that are created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts the storages that it creates."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        # Views share a storage, which counts once.
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, functools.partial(self._remove, key, num_bytes))
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _remove(self, key: int, num_bytes: int, _: object) -> None:
        self._alive.pop(key, None)
        self.now_bytes -= num_bytes


def cast_as_on_cuda(unet: UNet2DConditionModel) -> None:
    """Makes a network on the CPU cast to float32 what autocast casts on CUDA, but not on a CPU.

    These are normalisation, softmax and interpolation. The copies are stored for the backward pass.
    """
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | Upsample2D):
            module.register_forward_pre_hook(_to_float32)
        elif isinstance(module, Attention):
            module.upcast_softmax = True


def _to_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].float(), *inputs[1:])


@functools.lru_cache
def measure(
    model: DenoiserConfig,
    *,
    latent_shape: tuple[int, int, int],
    text_shape: tuple[int, int],
    micro_batch_size: int,
    precision: Precision = "no",
    device_type: str = "cpu",
    checkpointing: bool = False,
    keeps_gradients: bool = False,
    backward: bool = True,
) -> Passes:
    """Returns the cost of passes over latents (C, h, w) and text states (T, D).

    `keeps_gradients`: gradients are stored outside the passes (DDP buckets, gradient accumulation),
    so the peak excludes them. Without `backward` the forward pass alone is measured.
    """
    channels, height, width = latent_shape
    with FakeTensorMode():
        unet = denoiser.build(
            model, latent_channels=channels, sample_size=(height, width), text_width=text_shape[1]
        )
        if checkpointing:
            unet.enable_gradient_checkpointing()
        if keeps_gradients:
            for parameter in unet.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        denoiser.choose_attention(
            unet, model.attention_kernel, device_type=device_type, precision=precision
        )
        flop_counter = FlopCounterMode(display=False, custom_mapping={SDPA_ON_CPU: _sdpa_flop})
        if device_type == "cuda" and precision != "no":
            cast_as_on_cuda(unet)
        with AllocationCounter() as allocations, torch.set_grad_enabled(backward):
            inputs = (
                torch.empty(micro_batch_size, *latent_shape),
                torch.empty(micro_batch_size, dtype=torch.int64),
                torch.empty(micro_batch_size, *text_shape),
            )
            # The fake tensors are on the CPU, so its kernels stand in for a GPU's, and bfloat16
            # for float16.
            with flop_counter, torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
                predicted = unet.train()(*inputs, return_dict=False)[0]
            if backward:
                predicted.float().square().mean().backward()
    return Passes(
        num_parameters=unet.num_parameters(),
        forward_flop=flop_counter.get_total_flops() / micro_batch_size,
        peak_bytes=allocations.peak_bytes,
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _sdpa_flop(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Returns the FLOP of the CPU's attention kernel, which torch's counter does not know."""
    return int(sdpa_flop_count(query, key, value))


def count_memory(
    passes: Passes,
    num_averages: int,
    *,
    keeps_gradients: bool,
    moments_bytes: int = MOMENTS_BYTES["adamw"],
    fsdp_size: int = 1,
    accumulates: bool = False,
) -> Memory:
    """Returns the memory of one training process with `num_averages` EMA copies.

    FSDP divides the state over `fsdp_size` processes. But while it `accumulates`, each process
    keeps the whole gradients in float32, because they are reduced in the last pass only. The
    gathered weights of the current block are not counted.
    """
    each_bytes = FLOAT_BYTES * (1 + num_averages + keeps_gradients) + moments_bytes
    # After the backward pass the gradients alone are alive.
    gradients_bytes = 0 if keeps_gradients else FLOAT_BYTES * passes.num_parameters
    whole_bytes = FLOAT_BYTES * passes.num_parameters if fsdp_size > 1 and accumulates else 0
    return Memory(
        state_bytes=each_bytes * passes.num_parameters // fsdp_size + whole_bytes,
        peak_bytes=max(passes.peak_bytes, gradients_bytes),
    )


def available_bytes(device: torch.device) -> int | None:
    """Returns the memory available to this process on its device; None if unknown.

    On a CPU the processes of this machine get equal shares.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    free = [read_meminfo(Path("/proc/meminfo")), read_limit(Path("/sys/fs/cgroup/memory.max"))]
    known = [num for num in free if num is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if known else None


def read_meminfo(path: Path) -> int | None:
    """Returns Linux's available memory in bytes."""
    if not path.is_file():
        return None
    rows = (line.split() for line in path.read_text().splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), None)


def read_limit(path: Path) -> int | None:
    """Returns a container's memory limit in bytes; None if there is none."""
    text = path.read_text().strip() if path.is_file() else "max"
    return None if text == "max" else int(text)


def require_memory(memory: Memory, available: int | None, config: TrainConfig) -> None:
    """Raises ValueError if a run certainly does not fit."""
    share = SURE_SHARE_COMPILED if config.compile else SURE_SHARE
    if available is not None and memory.state_bytes + share * memory.peak_bytes > available:
        raise ValueError(
            f"memory: the run needs about {format_bytes(sum(memory))} per process "
            f"({format_bytes(memory.state_bytes)} for weights, AdamW and EMA, "
            f"{format_bytes(memory.peak_bytes)} for the forward and backward pass), but only "
            f"{format_bytes(available)} are free; use a smaller --micro-batch-size or "
            "--validation.batch-size (same result), --gradient-checkpointing, --mixed-precision "
            "bf16, --optim.kind adamw8bit, --fsdp over several processes, fewer --ema.sigma-rels "
            "or a smaller --model.channels"
        )


def count_averages(config: TrainConfig) -> int:
    """Returns the number of EMA copies of the weights."""
    return len(config.ema.sigma_rels) + (config.ema.decay is not None)


def count_disk(
    config: TrainConfig, num_parameters: int, num_steps: int, frozen_bytes: int
) -> dict[str, int]:
    """Returns the peak bytes of each part of a run's folder.

    `frozen_bytes`: the bundle's VAE and text encoder in float32.
    """
    weights_bytes = FLOAT_BYTES * num_parameters
    moments_bytes = MOMENTS_BYTES[config.optim.kind] * num_parameters
    checkpoint_bytes = (1 + count_averages(config)) * weights_bytes + moments_bytes
    num_checkpoints = min(config.keep_checkpoints, -(-num_steps // config.checkpoint_every_steps))
    every = config.ema.snapshot_every_steps
    num_snapshots = 0 if every is None else -(-num_steps // every)
    stored_bytes = 2 if config.ema.snapshot_dtype == "float16" else FLOAT_BYTES
    return {
        # A new checkpoint is complete before the oldest one is deleted.
        "checkpoints": (num_checkpoints + 1) * checkpoint_bytes,
        "snapshots": num_snapshots * len(config.ema.sigma_rels) * stored_bytes * num_parameters,
        # A float16 bundle is written as float32 first.
        "bundle": weights_bytes + frozen_bytes,
    }


def require_disk(folder: Path, parts: Mapping[str, int]) -> None:
    """Raises ValueError if the parts that a run's folder does not hold yet exceed the free disk."""
    held = {
        name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in parts
    }
    needed = sum(max(0, num - held[name]) for name, num in parts.items())
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"{folder}: the run needs {format_bytes(needed)} more disk ({_list_sizes(parts)}), but "
            f"only {format_bytes(free)} are free; use another --out, fewer --keep-checkpoints or a "
            "larger --ema.snapshot-every-steps"
        )


def _list_sizes(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(num)}" for name, num in parts.items() if num)


def measure_run(plan: Plan, accelerator: Accelerator, *, keeps_gradients: bool) -> Passes:
    """Returns the cost of a run's passes: peak memory of its largest images, FLOP of its mean one.

    The FLOP of buckets is interpolated by area between the smallest and the largest one.
    """
    config, manifest = plan.config, plan.shards.manifest
    precision: Any = accelerator.mixed_precision

    def measure_set(part: ShardSet, **settings: Any) -> Passes:
        return measure(
            config.model,
            latent_shape=(plan.latent_shape[0], *part.manifest.latent_shape[1:]),
            text_shape=(manifest.max_tokens, manifest.text_width),
            precision=precision,
            device_type=accelerator.device.type,
            checkpointing=config.gradient_checkpointing,
            keeps_gradients=keeps_gradients,
            **settings,
        )

    sets = sorted(plan.shards.sets, key=_latent_area)
    small, large = (
        measure_set(part, micro_batch_size=plan.micro_batch_size) for part in (sets[0], sets[-1])
    )
    peak_bytes = large.peak_bytes
    if plan.validation is not None:
        batch_size = max(map(len, plan.validation.batches()))
        validation = measure_set(sets[-1], micro_batch_size=batch_size, backward=False)
        peak_bytes = max(peak_bytes, validation.peak_bytes)
    areas = [_latent_area(part) for part in sets]
    flop = np.interp(areas, [areas[0], areas[-1]], [small.forward_flop, large.forward_flop])
    mean = np.average(flop, weights=[len(part) for part in sets])
    return replace(large, forward_flop=float(mean), peak_bytes=peak_bytes)


def _latent_area(part: ShardSet) -> int:
    _, height, width = part.manifest.latent_shape
    return height * width


def estimate_run(plan: Plan, accelerator: Accelerator) -> list[str]:
    """Returns lines that describe what a run needs.

    Raises ValueError if the run does not fit the device's memory or the disk.
    """
    config, num_processes = plan.config, accelerator.num_processes
    num_pieces = config.batch_size // num_processes // plan.micro_batch_size
    keeps_gradients = num_processes > 1 or num_pieces > 1
    passes = measure_run(plan, accelerator, keeps_gradients=keeps_gradients)
    memory = count_memory(
        passes,
        count_averages(config),
        keeps_gradients=keeps_gradients,
        moments_bytes=MOMENTS_BYTES[config.optim.kind],
        fsdp_size=num_processes if config.fsdp else 1,
        accumulates=num_pieces > 1,
    )
    available = available_bytes(accelerator.device)
    require_memory(memory, available, config)
    frozen = [*plan.vae.state_dict().values(), *plan.text_encoder.state_dict().values()]
    frozen_bytes = sum(tensor.nbytes for tensor in frozen)
    disk = count_disk(config, passes.num_parameters, plan.num_steps, frozen_bytes)
    require_disk(plan.folder, disk)
    batch = f"{config.batch_size} = {num_processes} x {plan.micro_batch_size} x {num_pieces}"
    sizes = [f"{width}x{height}" for _, height, width in plan.shards.latent_shapes]
    flop = TRAINING_FLOP * passes.forward_flop * config.batch_size
    of_available = "" if available is None else f" of {format_bytes(available)}"
    rows = {
        "data": f"{len(plan.shards)} records, {plan.num_steps} steps, "
        f"{plan.order.num_epochs(plan.num_steps):.2f} epochs",
        "batch": f"{batch} (processes x micro-batch x accumulation); latents {', '.join(sizes)}",
        "network": f"{passes.num_parameters / 1e6:.1f} M parameters, "
        f"{passes.forward_flop / 1e9:.4g} GFLOP per image and forward pass",
        "step": f"about {flop / 1e9:.4g} GFLOP",
        "memory": f"about {format_bytes(sum(memory))}{of_available} per process "
        f"({format_bytes(memory.state_bytes)} for weights, AdamW and EMA)",
        "disk": f"{_list_sizes(disk)}; {format_bytes(free_bytes(plan.folder))} free",
    }
    if config.preview.prompts and config.preview.every_steps is None:
        rows["preview"] = "none: preview.prompts has no effect without preview.every_steps"
    return layout(rows)


def layout(lines: Mapping[str, str]) -> list[str]:
    """Returns lines of at most 80 columns with the names in the first column."""
    return [
        row
        for name, text in lines.items()
        for row in textwrap.wrap(f"{name:<9}{text}", WIDTH, subsequent_indent=" " * 9)
    ]
