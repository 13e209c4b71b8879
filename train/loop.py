"""The training loop and what it calls at intervals: reports, validation, previews, checkpoints.

Within a step the host never waits for the device: losses, gradient norms and skip flags stay there
until the logging interval (progress.py), and so does the decision to skip a step (optim.py). Run it
with `accelerate launch train/run.py`, or call `train(TrainConfig(...))`.
"""

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from latent_t2i.model.posthoc import folder_of, save_snapshot
from latent_t2i.shards.order import mixed_seed
from latent_t2i.train import checkpoint, fsdp, optim, prepare
from latent_t2i.train.batches import Batch
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.export import finish
from latent_t2i.train.graph import StepGraph
from latent_t2i.train.preflight import run_folder
from latent_t2i.train.preview import make_preview
from latent_t2i.train.progress import MAX_STEPS_READ, shorten
from latent_t2i.train.run_lock import lock_run
from latent_t2i.train.setup import Run, dry_run, join_processes, start
from latent_t2i.train.stop import Stop, StopReason, prepare_signals
from latent_t2i.train.validation import measure


def train(config: TrainConfig) -> Path:
    """Trains, or resumes, and returns the folder of the bundle; for a dry run, the run's folder.

    Raises ValueError for settings that do not fit each other, the shards or the existing run, for a
    run that another process is training, and after too many non-finite steps in a row. The signals
    of stop.py save a checkpoint, then exit with 128 plus the signal's number.
    """
    if config.dry_run:
        return dry_run(config)
    prepare_signals()
    with lock_run(run_folder(config), join_processes()):
        run = start(config)
        stop = Stop(
            run.accelerator,
            num_steps=run.plan.num_steps,
            budget_s=run.plan.config.max_train_s,
            spent_s=run.state.train_s,
        )
        with contextlib.closing(run.progress), stop:
            reason = loop(run, stop)
            if reason is StopReason.SIGNAL:
                run.progress.say(f"stopped by {stop.signal_name}; run the same command to resume")
                sys.exit(128 + (stop.signal or 0))
            bundle = finish(run, reason)
        run.accelerator.end_training()
    return bundle


def loop(run: Run, stop: Stop) -> StopReason:
    """Trains until there is a reason to stop, saves the state and returns the reason."""
    config, plan, state, timer = run.plan.config, run.plan, run.state, run.timer
    parameters = list(state.unet.parameters())
    device = run.accelerator.device
    update = partial(
        optim.update,
        state.optimizer,
        parameters,
        max_norm=config.optim.max_grad_norm,
        on_device=device.type != "cpu",
    )
    graph = None
    if run.graph_backend is not None:
        graph = StepGraph(
            lambda batch, rate: (accumulate_gradients(run, batch), *update(rate=rate)),
            device,
            run.graph_backend,
        )
    snapshot_every = config.ema.snapshot_every_steps
    saved_step = snapshot_step = state.step
    batches = run.source.batches(state.step, plan.num_steps, stream=run.prefetcher.stream)
    timer.read()  # starts the first interval: the set-up is not part of it

    with contextlib.closing(batches):
        while (reason := stop.reason(state.step, state.train_s)) is None:
            # Load the next batch and copy it to the device.
            with timer.phase("data"):
                batch = next(batches)
            with timer.phase("copy"):
                batch = run.prefetcher.to_device(batch)

            # Accumulate gradients and update the weights.
            rate = optim.learning_rate(config.optim, state.step, plan.num_steps)
            rank = run.accelerator.process_index
            # Seeded by step, so that a resumed run draws the same dropout masks.
            torch.manual_seed(mixed_seed(config.seed, "dropout", state.step, rank))
            if graph is not None:
                with timer.phase("denoise"):  # includes the update
                    loss, norm, skipped = graph(batch, rate)
            else:
                with timer.phase("denoise"):
                    loss = accumulate_gradients(run, batch)
                with timer.phase("optimiser"):
                    norm, skipped = update(rate=rate)

            # Update the moving averages.
            with timer.phase("ema"):
                state.ema.update(parameters, state.step)
            state.step += 1
            state.train_s = stop.elapsed_s

            # Report, validate and draw a preview, each at its interval.
            run.progress.add(loss, norm, skipped)
            if state.step % config.log_every_steps == 0:
                report(run)
            evaluate(run, last=state.step == plan.num_steps)

            # Save. The snapshot comes first, so that a kill between the two cannot lose it.
            if snapshot_every is not None and state.step % snapshot_every == 0:
                with timer.phase("save"):
                    snapshot(run)
                snapshot_step = state.step
            if state.step % config.checkpoint_every_steps == 0:
                with timer.phase("save"):
                    save(run)
                saved_step = state.step

    # Finish the last interval, unless the run will be resumed.
    evaluated = False
    if reason is not StopReason.SIGNAL:
        if run.progress.pending:
            report(run)
        evaluated = evaluate(run, last=True)
        if snapshot_every is not None:
            snapshot(run, replace=snapshot_step < state.step)
    if evaluated or saved_step < state.step:  # a checkpoint records the last validation
        save(run)
    return reason


def accumulate_gradients(run: Run, batch: Batch) -> Tensor:
    """Runs the forward and backward passes and returns the mean loss, on the device."""
    total = torch.zeros((), device=run.accelerator.device)
    pieces = batch.split(run.plan.micro_batch_size)
    for number, piece in enumerate(pieces, start=1):
        # Gradients are reduced over the processes once, in the last backward pass.
        with (
            contextlib.nullcontext()
            if number == len(pieces)
            else fsdp.no_gradient_sync(run.accelerator, run.state.unet, run.model)
        ):
            losses = run.objective(run.model, piece, run.objective.draw(piece))
            loss = losses.sum() / len(batch)  # pieces add up to the mean
            run.accelerator.backward(loss)
        total += loss.detach()
    return total


def report(run: Run) -> None:
    """Writes the interval's metrics; raises ValueError after too many skipped steps in a row."""
    config, state, progress = run.plan.config, run.state, run.progress
    num_before = progress.num_skipped_in_a_row
    num_steps, figures, skipped = progress.fetch(state.step)
    wall_s, shares = run.timer.read()
    line = {
        **figures,
        "epoch": run.plan.order.num_epochs(state.step),
        "lr": optim.learning_rate(config.optim, state.step - 1, run.plan.num_steps),
        "images_per_s": num_steps * config.batch_size / wall_s,
        "train_s": state.train_s,
        "time_breakdown": shares,
    }
    remaining_s = (run.plan.num_steps - state.step) * wall_s / num_steps
    if config.max_train_s is not None:
        remaining_s = max(0.0, min(remaining_s, config.max_train_s - state.train_s))
    progress.write(line, remaining_s=remaining_s)
    scaler = state.optimizer.scaler
    loss_scale = scaler.get_scale() if scaler is not None and skipped.steps else None
    progress.say_skipped(skipped, run.source.loader.nonfinite_keys, loss_scale)
    first = state.step - num_steps
    flags = [step in skipped.steps for step in range(first, state.step)]
    streak = longest_streak(first, num_before, flags)
    if len(streak) > config.max_bad_steps:
        roll_back(run, streak)


def longest_streak(first: int, num_before: int, skipped: Sequence[bool]) -> range:
    """Returns the longest run of consecutive skipped steps that ends in an interval.

    The interval starts at step `first`, and `num_before` skipped steps precede it.
    """
    longest, start = range(0), first - num_before
    for step, is_skipped in enumerate(skipped, start=first):
        if not is_skipped:
            start = step + 1
        longest = max(longest, range(start, step + 1), key=len)
    return longest


def roll_back(run: Run, streak: range) -> NoReturn:
    """Restores the last checkpoint from before the skipped steps, then raises ValueError.

    Later checkpoints are deleted, so that the same command resumes from the restored one. The
    records of steps with a finite loss are finite too, so they are not read again.
    """
    folder = run.plan.folder / "checkpoints"
    last_good = checkpoint.find_newest(folder, streak.start)
    if last_good is not None:
        checkpoint.load(last_good, run.state)
    run.accelerator.wait_for_everyone()  # until all processes have read it
    main = run.accelerator.is_main_process
    deleted = checkpoint.delete_after(folder, streak.start) if main else []
    run.accelerator.wait_for_everyone()
    names = f", deleted {', '.join(path.name for path in deleted)}" if deleted else ""
    restored = f"restored {last_good}{names}" if last_good else "no checkpoint precedes them"
    read = [step for step in streak[-MAX_STEPS_READ:] if step not in run.progress.overflowed]
    keys = [key for step in read for key in run.source.loader.nonfinite_keys(step)]
    found = shorten(list(dict.fromkeys(keys))) if keys else "all finite"
    raise ValueError(
        f"steps {streak[0]} to {streak[-1]}: {len(streak)} steps in a row had non-finite gradients "
        f"(max_bad_steps: {run.plan.config.max_bad_steps}) and were skipped; {restored}; records "
        f"of the last ones: {found}. If these records are broken, "
        "encode the shards without them and start a run with another --name. If they are intact, "
        "run the same command with a lower --optim.learning-rate. To continue past these steps, "
        "use a higher --max-bad-steps."
    )


def evaluate(run: Run, *, last: bool) -> bool:
    """Measures the validation loss and draws a preview, if due; returns whether either was.

    Both are due at their intervals and at the end of the run, but only once per step.
    """
    config, step, progress = run.plan.config, run.state.step, run.progress
    validation = run.plan.validation if progress.validation.get("step") != step else None
    if not last and step % config.validation.every_steps:
        validation = None
    every = config.preview.every_steps
    preview = every is not None and (last or step % every == 0) and progress.previewed != step
    if validation is None and not preview:
        return False
    eagerly = prepare.without_compilation() if config.compile else contextlib.nullcontext()
    with run.timer.phase("evaluate"), eagerly:
        if validation is not None:
            unet, ema = run.state.unet, run.state.ema
            measured = measure(validation, run.accelerator, unet, ema, run.objective)
            progress.write_validation({"step": step, "validation": measured})
        if preview:
            make_preview(run)
            progress.previewed = step
    return True


def snapshot(run: Run, *, replace: bool = True) -> None:
    """Saves the averages for post-hoc EMA, on the main process; the others wait.

    Without `replace`, an existing snapshot of this step is kept.
    """
    folder, state = run.plan.folder / "snapshots", run.state
    main = run.accelerator.is_main_process
    averages = {s: fsdp.full_tensors(a, keep=main) for s, a in state.ema.powers.items()}
    if main and (replace or not folder_of(folder, state.step).is_dir()):
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
    """Writes a checkpoint, on the main process; the others wait.

    Raises ValueError, as `report` does, after too many skipped steps in a row.
    """
    config, state, num_before = run.plan.config, run.state, run.progress.num_skipped_in_a_row
    state.metrics = run.progress.state()
    skipped = [bool(row[2]) for row in state.metrics["rows"]]
    streak = longest_streak(state.step - len(skipped), num_before, skipped)
    if len(streak) > config.max_bad_steps:
        report(run)  # rolls back and raises, so the newest checkpoint stays a good one
    checkpoint.save(
        run.plan.folder / "checkpoints",
        state,
        run.plan.settings,
        keep=config.keep_checkpoints,
        write=run.accelerator.is_main_process,
    )
    run.accelerator.wait_for_everyone()
