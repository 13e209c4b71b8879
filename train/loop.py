"""Training: one linear loop over batches made elsewhere, its phases in reading order in `loop`.

The host never waits for the device within a step: what a step has to say stays on the device until
the logging interval (progress.py), non-finite steps are skipped there (optim.py), and batches
arrive from a background thread (batches.py). To resume is to call it again with the same
configuration.
"""

import contextlib
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from model.bundle import INFO_FILE, read_info, save_bundle
from model.diffusion import make_scheduler
from model.posthoc import folder_of, save_snapshot
from shards.order import mixed_seed
from train import checkpoint, optim
from train.batches import Batch
from train.config import TrainConfig
from train.preview import make_preview
from train.progress import shorten
from train.setup import Run, start
from train.stop import Reason, Stop
from train.validation import measure


def train(config: TrainConfig) -> Path:
    """Trains, or goes on training, and returns the folder of the bundle.

    Raises ValueError for settings that do not fit each other, the shards or the run so far, and
    where too many steps in a row were not finite. SIGTERM and SIGINT save a checkpoint, then exit
    with 128 plus the signal's number.
    """
    run = start(config)
    stop = Stop(
        run.accelerator,
        num_steps=run.plan.num_steps,
        budget_s=config.max_train_s,
        spent_s=run.state.train_s,
    )
    with contextlib.closing(run.progress), stop:
        reason = loop(run, stop)
        if reason is Reason.SIGNAL:
            run.progress.say(f"stopped by signal {stop.signal}; the same command goes on")
            sys.exit(128 + (stop.signal or 0))
        bundle = finish(run, reason)
    run.accelerator.end_training()
    return bundle


def loop(run: Run, stop: Stop) -> Reason:
    """Takes steps until there is a reason to end; the state is then saved."""
    config, plan, state, ledger = run.config, run.plan, run.state, run.ledger
    parameters = list(state.unet.parameters())
    rank = run.accelerator.process_index
    every, saved, kept = config.ema.snapshot_every_steps, state.step, state.step
    ledger.read()  # the time until here is set-up
    with contextlib.closing(run.source.batches(state.step, plan.num_steps)) as batches:
        while (reason := stop.reason(state.step, state.train_s)) is None:
            with ledger.phase("data"):
                batch = next(batches)
            with ledger.phase("copy"):
                batch = batch.to(run.accelerator.device)
            with ledger.phase("denoise"):
                torch.manual_seed(mixed_seed(config.seed, "dropout", state.step, rank))
                loss = accumulate_gradients(run, batch)
            with ledger.phase("optimiser"):
                rate = optim.learning_rate(config.optim, state.step, plan.num_steps)
                norm, skipped = optim.update(
                    state.optimizer, parameters, rate=rate, max_norm=config.optim.max_grad_norm
                )
            with ledger.phase("ema"):
                state.ema.update(parameters, state.step)
            state.step += 1
            state.train_s = stop.elapsed_s
            run.progress.add(loss, norm, skipped)
            if state.step % config.log_every_steps == 0:
                report(run)
            watch(run, end=state.step == plan.num_steps)
            if every is not None and state.step % every == 0:
                with ledger.phase("save"):
                    snapshot(run)
                kept = state.step
            if state.step % config.checkpoint_every_steps == 0:
                with ledger.phase("save"):
                    save(run)
                saved = state.step
    if run.progress.pending and reason is not Reason.SIGNAL:
        report(run)
    if reason is not Reason.SIGNAL and watch(run, end=True):
        saved = -1  # a checkpoint of this step is older than what was just measured
    if every is not None and reason is not Reason.SIGNAL:
        snapshot(run, again=kept < state.step)
    if saved < state.step:
        save(run)
    return reason


def accumulate_gradients(run: Run, batch: Batch) -> Tensor:
    """Runs the forward and backward passes; returns the mean loss, on the device.

    Processes exchange gradients once, in the last backward pass.
    """
    total = torch.zeros((), device=run.accelerator.device)
    pieces = batch.split(run.plan.micro_batch_size)
    for number, piece in enumerate(pieces, start=1):
        last = number == len(pieces)
        with contextlib.nullcontext() if last else run.accelerator.no_sync(run.model):
            loss = run.objective(run.model, piece).sum() / len(batch)
            run.accelerator.backward(loss)
        total += loss.detach()
    return total


def report(run: Run) -> None:
    """Writes the interval's line; raises ValueError after too many skipped steps in a row."""
    config, state, progress = run.config, run.state, run.progress
    num_steps, figures, bad = progress.fetch(state.step)
    wall_s, shares = run.ledger.read()
    line = {
        **figures,
        "epoch": run.plan.order.num_epochs(state.step),
        "lr": optim.learning_rate(config.optim, state.step - 1, run.plan.num_steps),
        "images_per_s": num_steps * config.batch_size / wall_s,
        "train_s": state.train_s,
        "ledger": shares,
    }
    progress.write(line, remaining_s=remaining_s(run, num_steps / wall_s))
    progress.say_skipped(bad, run.source.loader.suspects)
    if progress.num_skipped_in_a_row > config.max_bad_steps:
        raise ValueError(
            f"{progress.num_skipped_in_a_row} steps in a row up to {state.step} were not finite "
            f"(max_bad_steps: {config.max_bad_steps}) and were skipped; the checkpoints are good; "
            f"records of the last one: {shorten(run.source.loader.suspects(bad[-1]))}"
        )


def remaining_s(run: Run, steps_per_s: float) -> float:
    """Returns how long the run will take from here: to its last step, or to the end of its time."""
    left_s = (run.plan.num_steps - run.state.step) / steps_per_s
    budget_s = run.config.max_train_s
    return left_s if budget_s is None else max(0.0, min(left_s, budget_s - run.state.train_s))


def watch(run: Run, *, end: bool) -> bool:
    """Measures the validation loss and draws a preview where they are due; returns if any was.

    Both are due at their intervals and at the end of the run, once for a step.
    """
    step, progress, validation = run.state.step, run.progress, run.plan.validation
    measuring = validation is not None and (end or step % run.config.validation.every_steps == 0)
    measuring = measuring and progress.validation.get("step") != step
    every = run.config.preview.every_steps
    drawing = every is not None and (end or step % every == 0) and progress.previewed != step
    if not (measuring or drawing):
        return False
    with run.ledger.phase("evaluate"):
        if measuring and validation is not None:
            unet, ema = run.state.unet, run.state.ema
            progress.write_validation(
                {
                    "step": step,
                    "validation": measure(validation, run.accelerator, unet, ema, run.objective),
                }
            )
        if drawing:
            make_preview(run)
            progress.previewed = step
    return True


def snapshot(run: Run, *, again: bool = True) -> None:
    """Keeps the averages for `python -m model.ema`, from the main process; the others wait.

    Before a checkpoint of the same step, so that no kill between the two can lose it. Unless
    `again`, one that is there stays.
    """
    folder, state = run.plan.folder / "snapshots", run.state
    there = folder_of(folder, state.step).is_dir()
    if run.accelerator.is_main_process and (again or not there):
        save_snapshot(
            folder, state.ema, step=state.step, train_s=state.train_s, config=run.plan.settings
        )
    run.accelerator.wait_for_everyone()


def save(run: Run) -> None:
    """Writes a checkpoint, from the main process; the others wait."""
    run.state.metrics = run.progress.state()
    if run.accelerator.is_main_process:
        folder = run.plan.folder / "checkpoints"
        checkpoint.save(folder, run.state, run.plan.settings, keep=run.config.keep_checkpoints)
    run.accelerator.wait_for_everyone()


def finish(run: Run, reason: Reason) -> Path:
    """Writes the bundle, unless an earlier start of this run did, and returns its folder."""
    folder, step = run.plan.folder / "bundle", run.state.step
    if (folder / INFO_FILE).is_file() and read_info(folder)["step"] == step:
        run.progress.say(
            f"{run.plan.folder}: finished at step {step} by {reason.value}; nothing left to do"
        )
        return folder
    if run.accelerator.is_main_process:
        write_bundle(run, folder)
    run.accelerator.wait_for_everyone()
    run.progress.say(f"{folder}: written at step {step}, ended by {reason.value}")
    return folder


def write_bundle(run: Run, folder: Path) -> None:
    """Writes the bundle with the averaged weights."""
    plan, state = run.plan, run.state
    unet = UNet2DConditionModel.from_config(state.unet.config)
    unet.load_state_dict(state.ema.average)
    save_bundle(
        folder,
        unet=unet,
        vae=plan.vae,
        tokenizer=plan.tokenizer,
        text_encoder=plan.text_encoder,
        scheduler=make_scheduler(run.config.objective),
        max_tokens=plan.shards.manifest.max_tokens,
        dtype=run.config.bundle_dtype,
        info={
            "name": run.config.name,
            "step": state.step,
            "train_seconds": state.train_s,
            "num_parameters": unet.num_parameters(),
            "precision": run.accelerator.mixed_precision,
            "shards_sha256": plan.settings["shards_sha256"],
            "config": plan.settings,
            "metrics": run.progress.last,
        },
    )
