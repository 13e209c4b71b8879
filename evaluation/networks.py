"""Loads networks of transformers for the metrics, in float32, with errors that name the setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from latent_t2i.evaluation.metrics.metric import MissingWeights
from latent_t2i.model.encoders import quiet
from latent_t2i.model.folders import (
    fetch,
    loading,
    read_config,
    require_weights,
)


def find_network(name: str, files: Sequence[str], kinds: Sequence[str] = (), *, flag: str) -> Path:
    """Returns the folder of a network; `kinds` are the accepted `model_type`s of its config.json.

    Raises MissingWeights if it cannot be had, ValueError if it is another kind of network.
    """
    try:
        folder = fetch(name, None, files, flag=flag)
    except ValueError as error:
        raise MissingWeights(str(error)) from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag}: {folder} has no config.json; expected a network's folder")
    if kinds:
        read_config(folder, "model_type", kinds, flag=flag)
    require_weights(folder, "model", flag=flag)
    return folder


def load_tokenizer(cls: Any, folder: Path, *, flag: str) -> Any:
    """Returns the tokenizer in a folder; raises ValueError if there is none."""
    with quiet(), loading(folder, flag=flag):
        return cls.from_pretrained(folder, local_files_only=True)


def load_image_processor(folder: Path, *, flag: str) -> Any:
    """Returns the image processor in a folder, always with the PIL backend."""
    # torchvision's backend resizes differently, and is the default where it is installed.
    with quiet(), loading(folder, flag=flag):
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
