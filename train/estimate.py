"""What a run takes, told and checked before its first step: memory, arithmetic, disk.

The passes of the denoiser are run once on tensors without content (torch's FakeTensorMode), and
what they would allocate and compute is counted: seconds for 860 million weights, no memory. What
is not seen: the allocator's waste and the kernels' own scratch space; kernels of a CPU stand in for
those of a GPU; torch.compile takes less. So a run is refused only where it surely does not fit.
"""

import functools
import os
import textwrap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from latent_t2i.model import denoiser
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.paths import format_bytes, free_bytes
from latent_t2i.train.config import Precision, TrainConfig
from latent_t2i.train.preflight import Plan

FLOAT_BYTES = 4
MOMENTS_BYTES = {"adamw": 8, "adamw8bit": 2}
"""Of both of AdamW's moments of a weight, by `optim.kind`."""
TRAINING_FLOP = 3
"""A backward pass takes twice the arithmetic of its forward pass."""
SURE_SHARE = 0.7
"""This much of the counted peak is needed even if the count is off."""
SURE_SHARE_COMPILED = 0.3
"""torch.compile fuses what a plain pass keeps."""
WIDTH = 80
SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a forward and a backward pass take."""

    num_parameters: int
    forward_flop: float
    """Of one example."""
    peak_bytes: int
    """Most that is alive at a time beside the weights, gradients too unless kept elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process."""

    state_bytes: int
    """Weights, AdamW's moments, averages, and gradients that outlive a pass."""
    peak_bytes: int
    """Activations, gradients and what is alive for a moment, at their most."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.peak_bytes


class Allocations(TorchDispatchMode):
    """Counts the bytes that the tensors made under it hold, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and notes the memory that is new."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        gone = functools.partial(self._forget, key, num_bytes)
        self._alive[key] = weakref.ref(storage, gone)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _forget(self, key: int, num_bytes: int, _: object) -> None:
        self._alive.pop(key, None)
        self.now_bytes -= num_bytes


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
) -> Passes:
    """Counts what the passes over latents (C, h, w) and text (T, D) take, without taking it.

    `keeps_gradients`: they live elsewhere (in DDP's buckets, or since the piece before), so the
    peak is without them.
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
        kernel = model.attention_kernel
        denoiser.choose_attention(unet, kernel, device_type=device_type, precision=precision)
        counted = FlopCounterMode(display=False, custom_mapping={SDPA_ON_CPU: _sdpa_flop})
        with Allocations() as allocations:
            inputs = (
                torch.empty(micro_batch_size, *latent_shape),
                torch.empty(micro_batch_size, dtype=torch.int64),
                torch.empty(micro_batch_size, *text_shape),
            )
            with counted, torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
                predicted = unet.train()(*inputs, return_dict=False)[0]
            predicted.float().square().mean().backward()
    return Passes(
        num_parameters=unet.num_parameters(),
        forward_flop=counted.get_total_flops() / micro_batch_size,
        peak_bytes=allocations.peak_bytes,
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _sdpa_flop(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Returns the arithmetic of an attention kernel that torch's counter does not know."""
    return int(sdpa_flop_count(query, key, value))


def count_memory(
    passes: Passes,
    num_averages: int,
    *,
    keeps_gradients: bool,
    moments_bytes: int = MOMENTS_BYTES["adamw"],
    num_shares: int = 1,
) -> Memory:
    """Returns a training process's memory: float32 weights, AdamW, averages, and the passes'.

    The gradients are whole when the passes' peak is over, and then it is them. Of a network shared
    out over `num_shares` processes, the blocks that come together for a moment are left out.
    """
    weights_bytes = FLOAT_BYTES * passes.num_parameters
    each_bytes = FLOAT_BYTES * (1 + num_averages + keeps_gradients) + moments_bytes
    return Memory(
        state_bytes=each_bytes * passes.num_parameters // num_shares,
        peak_bytes=max(passes.peak_bytes, 0 if keeps_gradients else weights_bytes),
    )


def available_bytes(device: torch.device) -> int | None:
    """Returns the memory that this process may take on its device; None where nothing tells.

    On a CPU, an even share of what the machine's processes of this run have together.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    free = [read_meminfo(Path("/proc/meminfo")), read_limit(Path("/sys/fs/cgroup/memory.max"))]
    known = [num for num in free if num is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if known else None


def read_meminfo(path: Path) -> int | None:
    """Returns the memory that Linux says is available, in bytes."""
    if not path.is_file():
        return None
    rows = (line.split() for line in path.read_text().splitlines())
    return next((int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:"), None)


def read_limit(path: Path) -> int | None:
    """Returns the memory that a container may have, in bytes; None without a limit."""
    text = path.read_text().strip() if path.is_file() else "max"
    return None if text == "max" else int(text)


def require_memory(memory: Memory, available: int | None, config: TrainConfig) -> None:
    """Raises ValueError where a run surely does not fit."""
    share = SURE_SHARE_COMPILED if config.compile else SURE_SHARE
    if available is not None and memory.state_bytes + share * memory.peak_bytes > available:
        raise ValueError(
            f"memory: the run needs about {format_bytes(memory.total_bytes)} a process "
            f"({format_bytes(memory.state_bytes)} for weights, AdamW and averages, "
            f"{format_bytes(memory.peak_bytes)} for the passes), {format_bytes(available)} are "
            "free: a smaller "
            "--micro-batch-size (the result stays the same), --gradient-checkpointing, "
            "--mixed-precision bf16, --optim.kind adamw8bit, --fsdp over several processes, fewer "
            "--ema.sigma-rels, or a smaller --model.channels"
        )


def count_disk(
    config: TrainConfig, num_parameters: int, num_steps: int, frozen_bytes: int
) -> dict[str, int]:
    """Returns the bytes of a run's folder by part, at their most.

    One more checkpoint than are kept lies there while it is written. A bundle with encoders of
    `frozen_bytes` is written as float32 first.
    """
    weights_bytes = FLOAT_BYTES * num_parameters
    averages = len(config.ema.sigma_rels)
    num_averages = averages + (config.ema.decay is not None)
    moments_bytes = MOMENTS_BYTES[config.optim.kind] * num_parameters
    checkpoint_bytes = (1 + num_averages) * weights_bytes + moments_bytes
    num_checkpoints = min(config.keep_checkpoints, -(-num_steps // config.checkpoint_every_steps))
    every = config.ema.snapshot_every_steps
    num_snapshots = 0 if every is None else -(-num_steps // every)
    stored_bytes = 2 if config.ema.snapshot_dtype == "float16" else FLOAT_BYTES
    return {
        "checkpoints": (num_checkpoints + 1) * checkpoint_bytes,
        "snapshots": num_snapshots * averages * stored_bytes * num_parameters,
        "bundle": weights_bytes + frozen_bytes,
    }


def require_room(folder: Path, parts: Mapping[str, int]) -> None:
    """Raises ValueError where what is not yet in a run's folder does not fit on its disk."""
    there = {
        name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in parts
    }
    needed = sum(max(0, num_bytes - there[name]) for name, num_bytes in parts.items())
    free = free_bytes(folder)
    if needed > free:
        told = ", ".join(f"{name} {format_bytes(num)}" for name, num in parts.items() if num)
        raise ValueError(
            f"{folder}: the run needs {format_bytes(needed)} more ({told}), the disk has "
            f"{format_bytes(free)} "
            "free: choose another --out, fewer --keep-checkpoints, or a larger "
            "--ema.snapshot-every-steps"
        )


def estimate_run(plan: Plan, accelerator: Accelerator) -> list[str]:
    """Checks that a run fits the device and the disk, and returns what it takes, in lines.

    Raises ValueError, naming what is needed, what there is and what would help.
    """
    config, num_processes = plan.config, accelerator.num_processes
    num_pieces = config.batch_size // num_processes // plan.micro_batch_size
    keeps_gradients = num_processes > 1 or num_pieces > 1
    manifest = plan.shards.manifest
    channels = plan.latent_shape[0]
    _, height, width = max(plan.shards.latent_shapes, key=lambda shape: shape[1] * shape[2])
    precision: Any = accelerator.mixed_precision
    passes = measure(
        config.model,
        latent_shape=(channels, height, width),
        text_shape=(manifest.max_tokens, manifest.text_width),
        micro_batch_size=plan.micro_batch_size,
        precision=precision,
        device_type=accelerator.device.type,
        checkpointing=config.gradient_checkpointing,
        keeps_gradients=keeps_gradients,
    )
    num_averages = len(config.ema.sigma_rels) + (config.ema.decay is not None)
    memory = count_memory(
        passes,
        num_averages,
        keeps_gradients=keeps_gradients,
        moments_bytes=MOMENTS_BYTES[config.optim.kind],
        num_shares=num_processes if config.fsdp else 1,
    )
    available = available_bytes(accelerator.device)
    require_memory(memory, available, config)
    frozen_bytes = sum(map(_bytes_of, (plan.vae, plan.text_encoder)))
    parts = count_disk(config, passes.num_parameters, plan.num_steps, frozen_bytes)
    require_room(plan.folder, parts)
    batch = f"{config.batch_size} = {num_processes} x {plan.micro_batch_size} x {num_pieces}"
    flop = TRAINING_FLOP * passes.forward_flop * config.batch_size
    disk = ", ".join(f"{name} {format_bytes(num)}" for name, num in parts.items() if num)
    return layout(
        {
            "data": f"{len(plan.shards)} records, {plan.num_steps} steps, "
            f"{plan.order.num_epochs(plan.num_steps):.2f} epochs",
            "batch": f"{batch} (processes x examples x pieces), latents of {width} x {height}",
            "network": f"{passes.num_parameters / 1e6:.1f} M weights, "
            f"{passes.forward_flop / 1e9:.4g} GFLOP an image and forward pass",
            "step": f"about {flop / 1e9:.4g} GFLOP; the bar tells the time once it is measured",
            "memory": f"about {format_bytes(memory.total_bytes)}"
            + (f" of {format_bytes(available)}" if available is not None else "")
            + f" a process ({format_bytes(memory.state_bytes)} for weights, AdamW and averages)",
            "disk": f"{disk}; {format_bytes(free_bytes(plan.folder))} free",
        }
    )


def _bytes_of(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def layout(lines: Mapping[str, str]) -> list[str]:
    """Returns lines of at most 80 columns, their names in a column of their own."""
    return [
        row
        for name, text in lines.items()
        for row in textwrap.wrap(f"{name:<9}{text}", WIDTH, subsequent_indent=" " * 9)
    ]
