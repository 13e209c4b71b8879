"""Measures single settings of a training step, and the device's ceiling.

Each setting is measured in turns with the same bare step without it. The ceiling is the fastest of
a few square matrix products in the training precision.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.steps.contenders import Resident, bare_step, time_steps, wait
from bench.steps.networks import DTYPES, make_unet
from latent_t2i.model.denoiser import DenoiserConfig


@dataclass(frozen=True, kw_only=True)
class Step:
    """Settings of a bare step; the defaults are those of PyTorch and diffusers."""

    sdpa: bool = False
    channels_last: bool = False
    compile: bool = False
    fused: bool = False
    cuda_graph: bool = False


SINGLE = {
    "SDPA": Step(sdpa=True),
    "channels_last": Step(channels_last=True),
    "compile": Step(compile=True),
    "fused AdamW": Step(fused=True),
    "CUDA graph": Step(cuda_graph=True),
}


def changes_for(device: torch.device, *, compiled: bool) -> dict[str, Step]:
    """Returns the single settings that the device supports."""
    on_gpu = device.type == "cuda"
    return {
        name: step
        for name, step in SINGLE.items()
        if (on_gpu or not step.cuda_graph) and (compiled or not step.compile)
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
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=1e-4,
        fused=True if settings.fused else None,
        capturable=settings.cuda_graph,
    )
    model = torch.compile(unet) if settings.compile else unet
    step = bare_step(model, optimizer, resident, precision)
    return capture(step, noisy.device) if settings.cuda_graph else step


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures a step as a CUDA graph and returns its replay; the inputs keep their addresses."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compare(
    settings: Step,
    config: DenoiserConfig,
    resident: Resident,
    precision: str,
    *,
    num_steps: int,
    rounds: int,
) -> float:
    """Returns the speed-up of a setting: the median over rounds of the ratio within a round."""
    device = resident[0].device
    plain = make_step(Step(), config, resident, precision)
    changed = make_step(settings, config, resident, precision)
    for step in (plain, changed):
        time_steps(step, device, 1)
    ratios = []
    for number in range(rounds):
        both = {}
        for step in (plain, changed) if number % 2 else (changed, plain):
            both[step] = time_steps(step, device, num_steps)
        ratios.append(both[plain] / both[changed])
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
