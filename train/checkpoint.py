"""Checkpoints: everything that the next step depends on, as safetensors and JSON.

    runs/NAME/checkpoints/step-00000500/
        unet.safetensors  ema.safetensors  optimizer.safetensors  state.json

A checkpoint is complete or absent. Data order and noise are functions of (seed, step), so it stores
no loader or generator state. No format that can execute code is read. Running the same command
again resumes from the newest checkpoint; settings that would change the run are refused.
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

# These settings must match the checkpoint for a run to resume; the part before a dot stands for
# all settings below it. Changes of other settings are reported.
MUST_MATCH = (
    "seed",
    "batch_size",
    "model.",
    "objective.",
    "optim.kind",
    "latent_shape",
    "shards_sha256",
    "init_from",
    "init_sha256",
    # The data order.
    "order of data.access",
    "data.shuffle",
    "data.window_shards",
    "data.last_batch",
    "data.num_workers",
    "data.window_records",
)
MAY_DIFFER = ("model.attention_kernel",)
STATE_KEYS = {"step", "train_s", "scaler", "metrics", "settings"}


@dataclass(kw_only=True)
class TrainState:
    """What a training step changes."""

    unet: UNet2DConditionModel
    ema: EMA
    optimizer: AcceleratedOptimizer
    step: int = 0
    train_s: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    """The unfinished logging interval (progress.py), as JSON values."""


def save(
    folder: Path,
    state: TrainState,
    settings: Mapping[str, Any],
    *,
    keep: int,
    write: bool = True,
    num_skipped_in_a_row: int = 0,
) -> None:
    """Writes a checkpoint of `state.step` and deletes all but the `keep` newest.

    The newest one from before the last `num_skipped_in_a_row` steps is always kept. Under FSDP this
    is a collective call, and only the process with `write` writes. Raises OSError, naming the
    folder and the bytes needed, if the disk is full; older checkpoints then stay.
    """
    parts = {
        "unet": fsdp.full_tensors(state.unet.state_dict(), keep=write),
        "ema": fsdp.full_tensors(state.ema.state_dict(), keep=write),
        "optimizer": fsdp.full_tensors(_optimizer_tensors(state), keep=write),
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
    for leftover in folder.glob(".step-*"):  # from a process killed while it saved
        shutil.rmtree(leftover)
    with complete_or_absent(folder / f"step-{state.step:08d}", num_bytes) as temporary:
        for name, tensors in parts.items():
            packed = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(packed, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n")
    finite = find_newest(folder, state.step - num_skipped_in_a_row)
    for old in find_all(folder)[:-keep]:
        if old != finite:
            _delete(old)


def find_all(folder: Path) -> list[Path]:
    """Returns a run's complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def find_newest(folder: Path, max_step: int) -> Path | None:
    """Returns the newest checkpoint of `max_step` or an earlier step."""
    return next((path for path in reversed(find_all(folder)) if _step_of(path) <= max_step), None)


def delete_after(folder: Path, step: int) -> list[Path]:
    """Deletes the checkpoints of later steps and returns them.

    Does nothing if there is no checkpoint of `step` or an earlier step.
    """
    if find_newest(folder, step) is None:
        return []
    later = [path for path in find_all(folder) if _step_of(path) > step]
    for path in reversed(later):  # newest first: a kill in between leaves no gap
        _delete(path)
    return later


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _delete(checkpoint: Path) -> None:
    # Renamed first, so that a kill in between leaves no incomplete checkpoint.
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint's state.json; raises ValueError if it is damaged."""
    try:
        record: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(checkpoint, f"state.json: {error}") from error
    missing = STATE_KEYS - set(record) if isinstance(record, dict) else STATE_KEYS
    if missing:
        raise _damaged(checkpoint, f"state.json has no {', '.join(sorted(missing))}")
    return record


def load(checkpoint: Path, state: TrainState) -> None:
    """Restores `state` from a checkpoint, in place.

    Raises ValueError, and leaves `state` unchanged, if the checkpoint is damaged.
    """
    record = read_state(checkpoint)
    names = dict(state.unet.named_parameters()).keys()
    unet = _read(checkpoint, "unet")
    ema = _read(checkpoint, "ema")
    moments = _read(checkpoint, "optimizer")
    # There are no moments if all steps so far were skipped.
    with_moments = {name.rpartition("/")[0] for name in moments} or names
    for file, found in (("unet", set(unet)), ("optimizer", with_moments)):
        if different := found ^ names:
            raise _damaged(checkpoint, f"{file}.safetensors: {min(different)} missing or unknown")
    try:
        state.ema.load(fsdp.local_shards(ema, state.ema.state_dict()))
    except KeyError as error:
        raise _damaged(checkpoint, f"ema.safetensors: {error} missing or unknown") from error
    state.unet.load_state_dict(fsdp.local_shards(unet, state.unet.state_dict()))
    _load_optimizer(state, moments)
    if state.optimizer.scaler is not None and record["scaler"]:
        state.optimizer.scaler.load_state_dict(record["scaler"])
    state.step, state.train_s = record["step"], record["train_s"]
    state.metrics = record["metrics"]


def _read(checkpoint: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, f"{name}.safetensors: {error}") from error


def _damaged(checkpoint: Path, reason: str) -> ValueError:
    """Returns the error for a checkpoint that differs from what was written."""
    # Falling back to an older checkpoint silently would hide a failing disk.
    before = find_newest(checkpoint.parent, _step_of(checkpoint) - 1)
    then = f"resume from {before}" if before else "start again at step 0: no older one exists"
    return ValueError(
        f"{checkpoint}: the checkpoint is damaged ({reason}); delete this folder to {then}"
    )


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Returns AdamW's state by parameter name: `conv_in.weight/exp_avg` and so on."""
    # 8-bit AdamW has Python integers as step counts (stored as int64), and quantisation maps that
    # parameters share (cloned, because safetensors refuses shared memory).
    names = {parameter: name for name, parameter in state.unet.named_parameters()}
    return {
        f"{names[parameter]}/{kind}": value.clone() if "map" in kind else torch.as_tensor(value)
        for parameter, entry in state.optimizer.optimizer.state.items()
        for kind, value in entry.items()
    }


def _load_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Restores AdamW's state in the form that its kernels expect."""
    parameters = dict(state.unet.named_parameters())
    entries = state.optimizer.optimizer.state
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        if tensor.shape == parameter.shape:
            # In the parameter's memory format, which files do not keep.
            local = fsdp.local_shard(tensor, parameter)
            entries[parameter][kind] = torch.empty_like(parameter, dtype=local.dtype).copy_(local)
        elif tensor.dtype == torch.int64:
            entries[parameter][kind] = int(tensor)
        else:
            entries[parameter][kind] = tensor.to(parameter.device)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as one level of dotted names; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def compare_settings(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns one line for each setting that differs from the checkpoint's.

    Raises ValueError, naming both values, for a setting that must match.
    """
    old, new = flatten(before), flatten(now)
    changes = []
    for name in sorted(old.keys() | new.keys()):
        was, is_now = old.get(name), new.get(name)
        if was == is_now:
            continue
        if name not in old:  # the checkpoint is from an older version of this project
            changes.append(f"{name} is new since the checkpoint was written: {is_now!r}")
        elif name.startswith(MUST_MATCH) and name not in MAY_DIFFER:
            raise ValueError(
                f"{name}: the run in {folder} has {was!r}, found {is_now!r}; use the old value to "
                "resume it, or start another run with another --name or --out"
            )
        else:
            changes.append(f"{name} changed from {was!r} to {is_now!r}")
    return changes
