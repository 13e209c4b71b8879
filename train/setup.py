"""Builds a run from its configuration: processes, network, optimizer, batches and progress."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn

from latent_t2i.model import denoiser, diffusion
from latent_t2i.model.build_tools import require_build_tools
from latent_t2i.model.ema import EMA
from latent_t2i.model.encoders import latent_affine
from latent_t2i.shards.access import make_loader
from latent_t2i.shards.order import mixed_seed
from latent_t2i.train import checkpoint, fsdp, initial, prepare, trackers
from latent_t2i.train.batches import BatchSource
from latent_t2i.train.checkpoint import TrainState
from latent_t2i.train.config import Precision, TrainConfig
from latent_t2i.train.device import DevicePrefetcher
from latent_t2i.train.estimate import estimate_run
from latent_t2i.train.graph import CudaGraphBackend, GraphBackend
from latent_t2i.train.objective import Objective
from latent_t2i.train.on_main import on_main
from latent_t2i.train.optim import make_optimizer
from latent_t2i.train.preflight import Plan, run_folder, validate
from latent_t2i.train.progress import METRICS_FILE, Progress
from latent_t2i.train.step_timer import StepTimer

# What accelerate's configuration and launcher can set, and the setting of this project for it.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "use --fsdp",
    "ACCELERATE_USE_DEEPSPEED": "use --fsdp, which shards as much as ZeRO stage 3",
    "ACCELERATE_USE_MEGATRON_LM": "use --fsdp",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use --fsdp",
    "ACCELERATE_DYNAMO_BACKEND": "use --compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "use --micro-batch-size",
}
# Other processes wait while the main one saves or draws a preview. PyTorch's 10 minutes are not
# enough for the checkpoint of a large network on a slow disk.
PROCESS_GROUP_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop uses; the settings are in `plan.config`."""

    plan: Plan
    accelerator: Accelerator
    state: TrainState
    model: nn.Module
    """`state.unet`, wrapped for several processes."""
    objective: Objective
    source: BatchSource
    prefetcher: DevicePrefetcher
    graph_backend: GraphBackend | None
    """Captures the step as a CUDA graph, if requested."""
    timer: StepTimer
    progress: Progress


def start(config: TrainConfig) -> Run:
    """Checks a configuration, builds its run and restores its newest checkpoint, if any."""
    tracker_names, notes = trackers.choose(config.trackers)
    accelerator = make_accelerator(config.mixed_precision, tracker_names, run_folder(config))
    if accelerator.is_main_process:
        checkpoint.repair(run_folder(config) / "checkpoints")
    accelerator.wait_for_everyone()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")  # "high" is TF32
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.benchmark = True  # shapes repeat, so the search for kernels pays off
    plan = make_plan(config, accelerator)
    estimate = estimate_run(plan, accelerator)
    state, model = make_state(plan, accelerator)
    device = accelerator.device
    use_graph = plan.config.cuda_graph and device.type == "cuda"
    run = Run(
        plan=plan,
        accelerator=accelerator,
        state=state,
        model=model,
        objective=make_objective(plan, device),
        source=make_source(plan, accelerator),
        prefetcher=DevicePrefetcher(device),
        graph_backend=CudaGraphBackend(device) if use_graph else None,
        timer=StepTimer(device),
        progress=Progress(accelerator, plan.folder, plan.config.log_every_steps),
    )
    changes = resume(plan, state)
    accelerator.wait_for_everyone()  # until all processes have read the checkpoint
    settings = asdict(plan.config)
    if accelerator.is_main_process:
        checkpoint.delete_old(plan.folder / "checkpoints", state, keep=plan.config.keep_checkpoints)
        plan.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"train": settings}, indent=1)
        (plan.folder / "config.json").write_text(text + "\n")
    run.progress.open(state.step, plan.num_steps, state.metrics)
    if plan.config.cuda_graph and not use_graph:
        changes.append("cuda_graph: needs a GPU, found none; running without it")
    trackers.start(accelerator, plan.folder, checkpoint.flatten(settings), state.step)
    for note in (*estimate, *plan.notes, *notes, *changes):
        run.progress.say(note)
    run.progress.begin("compiling" if plan.config.compile else "first step")
    return run


def dry_run(config: TrainConfig) -> Path:
    """Checks a configuration and its existing run, prints an estimate and returns the run's folder.

    Builds no network and writes nothing. Raises ValueError as `start` does.
    """
    _, notes = trackers.choose(config.trackers)
    accelerator = make_accelerator(config.mixed_precision)
    # dry_run is False in every checkpoint, so it must not count as a changed setting.
    plan = make_plan(replace(config, dry_run=False), accelerator)
    lines = [*estimate_run(plan, accelerator), *plan.notes, *notes]
    found = checkpoint.find_all(plan.folder / "checkpoints")
    if found:
        before = checkpoint.read_state(found[-1])["settings"]
        lines += checkpoint.compare_settings(before, plan.settings, plan.folder)
        lines.append(f"would resume from {found[-1]}")
    for line in lines if accelerator.is_main_process else ():
        print(line)
    return plan.folder


def make_plan(config: TrainConfig, accelerator: Accelerator) -> Plan:
    """Checks a configuration on this machine; raises ValueError as `validate` does."""
    if config.compile:
        require_build_tools(accelerator.device.type)
    return validate(config, accelerator.num_processes)


def join_processes() -> PartialState:
    """Joins the run's process group, if it has several processes, and returns its state.

    Raises ValueError if accelerate's configuration requests a feature that this project does not
    use.
    """
    for name, instead in UNSUPPORTED.items():
        value = os.environ.get(name, "")
        off = ("1",) if name.endswith("_STEPS") else ("0", "f", "false", "n", "no", "off")
        if value and value.lower() not in off:
            raise ValueError(
                f"{name}: accelerate's configuration or launcher sets it to {value!r}, expected it "
                f"unset; {instead}"
            )
    # Without a GPU, several processes only form a group if accelerate is given `cpu`. The first
    # PartialState creates the group, so a timeout given to Accelerator would come too late.
    return PartialState(cpu=runs_on_cpu(), timeout=PROCESS_GROUP_TIMEOUT)


def runs_on_cpu() -> bool:
    """Returns whether the run uses the CPU: on request, or because there is no GPU."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def make_accelerator(
    precision: Precision, log_with: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Returns an Accelerator; on a CPU that lacks a precision, it becomes "no", with a warning.

    `log_with` names the trackers that `trackers.start` opens in `folder`, the run's. Raises
    ValueError as `join_processes` does.
    """
    state, on_cpu = join_processes(), runs_on_cpu()
    notes = cpu_warnings(os.environ, state.num_processes) if on_cpu else []
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):  # "no" is also the launcher's default
        notes.append(
            f"mixed_precision: accelerate's launcher was given {launcher}, which has no effect; "
            f"the run uses {precision}, its own setting"
        )
    if precision == "fp16" and on_cpu:
        notes.append("mixed_precision: fp16 needs a GPU, found none; training in float32")
        precision = "no"
    if precision == "bf16" and on_cpu and not multiplies_bf16():
        notes.append(
            "mixed_precision: bf16 needs bfloat16 instructions, found a CPU without, where each "
            "step would take about twenty times as long; training in float32"
        )
        precision = "no"
    for note in notes if state.is_main_process else ():
        print(f"warning: {note}", file=sys.stderr)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # saves a copy of gradients
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,  # also "no", which otherwise means the launcher's setting
        kwargs_handlers=[ddp],
        log_with=list(log_with) or None,
        project_config=ProjectConfiguration(logging_dir=folder and str(folder / trackers.FOLDER)),
    )


def multiplies_bf16() -> bool:
    """Returns whether this CPU multiplies in bfloat16; other x86 CPUs emulate it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_warnings(environment: Mapping[str, str], num_processes: int) -> list[str]:
    """Returns warnings about what accelerate's launcher (1.15) does on a CPU without saying so."""
    warnings = []
    # With --cpu it starts one process for any --num_processes. It then sets the address of the
    # process group, but no rank.
    if num_processes == 1 and "MASTER_ADDR" in environment and "RANK" not in environment:
        warnings.append(
            "accelerate launch --cpu starts one process for any --num_processes; for N processes: "
            "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N train/run.py ..."
        )
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if num_processes == 1 and torch.get_num_threads() == 1 < num_cores:
        warnings.append(
            f"training on 1 of {num_cores} cores; for all: "
            f"accelerate launch --num_cpu_threads_per_process {num_cores} train/run.py ..."
        )
    return warnings


def make_state(plan: Plan, accelerator: Accelerator) -> tuple[TrainState, nn.Module]:
    """Returns the state at step 0, and the network as it is called (wrapped)."""
    config = plan.config
    torch.manual_seed(config.seed)  # the same weights in all processes, which FSDP requires
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
        prepare.checkpoint_activations(unet, dropout=config.model.dropout)
    unet.to(accelerator.device)
    sharded = config.fsdp and accelerator.num_processes > 1
    if config.channels_last:
        prepare.use_channels_last(unet, sharded=sharded)
    if sharded:
        fsdp.apply_fsdp(unet, accelerator)
    ema = EMA(config.ema, unet.named_parameters())  # after FSDP, so that averages are sharded too
    if config.compile:
        prepare.compile_blocks(unet, num_shapes=len(plan.shards.latent_shapes))
    model = accelerator.prepare_model(
        unet,
        device_placement=False,
        evaluation_mode=sharded,  # no DistributedDataParallel around an FSDP network
    )
    optimizer = accelerator.prepare(
        make_optimizer(config.optim, unet.parameters(), capturable=config.cuda_graph)
    )
    return TrainState(unet=unet, ema=ema, optimizer=optimizer), model.train()


def resume(plan: Plan, state: TrainState) -> list[str]:
    """Loads the newest checkpoint, if there is one; returns lines for the log.

    Raises ValueError if the run's settings do not allow it.
    """
    found = on_main(lambda: checkpoint.find_all(plan.folder / "checkpoints"))
    if not found:
        left = [name for name in (METRICS_FILE, "bundle") if (plan.folder / name).exists()]
        return [
            f"{plan.folder / name}: found without a checkpoint in {plan.folder / 'checkpoints'}; "
            "starting at step 0, it will be replaced"
            for name in left
        ]
    before = on_main(lambda: checkpoint.read_state(found[-1])["settings"])
    changes = checkpoint.compare_settings(before, plan.settings, plan.folder)
    checkpoint.load(found[-1], state)
    if plan.access.kind == "stream":
        changes.append(
            "stream access resumes at the start of a shard, so the records of shards that were "
            "partly read are repeated; map and cache access resume exactly"
        )
    return [f"resuming from {found[-1]}", *changes]


def make_source(plan: Plan, accelerator: Accelerator) -> BatchSource:
    """Returns this process's source of batches."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    return BatchSource(
        loader=make_loader(
            plan.shards, plan.order, plan.access, rank=rank, num_processes=num_processes
        ),
        batch_size=plan.config.batch_size,
        rank=rank,
        num_processes=num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )


def make_objective(plan: Plan, device: torch.device) -> Objective:
    """Returns the objective, its constants on the device."""
    config, scale = plan.config.objective, plan.shards.text_scale
    latent_shift, latent_scale = latent_affine(plan.vae)
    return Objective(
        alpha_bar=diffusion.alpha_bar(config).to(device),
        empty_text=plan.shards.empty_text.float().to(device),
        text_scale=None if scale is None else scale.to(device),
        latent_shift=latent_shift.to(device),
        latent_scale=latent_scale.to(device),
        config=config,
        seed=mixed_seed(plan.config.seed, "draws"),
    )
