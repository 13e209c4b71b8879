"""Measures single settings of a training step, and the device's ceiling.

Each setting is measured in turns with a base, the same bare step without it. The ceiling is the
fastest of a few square matrix products in the training precision.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.steps.contenders import Resident, bare_step, time_steps, wait
from bench.steps.networks import DTYPES, make_unet
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.train.prepare import compile_blocks

SDPA_SIDE = 32
"""From latents of this side on, the base has SDPA: at 64 x 64, the softmax of plain attention
alone would take 64 GB."""
MIN_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings of a bare step; the defaults are those of PyTorch and diffusers."""

    sdpa: bool = False
    channels_last: bool = False
    compile: bool = False
    fused: bool = False
    cuda_graph: bool = False


SINGLE = {
    "SDPA": {"sdpa": True},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "fused AdamW": {"fused": True},
    "CUDA graph, fused AdamW": {"cuda_graph": True},
}


def base_for(side: int) -> Step:
    """Returns the step that single settings are compared with, for latents of this side."""
    return Step(sdpa=side >= SDPA_SIDE)


def changes_for(base: Step, device: torch.device, *, compiled: bool) -> dict[str, Step]:
    """Returns the steps that differ from the base in a setting that the device supports."""
    on_gpu = device.type == "cuda"
    steps = {name: replace(base, **settings) for name, settings in SINGLE.items()}
    return {
        name: step
        for name, step in steps.items()
        if step != base and (on_gpu or not step.cuda_graph) and (compiled or not step.compile)
    }


def make_step(
    settings: Step, config: DenoiserConfig, resident: Resident, precision: str
) -> Callable[[], None]:
    """Returns a bare step with the given settings."""
    noisy, _, text, _ = resident
    unet = make_unet(
        replace(config, attention_kernel="sdpa" if settings.sdpa else "plain"),
        latent_channels=noisy.shape[1],
        side=noisy.shape[2],
        text_width=text.shape[-1],
        device=noisy.device,
        precision=precision,
        channels_last=settings.channels_last,
    )
    if settings.compile:
        compile_blocks(unet, num_shapes=1)
    step = bare_step(unet, make_adamw(settings, unet), resident, precision)
    return capture(step, noisy.device) if settings.cuda_graph else step


def make_adamw(settings: Step, unet: nn.Module) -> torch.optim.AdamW:
    """Returns the optimizer of a bare step."""
    # GradScaler would fetch a number from the device, which a capture forbids, unless the optimizer
    # is fused.
    return torch.optim.AdamW(
        unet.parameters(),
        lr=1e-4,
        fused=True if settings.fused or settings.cuda_graph else None,
        capturable=settings.cuda_graph,
    )


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures a step as a CUDA graph and returns its replay; the inputs keep their addresses."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads of this process, such as a loader's, may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def compare(
    changed: Step,
    base: Step,
    config: DenoiserConfig,
    resident: Resident,
    precision: str,
    *,
    turn_s: float,
    rounds: int,
) -> float:
    """Returns the speed-up of a step: the median over rounds of the ratio within a round."""
    device = resident[0].device
    steps = {how: make_step(how, config, resident, precision) for how in (base, changed)}
    for step in steps.values():
        time_steps(step, device, 1)
    num_steps = max(MIN_STEPS, round(2 * turn_s / time_steps(steps[base], device, 2)))
    ratios = []
    for number in range(rounds):
        order = (base, changed) if number % 2 else (changed, base)
        seconds = {how: time_steps(steps[how], device, num_steps) for how in order}
        ratios.append(seconds[base] / seconds[changed])
    return statistics.median(ratios)


def step_flops(step: Callable[[], None]) -> int:
    """Returns the FLOP of a step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def ceiling_flops_per_s(device: torch.device, precision: str, seconds: float) -> float:
    """Returns the FLOP/s of the fastest square matrix product."""
    best = 0.0
    for side in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        left = torch.randn(side, side, device=device).to(DTYPES[precision])
        right = torch.randn(side, side, device=device).to(DTYPES[precision])
        left @ right
        wait(device)
        number, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            left @ right
            wait(device)
            number += 1
        best = max(best, 2 * side**3 * number / (time.perf_counter() - began))
    return best
