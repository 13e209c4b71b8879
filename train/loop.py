"""Training: one linear loop over batches made elsewhere, its phases in reading order in `loop`.

The host never waits for the device within a step: what a step has to say stays on the device until
the logging interval (progress.py), non-finite steps are skipped there (optim.py), and batches
arrive from a background thread (batches.py). To resume is to call it again with the same
configuration.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latent_t2i.model.bundle import INFO_FILE, read_info, save_bundle
from latent_t2i.model.diffusion import make_scheduler
from latent_t2i.model.posthoc import folder_of, save_snapshot
from latent_t2i.shards.order import mixed_seed
from latent_t2i.train import checkpoint, fsdp, optim
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.graph import Outcome, Recorder, StepGraph
from latent_t2i.train.preview import make_preview
from latent_t2i.train.progress import MAX_STEPS_READ, shorten
from latent_t2i.train.setup import Run, dry_run, start
from latent_t2i.train.stop import Reason, Stop
from latent_t2i.train.validation import measure


def train(config: TrainConfig) -> Path:
    """Trains, or goes on training, and returns the folder of the bundle; of a dry run, the run's.

    Raises ValueError for settings that do not fit each other, the shards or the run so far, and
    where too many steps in a row were not finite. SIGTERM and SIGINT save a checkpoint, then exit
    with 128 plus the signal's number.
    """
    if config.dry_run:
        return dry_run(config)
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
    config, plan, state, timer = run.config, run.plan, run.state, run.timer
    parameters = list(state.unet.parameters())
    rank = run.accelerator.process_index
    every, saved, kept = config.ema.snapshot_every_steps, state.step, state.step
    graph = None if run.recorder is None else record_steps(run, run.recorder, parameters)
    timer.read()  # the time until here is set-up
    with contextlib.closing(run.source.batches(state.step, plan.num_steps)) as batches:
        while (reason := stop.reason(state.step, state.train_s)) is None:
            with timer.phase("data"):
                batch = run.prefetcher.next(batches)
            with timer.phase("copy"):
                batch = run.prefetcher.bring(batch)
            rate = optim.learning_rate(config.optim, state.step, plan.num_steps)
            torch.manual_seed(mixed_seed(config.seed, "dropout", state.step, rank))
            if graph is not None:
                with timer.phase("denoise"):  # and the update with it
                    loss, norm, skipped = graph(batch, rate)
            else:
                with timer.phase("denoise"):
                    loss = accumulate_gradients(run, batch)
                with timer.phase("optimiser"):
                    norm, skipped = update(run, parameters, rate)
            with timer.phase("ema"):
                state.ema.update(parameters, state.step)
            state.step += 1
            state.train_s = stop.elapsed_s
            run.progress.add(loss, norm, skipped)
            if state.step % config.log_every_steps == 0:
                report(run)
            watch(run, end=state.step == plan.num_steps)
            if every is not None and state.step % every == 0:
                with timer.phase("save"):
                    snapshot(run)
                kept = state.step
            if state.step % config.checkpoint_every_steps == 0:
                with timer.phase("save"):
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
        with (
            contextlib.nullcontext()
            if last
            else fsdp.without_exchange(run.accelerator, run.state.unet, run.model)
        ):
            loss = run.objective(run.model, piece).sum() / len(batch)
            run.accelerator.backward(loss)
        total += loss.detach()
    return total


def update(run: Run, parameters: list[nn.Parameter], rate: float | Tensor) -> tuple[Tensor, Tensor]:
    """Updates the weights or skips; returns the gradients' norm and whether, on the device."""
    max_norm = run.config.optim.max_grad_norm
    ahead = run.accelerator.device.type != "cpu"
    return optim.update(run.state.optimizer, parameters, rate=rate, max_norm=max_norm, ahead=ahead)


def record_steps(run: Run, recorder: Recorder, parameters: list[nn.Parameter]) -> StepGraph:
    """Returns what takes steps by playing one back."""

    def take_step(batch: Batch, rate: Tensor) -> Outcome:
        loss = accumulate_gradients(run, batch)
        return loss, *update(run, parameters, rate)

    return StepGraph(take_step, run.accelerator.device, recorder)


def report(run: Run) -> None:
    """Writes the interval's line; raises ValueError after too many skipped steps in a row."""
    config, state, progress = run.config, run.state, run.progress
    num_before = progress.num_skipped_in_a_row
    num_steps, figures, bad = progress.fetch(state.step)
    wall_s, shares = run.timer.read()
    line = {
        **figures,
        "epoch": run.plan.order.num_epochs(state.step),
        "lr": optim.learning_rate(config.optim, state.step - 1, run.plan.num_steps),
        "images_per_s": num_steps * config.batch_size / wall_s,
        "train_s": state.train_s,
        "time_breakdown": shares,
    }
    progress.write(line, remaining_s=remaining_s(run, num_steps / wall_s))
    progress.say_skipped(bad, run.source.loader.nonfinite_keys)
    first = state.step - num_steps
    streak = longest_streak(num_before, [first + i in bad for i in range(num_steps)])
    if streak.num_steps > config.max_bad_steps:
        give_up(run, range(first + streak.end - streak.num_steps, first + streak.end))


@dataclass(frozen=True)
class Streak:
    """Skipped steps in a row."""

    num_steps: int = 0
    end: int = 0
    """Place in the interval after the last of them."""


def longest_streak(num_before: int, skipped: Sequence[bool]) -> Streak:
    """Returns the longest streak of an interval, of which `num_before` steps lie before it."""
    longest, num_steps = Streak(), num_before
    for place, bad in enumerate(skipped):
        num_steps = num_steps + 1 if bad else 0
        longest = max(longest, Streak(num_steps, place + 1), key=lambda streak: streak.num_steps)
    return longest


def give_up(run: Run, streak: range) -> NoReturn:
    """Restores the last checkpoint from before these skipped steps and raises ValueError.

    Checkpoints of later steps are deleted, so that the same command goes on from the good one. The
    lines of metrics.jsonl stay until then.
    """
    folder = run.plan.folder / "checkpoints"
    good = checkpoint.find_good(folder, streak.start)
    if good is not None:
        checkpoint.load(good, run.state)
    run.accelerator.wait_for_everyone()  # all have read it before any is gone
    deleted = checkpoint.roll_back(folder, streak.start) if run.accelerator.is_main_process else []
    run.accelerator.wait_for_everyone()
    gone = f", deleted {', '.join(path.name for path in deleted)}" if deleted else ""
    restored = f"restored {good}{gone}" if good else "there is no checkpoint from before them"
    keys = [
        key for step in streak[-MAX_STEPS_READ:] for key in run.source.loader.nonfinite_keys(step)
    ]
    raise ValueError(
        f"steps {streak[0]} to {streak[-1]}: {len(streak)} in a row were not finite "
        f"(max_bad_steps: {run.config.max_bad_steps}) and were skipped; {restored}; records of the "
        f"last ones: {shorten(list(dict.fromkeys(keys)))}. If these are broken, make the shards "
        "without them and begin anew under another --name; if they are sound, go on from the "
        "checkpoint with the same command and a lower --optim.learning-rate; to pass over these "
        "steps, with a higher --max-bad-steps"
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
    with run.timer.phase("evaluate"):
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
    main = run.accelerator.is_main_process
    averages = {s: fsdp.full_tensors(a, keep=main) for s, a in state.ema.powers.items()}
    if main and (again or not there):
        save_snapshot(
            folder,
            state.ema.config,
            averages,
            step=state.step,
            train_s=state.train_s,
            settings=run.plan.settings,
        )
    run.accelerator.wait_for_everyone()


def save(run: Run) -> None:
    """Writes a checkpoint, from the main process; the others wait.

    Gives up as `report` does, so that no checkpoint follows more skipped steps than a run may have.
    """
    config, state, before = run.config, run.state, run.progress.num_skipped_in_a_row
    state.metrics = run.progress.state()
    skipped = [bool(row[2]) for row in state.metrics["rows"]]
    if longest_streak(before, skipped).num_steps > config.max_bad_steps:
        report(run)
    last = next((i for i, bad in enumerate(reversed(skipped)) if not bad), None)
    checkpoint.save(
        run.plan.folder / "checkpoints",
        state,
        run.plan.settings,
        keep=config.keep_checkpoints,
        write=run.accelerator.is_main_process,
        num_skipped_in_a_row=before + len(skipped) if last is None else last,
    )
    run.accelerator.wait_for_everyone()


def finish(run: Run, reason: Reason) -> Path:
    """Writes the bundle, unless an earlier start of this run did, and returns its folder."""
    run.plan.shards.finish_verification()
    if run.plan.validation is not None:
        run.plan.validation.shards.finish_verification()
    folder, step = run.plan.folder / "bundle", run.state.step
    if (folder / INFO_FILE).is_file() and read_info(folder)["step"] == step:
        run.progress.say(
            f"{run.plan.folder}: finished at step {step} by {reason.value}; nothing left to do"
        )
        return folder
    main = run.accelerator.is_main_process
    average = fsdp.full_tensors(run.state.ema.average, keep=main)
    if main:
        write_bundle(run, folder, average)
    run.accelerator.wait_for_everyone()
    run.progress.say(f"{folder}: written at step {step}, ended by {reason.value}")
    return folder


def write_bundle(run: Run, folder: Path, average: Mapping[str, Tensor]) -> None:
    """Writes the bundle with the averaged weights."""
    plan, state = run.plan, run.state
    unet = UNet2DConditionModel.from_config(state.unet.config)
    unet.load_state_dict(average)
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
