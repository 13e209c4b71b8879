"""What each setting of a training step is worth by itself, and how near the step is to the device.

A change is measured against the same bare step without it, the two taking turns. The ceiling is
the fastest of a few square matrix multiplications in the precision of training, on this device.
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
    """How a bare step is taken; the defaults are PyTorch's and diffusers' before any choice."""

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
    """Returns the single changes that a device can take."""
    on_gpu = device.type == "cuda"
    return {
        name: step
        for name, step in SINGLE.items()
        if (on_gpu or not step.cuda_graph) and (compiled or not step.compile)
    }


def make_step(
    how: Step, config: DenoiserConfig, resident: Resident, precision: str
) -> Callable[[], None]:
    """Returns a bare step taken in one way."""
    noisy, _, text, _ = resident
    unet = make_unet(
        replace(config, attention_kernel="sdpa" if how.sdpa else "plain"),
        latent_channels=noisy.shape[1],
        side=noisy.shape[2],
        text_width=text.shape[-1],
        device=noisy.device,
        precision=precision,
        channels_last=how.channels_last,
    )
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=1e-4, fused=True if how.fused else None, capturable=how.cuda_graph
    )
    model = torch.compile(unet) if how.compile else unet
    step = bare_step(model, optimizer, resident, precision)
    return capture(step, noisy.device) if how.cuda_graph else step


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Returns what replays a step as one CUDA graph; its inputs stay where they are."""
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
    how: Step,
    config: DenoiserConfig,
    resident: Resident,
    precision: str,
    *,
    num_steps: int,
    rounds: int,
) -> float:
    """Returns how many times as fast a change makes the step: the median of the rounds' ratios."""
    device = resident[0].device
    plain = make_step(Step(), config, resident, precision)
    changed = make_step(how, config, resident, precision)
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
    """Returns the floating-point operations of a step's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def ceiling_flops_per_s(device: torch.device, precision: str, seconds: float) -> float:
    """Returns the operations per second of the fastest square matrix product."""
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
