"""Three ways to run a training step: the bare step, this project's loop, and online encoding.

All use the same denoiser, precision, batch size and fused AdamW. They differ in where batches come
from and in what surrounds the step. A turn is a number of steps after an uncounted one, with a
device synchronisation only at both ends.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from bench.stages.plain_script import CocoImages
from bench.steps.networks import DTYPES
from latent_t2i.model.encoders import latent_affine, load_text_encoder, load_vae
from latent_t2i.train.graph import NUM_WARMUP_STEPS
from latent_t2i.train.loop import loop
from latent_t2i.train.optim import make_optimizer
from latent_t2i.train.setup import Run

MAX_GRAD_NORM = 1.0  # the default of `optim.max_grad_norm`, and of diffusers' example
Resident = tuple[Tensor, Tensor, Tensor, Tensor]
"""Noisy latents (B, C, h, w), timesteps (B,), text (B, T, D), target (B, C, h, w)."""


class TurnOverError(Exception):
    """Raised at the end of a turn, to leave the training loop before it saves anything."""


class Turn:
    """Replaces train.stop.Stop: ends the loop after `num_steps` steps and times them."""

    def __init__(self, run: Run, num_steps: int, num_before: int) -> None:
        self._device, self._timer = run.accelerator.device, run.timer
        self._num_left = num_steps + num_before  # the first ones are not counted
        self._num_steps = num_steps
        self._began_s = 0.0
        self.seconds = 0.0
        self.phases: dict[str, float] = {}
        """Seconds of each phase, from the step timer, since the last line of metrics."""
        self.elapsed_s = 0.0
        """Required by the loop; this benchmark has no time budget."""

    def reason(self, step: int, train_s: float) -> None:
        """Called before each step; raises TurnOverError at the end of the turn."""
        if self._num_left == self._num_steps:
            wait(self._device)
            self._timer.read()
            self._began_s = time.perf_counter()
        if self._num_left == 0:
            wait(self._device)
            self.seconds = time.perf_counter() - self._began_s
            wall_s, shares = self._timer.read()
            self.phases = {name: share * wall_s for name, share in shares.items()}
            raise TurnOverError
        self._num_left -= 1


def wait(device: torch.device) -> None:
    """Synchronises with the device if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(step: Callable[[], None], device: torch.device, num_steps: int) -> float:
    """Returns the seconds of `num_steps` steps, after an uncounted one."""
    step()
    wait(device)
    began = time.perf_counter()
    for _ in range(num_steps):
        step()
    wait(device)
    return time.perf_counter() - began


def then_wait(turn: Callable[[], float], rest_s: float) -> float:
    """Runs a turn, then waits while the workers of a DataLoader finish their prefetching."""
    seconds = turn()
    time.sleep(rest_s)
    return seconds


def ours(run: Run, num_steps: int) -> tuple[float, dict[str, float]]:
    """Returns the seconds of `num_steps` steps of the training loop, and of each phase."""
    # With --cuda-graph, the steps that record the graph are not counted.
    num_before = 1 if run.graph_backend is None else NUM_WARMUP_STEPS + 2
    turn: Any = Turn(run, num_steps, num_before)
    with suppress(TurnOverError):
        loop(run, turn)
    return turn.seconds, turn.phases


def resident_batch(run: Run) -> Resident:
    """Returns the run's first batch on the device, as inputs and target of the denoiser."""
    device = run.accelerator.device
    batch = run.source.batch(0).to(device)
    text = batch.text.float()
    if run.objective.text_scale is not None:
        text = text * run.objective.text_scale
    draws = run.objective.draw(batch)
    return draws.noise, draws.timesteps, text, draws.posterior_noise


def bare_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, resident: Resident, precision: str
) -> Callable[[], None]:
    """Returns a step of the bare loop: forward, mean squared error, backward, clipping, AdamW."""
    noisy, timesteps, text, target = resident
    device, dtype = noisy.device, DTYPES[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            device.type, dtype if precision != "no" else torch.bfloat16, enabled=precision != "no"
        ):
            found = model(noisy, timesteps, text).sample
        scaler.scale(mse_loss(found.float(), target)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()

    return step


def online_step(
    run: Run,
    model: nn.Module,
    *,
    images: Path,
    captions: Path,
    size_px: int,
    encoders: tuple[str, str],
    num_workers: int,
) -> Callable[[], None]:
    """Returns a step that decodes JPEGs and runs both encoders, as diffusers' example does.

    It follows examples/text_to_image/train_text_to_image.py: encoders in the training precision on
    a GPU (float32 on a CPU, where that is faster), one random caption, sampled latents, noise from
    DDPMScheduler, clipped gradients, and the loss fetched in every step.
    """
    device, precision = run.accelerator.device, run.accelerator.mixed_precision
    dtype = DTYPES[precision] if device.type == "cuda" else torch.float32
    vae = load_vae(encoders[0])
    shift, scale = (part.to(device) for part in latent_affine(vae))
    nn.Module.to(vae, device=device, dtype=dtype)
    tokenizer, text_encoder = load_text_encoder(encoders[1])
    nn.Module.to(text_encoder, device=device, dtype=dtype)
    schedule = DDPMScheduler()
    optimizer = make_optimizer(run.plan.config.optim, model.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dataset = CocoImages(images, captions, size_px)
    max_tokens = run.plan.shards.manifest.max_tokens

    def collate(rows: list[Any]) -> tuple[Tensor, Tensor]:
        texts = [found[int(torch.randint(len(found), ()))] for _, _, found in rows]
        ids = tokenizer(
            texts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
        ).input_ids
        return torch.stack([pixels for _, pixels, _ in rows]), ids

    batches = endless(
        DataLoader(
            dataset,
            run.plan.config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
        )
    )

    def step() -> None:
        pixels, ids = (part.to(device, non_blocking=True) for part in next(batches))
        with torch.no_grad():
            latents = vae.encode(pixels.to(dtype)).latent_dist.sample().float()
            text = text_encoder(ids)[0].float()
        latents = (latents - shift) * scale
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.autocast(
            device.type,
            DTYPES[precision] if precision != "no" else torch.bfloat16,
            enabled=precision != "no",
        ):
            found = model(noisy, timesteps, text).sample
        loss = mse_loss(found.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields the batches of a loader, epoch after epoch."""
    for _ in itertools.count():
        yield from loader
