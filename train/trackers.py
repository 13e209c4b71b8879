"""Experiment trackers through Accelerate: TensorBoard, Weights & Biases, Trackio.

Trackers receive the lines of metrics.jsonl when they are written; a run without trackers loses
nothing. TensorBoard's files are in runs/NAME/tracker:

    tensorboard --logdir runs
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available
from PIL import Image

from latent_t2i.train.config import TrackerName

PROJECT = "latent-t2i"
FOLDER = "tracker"
AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}
PIP_PACKAGES = {"tensorboard": "latent-t2i[track]", "wandb": "wandb", "trackio": "trackio"}


def choose(names: Sequence[TrackerName]) -> tuple[list[str], list[str]]:
    """Returns the trackers to use and lines about them.

    Raises ValueError for a named tracker that is not installed.
    """
    if list(names) == ["none"]:
        return [], []
    if list(names) == ["auto"]:
        if AVAILABLE["tensorboard"]():
            return ["tensorboard"], []
        return [], [
            "trackers: none, because tensorboard is not installed (pip install "
            f"'{PIP_PACKAGES['tensorboard']}'); metrics.jsonl has all metrics"
        ]
    for name in names:
        if not AVAILABLE[name]():
            raise ValueError(
                f"trackers: {name} is not installed; run pip install '{PIP_PACKAGES[name]}', or "
                f"choose other trackers (auto, none, {', '.join(AVAILABLE)})"
            )
    return list(names), []


def start(accelerator: Accelerator, folder: Path, settings: Mapping[str, Any], step: int) -> None:
    """Opens the accelerator's trackers; a run that resumes at `step` continues its earlier logs.

    `folder` is the run's, `settings` are flat.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    run_id = keep_id(folder / FOLDER)
    name = str(settings["name"])
    options = {
        # TensorBoard hides what a killed run logged after its checkpoint, or at all without one.
        "tensorboard": {"purge_step": step + 1 if step else 0},
        "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(folder / FOLDER)},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
    }
    accelerator.init_trackers(PROJECT, init_kwargs=options)
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            # By its own counter W&B drops the lines of a run that went back to a checkpoint.
            tracker.tracker.define_metric("*", step_metric="step")
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(dict(settings))
        elif step == 0:  # its store_init_configuration adds a folder at each start
            rows = "\n".join(f"    {key}: {value}" for key, value in settings.items())
            tracker.log({"settings": rows}, step=0)


def keep_id(folder: Path) -> str:
    """Returns the run's tracker id, which is created at the first start and kept in `folder`."""
    path = folder / "id"
    found = path.read_text().strip() if path.is_file() else ""
    if not found:  # also if a kill left the file empty
        found = secrets.token_hex(4)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(found + "\n")
    return found


def log_line(accelerator: Accelerator, line: Mapping[str, Any]) -> None:
    """Sends the numbers of a line of metrics.jsonl to the trackers."""
    prefix = "" if "validation" in line else "train/"
    values = {prefix + name: value for name, value in flatten(line) if name != "step"}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log({**values, "step": line["step"]})
        else:
            tracker.log(values, step=line["step"])


def flatten(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of a line; nested names are joined by slashes."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Sends an image to the trackers that can log images."""
    pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
            tracker.tracker.flush()
        elif tracker.name == "wandb":
            tracker.log_images({name: pixels}, commit=False)
            tracker.log({"step": step})
