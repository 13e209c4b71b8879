"""Checkpoints: everything that the next step depends on, as safetensors and JSON.

    runs/NAME/checkpoints/step-00000500/
        unet.safetensors  ema.safetensors  optimizer.safetensors  state.json

A checkpoint is complete or absent. Data order and noise are functions of (seed, step), so it stores
no loader or generator state. No format that can execute code is read. state.json holds the hashes
of all files. The cost: saving and loading read every byte once more.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
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
from latent_t2i.train.on_main import SharedTensors, on_main

# These settings must match the checkpoint for a run to resume; the part before a dot stands for
# all settings below it. Changes of other settings are reported.
MUST_MATCH = (
    "seed",
    "batch_size",
    "model.",
    "objective.",
    "optim.kind",
    "latent_shape",
    "latent_shift",
    "latent_scale",
    "empty_text_sha256",
    "text_scale_sha256",
    "shards_sha256",
    "init_from",
    "init_sha256",
    "draws",
    # The data order.
    "order of data.access",
    "data.shuffle",
    "data.weights",
    "data.window_shards",
    "data.last_batch",
    "data.num_workers",
    "data.window_records",
)
# Of these, the error names the sets.
DATA = ("shards_sha256", "data.weights")
MAY_DIFFER = ("model.attention_kernel",)
# A checkpoint without one of these is of a version with other random numbers.
MUST_BE_PRESENT = ("draws",)
PARTS = ("unet", "ema", "optimizer")
STATE_FILE = "state.json"
# Bounds what is read before the hash is known. A logging interval may have a million rows of
# metrics, of up to 90 bytes each.
MAX_STATE_BYTES = 2**28
STATE_TYPES: dict[str, Any] = {
    "step": int,
    "train_s": (int, float),
    "scaler": dict,
    "metrics": {
        "rows": (list, type(None)),
        "num_skipped": (int, type(None)),
        "num_skipped_in_a_row": (int, type(None)),
        "last": (dict, type(None)),
        "validation": (dict, type(None)),
        "previewed": (int, type(None)),
    },
    "settings": dict,
    "files": {f"{name}.safetensors": str for name in PARTS},
    "sha256": str,
}


@dataclass(kw_only=True)
class TrainState:
    """The state that a training step changes."""

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
) -> None:
    """Writes a checkpoint of `state.step` and deletes old ones as `delete_old` does.

    Under FSDP this is a collective call, and only the process with `write` writes. Raises OSError,
    naming the folder and the bytes needed, if the disk is full; older checkpoints then stay.
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
    with complete_or_absent(folder / f"step-{state.step:08d}", num_bytes) as temporary:
        for name, tensors in parts.items():
            packed = {key: pack(tensor) for key, tensor in tensors.items()}
            save_file(packed, temporary / f"{name}.safetensors")
        record["files"] = {f"{name}.safetensors": _hash_file(temporary, name) for name in PARTS}
        record["sha256"] = hash_state(record)
        (temporary / STATE_FILE).write_text(_dump(record))
    delete_old(folder, state, keep=keep)


def pack(tensor: Tensor) -> Tensor:
    """Returns a tensor as safetensors accepts it: contiguous, which channels_last is not.

    The copy is on the CPU, because a GPU may have no room for it.
    """
    return tensor.cpu().contiguous()


def delete_old(folder: Path, state: TrainState, *, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints.

    While steps are being skipped, the newest one from before the first of them is kept as well.
    """
    flags = [bool(row[2]) for row in state.metrics.get("rows", [])]
    all_skipped = state.metrics.get("num_skipped_in_a_row", 0) + len(flags)
    num_skipped = next((i for i, bad in enumerate(reversed(flags)) if not bad), all_skipped)
    finite = find_newest(folder, state.step - num_skipped)
    for old in find_all(folder)[:-keep]:
        if old != finite:
            _delete(old)


def repair(folder: Path) -> None:
    """Cleans up after a process that was killed while it saved or deleted a checkpoint."""
    for replaced in folder.glob(".step-*.old"):
        # A checkpoint of the same step was replacing it. After a kill between the two renames of
        # `complete_or_absent`, it is the only complete one.
        final = folder / replaced.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            replaced.rename(final)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def find_all(folder: Path) -> list[Path]:
    """Returns a run's complete checkpoints, oldest first."""
    names = re.compile(r"step-\d{8,}")
    return sorted(path for path in folder.glob("step-*") if names.fullmatch(path.name))


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
    """Returns the content of a checkpoint's state.json.

    Raises ValueError if it differs from what was written.
    """
    path = checkpoint / STATE_FILE
    try:
        if not path.is_file() or path.stat().st_size > MAX_STATE_BYTES:
            raise OSError(f"expected a file of at most {MAX_STATE_BYTES} bytes")
        text = path.read_bytes().decode()  # read_text would hide a changed line end
        record: Any = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(checkpoint, f"{STATE_FILE}: {error}") from error
    for fault in _type_faults(record, STATE_TYPES, STATE_FILE):
        raise _damaged(checkpoint, fault)
    expected, found = record["sha256"], hash_state(record)
    if found != expected:
        raise _damaged(checkpoint, f"{STATE_FILE}: sha256: expected {expected}, found {found}")
    if text != _dump(record):  # white space, which does not change the content's hash
        raise _damaged(checkpoint, f"{STATE_FILE}: its text has changed since it was written")
    if record["step"] != (step := _step_of(checkpoint)):
        raise _damaged(checkpoint, f"{STATE_FILE}: step: expected {step}, found {record['step']}")
    state: dict[str, Any] = record
    return state


def hash_state(record: Mapping[str, Any]) -> str:
    """Returns the sha256 of a state without its own hash."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(_dump(content).encode()).hexdigest()


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _type_faults(value: Any, expected: Any, name: str) -> Iterator[str]:
    """Yields the parts of a JSON value that are missing or of an unexpected type."""
    if isinstance(expected, dict) and isinstance(value, dict):
        for key, part in expected.items():
            yield from _type_faults(value.get(key), part, f"{name}: {key}")
    elif isinstance(expected, dict) or isinstance(value, bool) or not isinstance(value, expected):
        yield f"{name}: missing or of an unexpected type, found {value!r:.50}"


@torch.no_grad()
def load(checkpoint: Path, state: TrainState) -> None:
    """Restores `state` from a checkpoint, in place. A collective call: the main process reads it.

    Raises ValueError, and leaves `state` unchanged, if the checkpoint is damaged.
    """
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in PARTS}

    def read() -> dict[str, Any]:
        record = read_state(checkpoint)
        for name in PARTS:
            parts[name] = _read(checkpoint, name, record["files"][f"{name}.safetensors"])
        return record

    record = on_main(read)  # the parts stay in the main process
    weights = state.unet.state_dict()
    device = next(state.unet.parameters()).device
    unet = SharedTensors(parts["unet"], weights, device)
    ema = SharedTensors(parts["ema"], state.ema.state_dict(), device)
    moments = SharedTensors(parts["optimizer"], {}, device)
    names = dict(state.unet.named_parameters()).keys()
    # There are no moments if all steps so far were skipped.
    with_moments = {name.rpartition("/")[0] for name in moments} or names
    for file, found in (("unet", set(unet)), ("optimizer", with_moments)):
        if different := found ^ names:
            raise _damaged(checkpoint, f"{file}.safetensors: {min(different)} missing or unknown")
    try:  # first, because its error must leave the rest of the state unchanged
        state.ema.load(ema)
    except KeyError as error:
        raise _damaged(checkpoint, f"ema.safetensors: {error} missing or unknown") from error
    for name, tensor in weights.items():
        tensor.copy_(unet[name])
    _load_optimizer(state, moments)
    if state.optimizer.scaler is not None and record["scaler"]:
        state.optimizer.scaler.load_state_dict(record["scaler"])
    state.step, state.train_s = record["step"], record["train_s"]
    state.metrics = record["metrics"]


def _hash_file(folder: Path, name: str) -> str:
    with (folder / f"{name}.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(checkpoint: Path, name: str, expected: str) -> dict[str, Tensor]:
    try:
        found = _hash_file(checkpoint, name)
        if found != expected:
            raise _damaged(
                checkpoint, f"{name}.safetensors: sha256: expected {expected}, found {found}"
            )
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
        elif tensor.dtype == torch.int64:  # the step count of 8-bit AdamW
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
    old, new = flatten(_with_sets(before)), flatten(now)
    changes = []
    for name in sorted(old.keys() | new.keys()):
        was, is_now = old.get(name), new.get(name)
        if was == is_now:
            continue
        if name in MUST_BE_PRESENT and name not in old:
            raise ValueError(
                f"{name}: the run in {folder} is of an older version with another order and noise; "
                f"found no such setting in its checkpoint, expected {is_now!r}; finish it with "
                "that version, or start another run with another --name or --out"
            )
        if name not in old:  # the checkpoint is from an older version of this project
            changes.append(f"{name} is new since the checkpoint was written: {is_now!r}")
        elif name in DATA:
            raise ValueError(
                f"{name}: the run in {folder} has {was!r}, of shards {old.get('shards')}, found "
                f"{is_now!r}, of shards {new.get('shards')}; use the old sets and weights to "
                "resume it, or start another run from its weights: another --name or --out, with "
                "--init-from and its bundle"
            )
        elif name.startswith(MUST_MATCH) and name not in MAY_DIFFER:
            raise ValueError(
                f"{name}: the run in {folder} has {was!r}, found {is_now!r}; use the old value to "
                "resume it, or start another run with another --name or --out"
            )
        else:
            changes.append(f"{name} changed from {was!r} to {is_now!r}")
    return changes


def _with_sets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's settings, with those of older ones with one set in today's form."""
    found = dict(settings)
    if isinstance(found.get("shards"), str):
        found["shards"] = [found["shards"]]
    if isinstance(found.get("data"), Mapping):
        found["data"] = {"weights": []} | found["data"]
    return found
