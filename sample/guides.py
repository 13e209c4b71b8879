"""The weights of `--guide`: those of a bundle, or an average in a snapshot of the same run."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latent_t2i.model.bundle import digest, find_bundle, sampling_scheduler
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.paths import find_path, hash_file
from latent_t2i.model.posthoc import SNAPSHOT_FILE, average_file, read_snapshot

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def find_average(name: str | Path) -> Path | None:
    """Returns the file of an average in a snapshot; None if `name` is not of a snapshot.

    `name` is a snapshot's folder, which gives its shortest average, or the file of one average.
    Raises ValueError for another file and for a damaged snapshot.
    """
    path = find_path(name)
    if path is None:
        return None
    if path.is_dir():
        if not (path / SNAPSHOT_FILE).is_file():
            return None
        return average_file(path, min(read_snapshot(path).sigma_rels))
    is_average = (path.parent / SNAPSHOT_FILE).is_file() and path in [
        average_file(path.parent, width) for width in read_snapshot(path.parent).sigma_rels
    ]
    if not is_average:
        raise ValueError(
            f"--guide: {path} is not an average of a snapshot; expected the folder of a bundle or "
            "snapshot, or a file sigma_rel-*.safetensors in a snapshot"
        )
    return path


def hash_guide(name: str | Path) -> str:
    """Returns the sha256 of a guide; raises ValueError if there is none."""
    average = find_average(name)
    return digest(find_bundle(name)) if average is None else hash_file(average)


def load_average(path: Path, pipeline: "StableDiffusionPipeline") -> Any:
    """Returns the denoiser of `pipeline` with the weights of a snapshot's average.

    Raises ValueError if the snapshot is of another network, prediction or noise schedule.
    """
    _check_objective(path, read_snapshot(path.parent).config.get("objective"), pipeline)
    network = copy.deepcopy(pipeline.unet)
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--guide: {path} does not have the weights of the bundle's denoiser: {reason}; "
            "expected an average of the same run"
        ) from error
    return network


def _check_objective(path: Path, objective: Any, pipeline: "StableDiffusionPipeline") -> None:
    if not isinstance(objective, dict):
        return  # not recorded
    try:
        own = sampling_scheduler(make_scheduler(ObjectiveConfig(**objective)))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"--guide: {path.parent}: unknown objective: {error}") from error
    found, expected = own.config.prediction_type, pipeline.scheduler.config.prediction_type
    if found != expected:
        raise ValueError(
            f"--guide: {path} has another prediction_type than the bundle (found {found}, expected "
            f"{expected}); expected an average of the same run"
        )
    levels, others = own.alphas_cumprod, pipeline.scheduler.alphas_cumprod
    if levels.shape != others.shape or not torch.allclose(levels, others, rtol=0.01, atol=0.01):
        raise ValueError(
            f"--guide: {path} has another noise schedule than the bundle; expected an average of "
            "the same run"
        )
