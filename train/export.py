"""Ends a run: writes its bundle, or checks the one that an earlier start has written."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel
from torch import Tensor

from latent_t2i.model.bundle import INFO_FILE, make_pipeline, read_info, save_bundle
from latent_t2i.model.diffusion import make_scheduler
from latent_t2i.train import fsdp
from latent_t2i.train.setup import Run
from latent_t2i.train.stop import StopReason

# In the run's folder and the format of `sha256sum --check`.
HASHES_FILE = "bundle.sha256"


def finish(run: Run, reason: StopReason) -> Path:
    """Writes the bundle, unless it exists and is intact, and returns its folder."""
    run.plan.shards.finish_verification()
    if run.plan.validation is not None:
        run.plan.validation.shards.finish_verification()
    folder, step = run.plan.folder / "bundle", run.state.step
    main = run.accelerator.is_main_process
    # Only the main process decides: it may be rewriting the files while the others look.
    [fault] = broadcast_object_list([find_fault(run, folder) if main else None])
    if fault is None:
        run.progress.say(
            f"{run.plan.folder}: finished at step {step} ({reason.value}); nothing left to do"
        )
        return folder
    if folder.exists():
        run.progress.say(f"{folder}: writing it again: {fault}")
    average = fsdp.full_tensors(run.state.ema.average, keep=main)
    if main:
        write_bundle(run, folder, average)
    run.accelerator.wait_for_everyone()
    run.progress.say(f"{folder}: written at step {step} ({reason.value})")
    return folder


def find_fault(run: Run, folder: Path) -> str | None:
    """Returns why a bundle is not the intact one of this run and step; None if it is."""
    hashes = run.plan.folder / HASHES_FILE
    for path in (folder / INFO_FILE, hashes):
        if not path.is_file():
            return f"{path} is missing"
    recorded = hashes.read_text(errors="replace").splitlines()
    for line in sorted({*recorded} ^ {*hash_files(folder)}):
        return f"{line.partition('  ')[2]}: its hash is not the one in {hashes}"
    info = read_info(folder)
    for name, before, now in (
        ("step", info["step"], run.state.step),
        ("bundle_dtype", info["config"]["bundle_dtype"], run.plan.config.bundle_dtype),
    ):
        if before != now:
            return f"{name} changed from {before!r} to {now!r}"
    return None


def hash_files(folder: Path) -> list[str]:
    """Returns a line with hash and path for each file of a bundle."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{sha256}  {path.relative_to(folder.parent).as_posix()}")
    return lines


def write_bundle(run: Run, folder: Path, average: Mapping[str, Tensor]) -> None:
    """Writes the bundle with the averaged weights, then the hashes of its files."""
    config, plan, state = run.plan.config, run.plan, run.state
    unet = UNet2DConditionModel.from_config(state.unet.config)
    unet.load_state_dict(average)
    save_bundle(
        folder,
        make_pipeline(
            unet=unet,
            vae=plan.vae,
            tokenizer=plan.tokenizer,
            text_encoder=plan.text_encoder,
            scheduler=make_scheduler(config.objective),
            max_tokens=plan.shards.manifest.max_tokens,
        ),
        dtype=config.bundle_dtype,
        info={
            "name": config.name,
            "step": state.step,
            "train_seconds": state.train_s,
            "num_parameters": unet.num_parameters(),
            "precision": run.accelerator.mixed_precision,
            "shards_sha256": plan.settings["shards_sha256"],
            "config": plan.settings,
            "metrics": run.progress.last,
        },
    )
    # After the bundle: if the process is killed in between, the bundle is written again.
    (plan.folder / HASHES_FILE).write_text("\n".join(hash_files(folder)) + "\n")
