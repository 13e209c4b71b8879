"""The update of the weights, with no word between device and host.

Clipping and skipping both ride on the two tensors that torch's fused AdamW takes from a gradient
scaler: it divides gradients by `grad_scale` and leaves weights, moments and step count alone where
`found_inf` is 1. So clipping costs no pass over the gradients of its own, and a non-finite step
changes nothing. All processes hold the same reduced gradients and therefore skip the same steps.

bitsandbytes' 8-bit AdamW (Dettmers et al. 2021, 2110.02861) takes neither tensor: with it the host
waits for the device once a step, to know whether to update.
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
    """Returns fused AdamW, or the 8-bit one; `capturable` for a step that a CUDA graph records.

    Raises ValueError where bitsandbytes is asked for and not installed.
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
    """Raises ValueError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "optim.kind: adamw8bit needs bitsandbytes, which is not installed: "
            "pip install 'latent-t2i[8bit]'; or adamw"
        )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Returns the rate of the update that follows `step` earlier ones."""
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
    ahead: bool,
) -> tuple[Tensor, Tensor]:
    """Clips, then updates the weights or skips, and clears the gradients.

    `ahead` is for a device that the host must not wait for: a fused optimizer then scales and skips
    there. On a CPU the host knows; not to scale by one saves a third of the update. The results are
    the same. Returns, on the device, the gradients' norm before clipping and 1.0 where the step was
    skipped.
    """
    adamw: Any = optimizer.optimizer
    adamw.param_groups[0]["lr"] = rate
    if optimizer.scaler is not None:  # fp16: divides by the loss scale and looks for infinities
        optimizer.scaler.unscale_(adamw)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # of a network shared out (fsdp.py)
        norm = norm.full_tensor()
    skipped = (~norm.isfinite()).float()
    too_long = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    if ahead and getattr(
        adamw, "_step_supports_amp_scaling", False
    ):  # fused, as GradScaler asks it
        adamw.grad_scale, adamw.found_inf = too_long, skipped
        optimizer.step()
    else:
        if ahead or too_long.item() > 1.0:
            torch._foreach_div_(gradients, too_long)
        if optimizer.scaler is not None or not skipped.item():  # a scaler skips by itself
            optimizer.step()
    optimizer.zero_grad()
    return norm, skipped
