"""Checkpoints: all that the next step depends on, in safetensors and JSON, complete or absent.

    runs/NAME/checkpoints/step-00000500/
        unet.safetensors  ema.safetensors  optimizer.safetensors  state.json

Order and noise are functions of (seed, step), so the step stands for them. Nothing here can run
code when loaded. To resume is to give the same command again: the newest checkpoint is found by its
step, and settings that would make the continued run another one are refused. While steps are being
skipped for values that are not finite, the newest checkpoint from before them is spared, and
`roll_back` makes it the newest of all.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_t2i.model.ema import EMA
from latent_t2i.model.paths import complete_or_absent
from latent_t2i.train import fsdp

ORDER = (
    "order of data.access",
    "data.shuffle",
    "data.window_shards",
    "data.last_batch",
    "data.num_workers",
    "data.window_records",
)
INITIAL = ("init_from", "init_sha256")
# A run goes on only if these are what they were; all other settings may change, and it is said.
FIXED = (
    "seed",
    "batch_size",
    "model.",
    "objective.",
    "optim.kind",
    "latent_shape",
    "shards_sha256",
    *INITIAL,
    *ORDER,
)
FREE = ("model.attention_kernel",)
STATE_KEYS = {"step", "train_s", "scaler", "metrics", "settings"}


@dataclass(kw_only=True)
class TrainState:
    """What a step changes."""

    unet: UNet2DConditionModel
    ema: EMA
    optimizer: AcceleratedOptimizer
    step: int = 0
    train_s: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    """The unfinished logging interval (progress.py), as plain JSON."""


def save(
    folder: Path,
    state: TrainState,
    settings: Mapping[str, Any],
    *,
    keep: int,
    write: bool = True,
    num_skipped_in_a_row: int = 0,
) -> None:
    """Writes the checkpoint of `state.step` and deletes all but the `keep` newest.

    The newest from before the last `num_skipped_in_a_row` steps stays in any case. All processes
    call it, to bring a shared-out network together; those without `write` do no more. Raises
    OSError naming the folder and the bytes it takes where the disk is full; older checkpoints then
    stay.
    """
    parts = {
        "unet": fsdp.full_tensors(state.unet.state_dict(), keep=write),
        "ema": fsdp.full_tensors(state.ema.state_dict(), keep=write),
        "optimizer": fsdp.full_tensors(_moments(state), keep=write),
    }
    if not write:
        return
    scaler = state.optimizer.scaler
    record = {
        "step": state.step,
        "train_s": state.train_s,
        "scaler": scaler.state_dict() if scaler is not None else {},
        "metrics": state.metrics,
        "settings": dict(settings),
    }
    num_bytes = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    for leftover in folder.glob(".step-*"):  # of a run killed while it saved
        shutil.rmtree(leftover)
    with complete_or_absent(folder / f"step-{state.step:08d}", num_bytes) as temporary:
        for name, tensors in parts.items():
            packed = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(packed, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n")
    spared = find_good(folder, state.step - num_skipped_in_a_row)
    for old in find_all(folder)[:-keep]:
        if old != spared:
            _delete(old)


def roll_back(folder: Path, step: int) -> list[Path]:
    """Makes the newest checkpoint of `step` or before the newest of all; returns those deleted.

    Without one such all stay: the weights in those of skipped steps are the same.
    """
    if find_good(folder, step) is None:
        return []
    later = [path for path in find_all(folder) if _step_of(path) > step]
    for path in reversed(later):  # killed within, it leaves one that is good or the error again
        _delete(path)
    return later


def find_good(folder: Path, step: int) -> Path | None:
    """Returns the newest checkpoint of `step` or before."""
    return next((path for path in reversed(find_all(folder)) if _step_of(path) <= step), None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _delete(checkpoint: Path) -> None:
    """Deletes a checkpoint, which is never seen in part: the rename comes first."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def find_all(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns state.json of a checkpoint."""
    try:
        record: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(checkpoint, error) from error
    missing = STATE_KEYS - set(record) if isinstance(record, dict) else STATE_KEYS
    if missing:
        raise _damaged(checkpoint, f"state.json without {', '.join(sorted(missing))}")
    return record


def load(checkpoint: Path, state: TrainState) -> None:
    """Restores `state` from a checkpoint, in place.

    Raises ValueError, and leaves `state` as it was, for one that is not as it was written.
    """
    record = read_state(checkpoint)
    shapes = {name: tensor.shape for name, tensor in state.unet.named_parameters()}
    unet = _read(checkpoint, "unet")
    ema = _read(checkpoint, "ema")
    moments = _read(checkpoint, "optimizer")
    held = {name.rpartition("/")[0] for name in moments} or shapes.keys()  # none: only skipped yet
    for file, found in (("unet", set(unet)), ("optimizer", held)):
        if odd := found ^ shapes.keys():
            raise _damaged(checkpoint, f"{file}.safetensors: {min(odd)} is missing or unknown")
    try:
        state.ema.load(fsdp.parts_of(ema, state.ema.state_dict()))
    except KeyError as error:
        raise _damaged(checkpoint, f"ema.safetensors: {error} is missing or unknown") from error
    state.unet.load_state_dict(fsdp.parts_of(unet, state.unet.state_dict()))
    _load_moments(state, moments)
    if state.optimizer.scaler is not None and record["scaler"]:
        state.optimizer.scaler.load_state_dict(record["scaler"])
    state.step, state.train_s = record["step"], record["train_s"]
    state.metrics = record["metrics"]


def _read(checkpoint: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, f"{name}.safetensors: {error}") from error


def _damaged(checkpoint: Path, why: object) -> ValueError:
    """Returns the error of a checkpoint that something has changed since it was written."""
    before = find_good(checkpoint.parent, _step_of(checkpoint) - 1)
    then = "to begin anew, there is none before it" if before is None else f"to go on from {before}"
    return ValueError(f"{checkpoint}: damaged ({why}); delete this folder {then}")


def _moments(state: TrainState) -> dict[str, Tensor]:
    """Returns AdamW's state by parameter name, `conv_in.weight/exp_avg` and so on.

    8-bit AdamW counts its steps in Python: as an int64 tensor here; and its parameters share maps
    from 8 bits to numbers, of which each gets a copy, since a file has no shared tensors.
    """
    names = {parameter: name for name, parameter in state.unet.named_parameters()}
    return {
        f"{names[parameter]}/{kind}": value.clone() if "map" in kind else torch.as_tensor(value)
        for parameter, entry in state.optimizer.optimizer.state.items()
        for kind, value in entry.items()
    }


def _load_moments(state: TrainState, moments: Mapping[str, Tensor]) -> None:
    """Restores AdamW's state as its kernels want it.

    A step count lies on the device, a moment in its parameter's memory format, which files lose.
    """
    parameters = dict(state.unet.named_parameters())
    entries = state.optimizer.optimizer.state
    for key, tensor in moments.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        if tensor.shape == parameter.shape:
            mine = fsdp.part_of(tensor, parameter)
            entries[parameter][kind] = torch.empty_like(parameter, dtype=mine.dtype).copy_(mine)
        elif tensor.dtype == torch.int64:
            entries[parameter][kind] = int(tensor)
        else:
            entries[parameter][kind] = tensor.to(parameter.device)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as one level of dotted names; tuples as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def compare_settings(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns what changed since the checkpoint, a line each.

    Raises ValueError, naming both values, for what cannot change within a run.
    """
    old, new = flatten(before), flatten(now)
    changes = []
    for name in sorted(old.keys() | new.keys()):
        was, is_now = old.get(name), new.get(name)
        if was == is_now:
            continue
        if name not in old:  # by an older version of this project
            changes.append(f"{name} is new since the checkpoint was written: {is_now!r}")
            continue
        if name.startswith(FIXED) and name not in FREE:
            raise ValueError(
                f"{name}: the run in {folder} has {was!r}, this command says {is_now!r}; "
                f"use the old value to go on, or another --name or --out to begin anew"
            )
        changes.append(f"{name} changed from {was!r} to {is_now!r}")
    return changes
