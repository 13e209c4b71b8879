"""Experiment trackers through Accelerate: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl stays the source of truth: a tracker gets what is written there, at the same moments,
and a run without any tracker loses nothing. TensorBoard's files lie in runs/NAME/tracker:

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
PACKAGES = {"tensorboard": "latent-t2i[track]", "wandb": "wandb", "trackio": "trackio"}
"""What to install for each, by pip."""
SHOW_IMAGES = ("tensorboard", "wandb")
"""Those that Accelerate hands images to; for the others previews are files only."""


def choose(names: Sequence[TrackerName]) -> tuple[list[str], list[str]]:
    """Returns which trackers to use, and what to say of it.

    Raises ValueError for one that was asked for by name and is not installed.
    """
    if list(names) == ["none"]:
        return [], []
    if list(names) == ["auto"]:
        if AVAILABLE["tensorboard"]():
            return ["tensorboard"], []
        return [], [
            "trackers: none, since tensorboard is not installed; metrics.jsonl has all figures "
            f"(pip install '{PACKAGES['tensorboard']}')"
        ]
    for name in names:
        if not AVAILABLE[name]():
            raise ValueError(
                f"trackers: {name} is not installed; pip install '{PACKAGES[name]}', or choose "
                f"others: expected auto, none, {', '.join(AVAILABLE)}, found {' '.join(names)}"
            )
    return list(names), []


def start(accelerator: Accelerator, folder: Path, settings: Mapping[str, Any], step: int) -> None:
    """Opens the trackers that the accelerator was made with, to go on after `step`.

    Takes the run's folder and its settings, one level deep. What a killed run logged beyond `step`
    is hidden by TensorBoard; W&B and Trackio go on with the run of the id that the folder keeps.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    run_id = keep_id(folder / FOLDER)
    name = str(settings["name"])
    options = {
        "tensorboard": {"purge_step": step + 1} if step else {},
        "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(folder / FOLDER)},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
    }
    accelerator.init_trackers(PROJECT, init_kwargs=options)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(dict(settings))
        elif step == 0:  # its own way opens another folder at each start
            rows = "\n".join(f"    {key}: {value}" for key, value in settings.items())
            tracker.log({"settings": rows}, step=0)


def keep_id(folder: Path) -> str:
    """Returns the id of a run, made at its first start and kept in its folder."""
    path = folder / "id"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def log_line(accelerator: Accelerator, line: Mapping[str, Any]) -> None:
    """Gives the trackers the figures of a line of metrics.jsonl."""
    values = dict(flatten(line))
    step = int(values.pop("step"))
    prefix = "" if "validation/loss" in values else "train/"
    accelerator.log({prefix + name: value for name, value in values.items()}, step=step)


def flatten(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of a line, nested names joined by slashes."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Gives a picture to the trackers that show pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in SHOW_IMAGES:
            pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels}, step=step, **options)
        if tracker.name == "tensorboard":
            tracker.tracker.flush()
