"""AdamW, its learning rate, and an update that clips and skips without synchronising.

torch's fused AdamW accepts two tensors from a gradient scaler: it divides gradients by `grad_scale`
and leaves weights, moments and step count unchanged where `found_inf` is 1. Clipping and skipping
both use them, so clipping needs no extra pass over the gradients. All processes hold the same
reduced gradients and therefore skip the same steps.

bitsandbytes' 8-bit AdamW (Dettmers et al. 2021, 2110.02861) accepts neither, so with it the host
waits for the device once per step.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latent_t2i.train.config import OptimConfig


def make_optimizer(
    config: OptimConfig, parameters: Iterable[nn.Parameter], *, capturable: bool = False
) -> torch.optim.Optimizer:
    """Returns fused or 8-bit AdamW; `capturable` if a CUDA graph captures the step.

    Raises ValueError if the 8-bit one is requested and bitsandbytes is not installed.
    """
    if config.kind == "adamw":
        make: Any = partial(torch.optim.AdamW, fused=True, capturable=capturable)
    else:
        check_bitsandbytes()
        make = importlib.import_module("bitsandbytes.optim").AdamW8bit
    optimizer: torch.optim.Optimizer = make(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer


def check_bitsandbytes() -> None:
    """Raises ValueError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "optim.kind: adamw8bit needs bitsandbytes, which is not installed; run pip install "
            "'latent-t2i[8bit]' or use optim.kind adamw"
        )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    progress = min(progress, 1.0)
    match config.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * factor


def update(
    optimizer: AcceleratedOptimizer,
    parameters: list[nn.Parameter],
    *,
    rate: float | Tensor,
    max_norm: float,
    on_device: bool,
) -> tuple[Tensor, Tensor]:
    """Clips the gradients, updates the weights unless a gradient is not finite, clears them.

    `on_device` lets a fused optimizer scale and skip on the device, without synchronising. Returns,
    on the device, the gradient norm before clipping, and 1.0 if the step was skipped or else 0.0.
    """
    adamw: Any = optimizer.optimizer
    adamw.param_groups[0]["lr"] = rate  # a tensor in a CUDA graph, so that replays can change it
    if optimizer.scaler is not None:  # fp16: divides by the loss scale, detects infinities
        optimizer.scaler.unscale_(adamw)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # FSDP
        norm = norm.full_tensor()
    skipped = (~norm.isfinite()).float()
    too_long = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # 1e-6 as in torch's clip_grad_norm_
    # The attribute by which torch's own GradScaler recognises a fused optimizer.
    if on_device and getattr(adamw, "_step_supports_amp_scaling", False):
        adamw.grad_scale, adamw.found_inf = too_long, skipped
        optimizer.step()
    else:
        # On a CPU the host knows the norm. Skipping a division by one saves a third of the update.
        if on_device or too_long.item() > 1.0:
            torch._foreach_div_(gradients, too_long)
        if optimizer.scaler is not None or not skipped.item():  # a scaler skips on its own
            optimizer.step()
    optimizer.zero_grad()
    return norm, skipped
