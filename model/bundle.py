"""The bundle: what training leaves and sampling needs, as a stock `StableDiffusionPipeline` folder.

Any diffusers program loads it with `from_pretrained`. Beside diffusers' files lies `bundle.json`:
where the weights come from and how they did. `float16` halves the folder; the weights load as
float32 again, as the files' configurations say, and the pictures differ by rounding only.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from model.encoders import quiet
from model.paths import complete_or_absent, find_path

INFO_FILE = "bundle.json"
StorageDtype = Literal["float32", "float16"]


def save_bundle(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    scheduler: DDPMScheduler,
    max_tokens: int,
    info: Mapping[str, Any],
    dtype: StorageDtype = "float32",
) -> None:
    """Writes the bundle, complete or not at all; an older one in its place is replaced.

    `max_tokens` becomes the tokenizer's limit, so that a pipeline pads captions as training did.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_tokens
    with quiet():  # the import tells at length of an image processor that nothing here uses
        from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sampling_scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with complete_or_absent(folder) as temporary:
        with quiet():
            pipeline.save_pretrained(temporary)
        if dtype == "float16":
            for path in temporary.rglob("*.safetensors"):
                _store_float16(path)
        (temporary / INFO_FILE).write_text(json.dumps(dict(info), indent=1) + "\n")


def sampling_scheduler(scheduler: DDPMScheduler) -> DDIMScheduler:
    """Returns the DDIM sampler (Song et al. 2020, 2010.02502) of the schedule trained on.

    Timesteps count back from the last one, where training saw (nearly) pure noise, and the last
    step gives the predicted clean latent. `steps_offset` has no effect on that spacing, but
    `StableDiffusionPipeline` warns of any other value.
    """
    return DDIMScheduler.from_config(
        scheduler.config, set_alpha_to_one=True, steps_offset=1, clip_sample=False
    )


def _store_float16(path: Path) -> None:
    """Rewrites a weights file with float32 tensors in half precision."""
    tensors = load_file(path)
    halved = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors.items()
    }
    save_file(halved, path, metadata={"format": "pt"})


def find_bundle(name: str | Path) -> Path:
    """Returns the folder of a bundle; raises ValueError where there is none."""
    folder = find_path(name)
    if folder is None:
        raise ValueError(f"--bundle: no folder {str(name)!r} here or in the project")
    missing = [f for f in ("model_index.json", INFO_FILE) if not (folder / f).is_file()]
    if missing:
        raise ValueError(f"--bundle: {folder} holds no {missing[0]}, so it is no finished bundle")
    return folder


def read_info(folder: Path) -> dict[str, Any]:
    """Returns what `bundle.json` says of a bundle."""
    info: dict[str, Any] = json.loads((folder / INFO_FILE).read_text())
    return info


def digest(folder: Path) -> str:
    """Returns the sha256 over a bundle's files, by name and content; pictures name it."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
