"""From a checked plan to the objects that the loop turns: in the order in which they are made."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import Tensor, nn

from latent_t2i.model import denoiser, diffusion
from latent_t2i.model.diffusion import Prediction
from latent_t2i.model.ema import EMA
from latent_t2i.model.encoders import latent_affine
from latent_t2i.shards.access import make_loader
from latent_t2i.train import checkpoint, fsdp, initial, trackers
from latent_t2i.train.batches import Batch, Source
from latent_t2i.train.checkpoint import TrainState
from latent_t2i.train.config import Precision, TrainConfig
from latent_t2i.train.device import DevicePrefetcher
from latent_t2i.train.estimate import estimate_run
from latent_t2i.train.graph import CudaRecorder, Recorder
from latent_t2i.train.optim import make_optimizer
from latent_t2i.train.preflight import Plan, run_folder, validate
from latent_t2i.train.progress import METRICS_FILE, Progress
from latent_t2i.train.step_timer import StepTimer

REPLACED = {
    "ACCELERATE_USE_FSDP": "use --fsdp",
    "ACCELERATE_USE_DEEPSPEED": "use --fsdp, which shares out as much as ZeRO stage 3",
}
"""What `accelerate config` can set that a run has its own way of, and which."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A batch in, a loss per example out: `diffusion.loss` with a run's constants."""

    alpha_bar: Tensor  # (num_timesteps,)
    empty_text: Tensor  # (T, D)
    text_scale: Tensor | None  # (D,), for int8 text
    latent_shift: Tensor  # (C, 1, 1)
    latent_scale: Tensor  # (C, 1, 1)
    prediction: Prediction
    snr_gamma: float | None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns losses (b,) float32."""
        latents = diffusion.sample_posterior(batch.latent, batch.posterior_noise)
        text = batch.text.float()
        if self.text_scale is not None:
            text = text * self.text_scale
        text = torch.where(batch.drop[:, None, None], self.empty_text, text)
        return diffusion.loss(
            model,
            self.alpha_bar,
            (latents - self.latent_shift) * self.latent_scale,
            text,
            batch.noise,
            batch.timesteps,
            prediction=self.prediction,
            snr_gamma=self.snr_gamma,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop turns."""

    config: TrainConfig
    plan: Plan
    accelerator: Accelerator
    state: TrainState
    model: nn.Module
    """The denoiser as it is called: `state.unet`, wrapped and maybe compiled."""
    objective: Objective
    source: Source
    prefetcher: DevicePrefetcher
    recorder: Recorder | None
    """What records a step, if it is to be."""
    timer: StepTimer
    progress: Progress


def start(config: TrainConfig) -> Run:
    """Checks a configuration, builds its run and restores its newest checkpoint, if any."""
    chosen, notes = trackers.choose(config.trackers)
    accelerator = make_accelerator(config.mixed_precision, chosen, run_folder(config))
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    plan = validate(config, accelerator.num_processes)
    config = plan.config
    lines = estimate_run(plan, accelerator)
    state, model = make_state(config, plan, accelerator)
    device = accelerator.device
    run = Run(
        config=config,
        plan=plan,
        accelerator=accelerator,
        state=state,
        model=model,
        objective=make_objective(config, plan, device),
        source=make_source(config, plan, accelerator),
        prefetcher=DevicePrefetcher(device),
        recorder=CudaRecorder(device) if config.cuda_graph and device.type == "cuda" else None,
        timer=StepTimer(device),
        progress=Progress(accelerator, plan.folder, config.log_every_steps),
    )
    changes = resume(plan, state)
    if accelerator.is_main_process:
        plan.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"train": asdict(config)}, indent=1)
        (plan.folder / "config.json").write_text(text + "\n")
    run.progress.open(state.step, plan.num_steps, state.metrics)
    if config.cuda_graph and run.recorder is None:
        changes.append("cuda_graph: needs a GPU, found none: steps are taken as they come")
    trackers.start(accelerator, plan.folder, checkpoint.flatten(asdict(config)), state.step)
    for note in (*lines, *plan.notes, *notes, *changes):
        run.progress.say(note)
    run.progress.begin("compiling" if config.compile else "first step")
    return run


def dry_run(config: TrainConfig) -> Path:
    """Checks a configuration and its run so far, prints what it takes and returns its folder.

    Nothing is built and nothing written. Raises ValueError for all that `start` does.
    """
    _, notes = trackers.choose(config.trackers)
    accelerator = make_accelerator(config.mixed_precision)
    plan = validate(replace(config, dry_run=False), accelerator.num_processes)
    lines = [*estimate_run(plan, accelerator), *plan.notes, *notes]
    found = checkpoint.find_all(plan.folder / "checkpoints")
    if found:
        before = checkpoint.read_state(found[-1])["settings"]
        lines += checkpoint.compare_settings(before, plan.settings, plan.folder)
        lines.append(f"would go on from {found[-1]}")
    for line in lines if accelerator.is_main_process else ():
        print(line)
    return plan.folder


def make_accelerator(
    precision: Precision, log_with: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Returns an Accelerator in our precision; fp16 becomes "no", with one warning, without a GPU.

    `log_with` names the trackers that `trackers.start` opens, in the run's folder.

    The precision is passed even where it is "no": accelerate would otherwise take its launcher's.
    Without a GPU, several processes find each other only if accelerate is told `cpu`. Raises
    ValueError where accelerate's own settings ask for what this project does otherwise.
    """
    for name, instead in REPLACED.items():
        if parse_flag_from_env(name):
            raise ValueError(
                f"{name}: set by accelerate's configuration; expected it unset: {instead}"
            )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    notes = cpu_warnings(os.environ, state.num_processes) if on_cpu else []
    if precision == "fp16" and on_cpu:
        notes.append("mixed_precision: fp16 needs a GPU, found none: training in float32")
        precision = "no"
    for note in notes if state.is_main_process else ():
        print(f"warning: {note}", file=sys.stderr)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        kwargs_handlers=[ddp],
        log_with=list(log_with) or None,
        project_config=ProjectConfiguration(logging_dir=folder and str(folder / trackers.FOLDER)),
    )


def cpu_warnings(environment: Mapping[str, str], num_processes: int) -> list[str]:
    """Returns what accelerate's launcher (1.15) does on a CPU without saying so.

    Asked for several processes it starts one: it then leaves the address at which they should meet
    in the environment, but no rank. And it gives a process one thread unless told otherwise.
    """
    warnings = []
    if num_processes == 1 and "MASTER_ADDR" in environment and "RANK" not in environment:
        warnings.append(
            "accelerate launch --cpu starts one process whatever --num_processes says; for N: "
            "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N train/run.py ..."
        )
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if num_processes == 1 and torch.get_num_threads() == 1 < num_cores:
        warnings.append(
            f"training on 1 of {num_cores} cores; for all: "
            f"accelerate launch --num_cpu_threads_per_process {num_cores} train/run.py ..."
        )
    return warnings


def make_state(
    config: TrainConfig, plan: Plan, accelerator: Accelerator
) -> tuple[TrainState, nn.Module]:
    """Returns the state at step 0 and the denoiser as it is called (wrapped, maybe compiled)."""
    torch.manual_seed(config.seed)
    channels, height, width = plan.latent_shape
    unet = denoiser.build(
        config.model,
        latent_channels=channels,
        sample_size=height if height == width else (height, width),
        text_width=plan.shards.manifest.text_width,
    )
    if plan.initial is not None:
        initial.load(plan.initial, unet)
    denoiser.choose_attention(
        unet,
        config.model.attention_kernel,
        device_type=accelerator.device.type,
        precision=accelerator.mixed_precision,
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    unet.to(accelerator.device, memory_format=memory_format)
    shared = config.fsdp and accelerator.num_processes > 1
    if shared:
        fsdp.apply_fsdp(unet, accelerator)
    ema = EMA(config.ema, unet.named_parameters())
    model = accelerator.prepare_model(
        torch.compile(unet) if config.compile else unet,
        device_placement=False,
        evaluation_mode=shared,  # no DistributedDataParallel around what FSDP has shared out
    )
    optimizer = accelerator.prepare(
        make_optimizer(config.optim, unet.parameters(), capturable=config.cuda_graph)
    )
    return TrainState(unet=unet, ema=ema, optimizer=optimizer), model.train()


def resume(plan: Plan, state: TrainState) -> list[str]:
    """Loads the newest checkpoint, if there is one, and returns what to say of it, a line each.

    Raises ValueError where its settings and the plan's cannot be one run.
    """
    found = checkpoint.find_all(plan.folder / "checkpoints")
    if not found:
        return lost_progress(plan.folder)
    before = checkpoint.read_state(found[-1])["settings"]
    changes = checkpoint.compare_settings(before, plan.settings, plan.folder)
    checkpoint.load(found[-1], state)
    if plan.access.kind == "stream":
        changes.append(
            "stream access resumes to the shard: records of those that were being read come again; "
            "map and cache access resume exactly"
        )
    return [f"going on from {found[-1]}", *changes]


def lost_progress(folder: Path) -> list[str]:
    """Returns what to say of a run that was begun and has no checkpoint."""
    left = [name for name in (METRICS_FILE, "bundle") if (folder / name).exists()]
    if not left:
        return []
    return [
        f"{folder} has {' and '.join(left)} but no checkpoint in {folder / 'checkpoints'}: "
        "beginning anew at step 0, these will be replaced"
    ]


def make_source(config: TrainConfig, plan: Plan, accelerator: Accelerator) -> Source:
    """Returns this process's source of batches."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    return Source(
        loader=make_loader(
            plan.shards, plan.order, plan.access, rank=rank, num_processes=num_processes
        ),
        seed=config.seed,
        batch_size=config.batch_size,
        latent_channels=plan.latent_shape[0],
        objective=config.objective,
        rank=rank,
        num_processes=num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )


def make_objective(config: TrainConfig, plan: Plan, device: torch.device) -> Objective:
    """Returns the objective of a run."""
    scale = plan.shards.text_scale
    shift, latent_scale = latent_affine(plan.vae)
    return Objective(
        alpha_bar=diffusion.alpha_bar(config.objective).to(device),
        empty_text=plan.shards.empty_text.float().to(device),
        text_scale=None if scale is None else scale.to(device),
        latent_shift=shift.to(device),
        latent_scale=latent_scale.to(device),
        prediction=config.objective.prediction,
        snr_gamma=config.objective.snr_gamma,
    )
