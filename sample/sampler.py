"""Samples with the stock `StableDiffusionPipeline`.

Any diffusers program makes the same image of the same bundle, seed and settings.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from latent_t2i.model.bundle import find_bundle
from latent_t2i.model.encoders import quiet
from latent_t2i.model.generate import generate_images
from latent_t2i.sample.config import DtypeName, SchedulerName

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (DPMSolverMultistepScheduler, {"solver_order": 1}),
}


def load(
    folder: str | Path, *, device: str = "auto", dtype: DtypeName = "auto"
) -> "StableDiffusionPipeline":
    """Loads a bundle for sampling.

    Raises ValueError if the bundle is missing or incomplete, or if there is no such device.
    """
    found = find_bundle(folder)
    device = choose_device(device)
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    with quiet(), _no_progress_bar():
        # The import warns about an image processor that is not used here.
        from diffusers import StableDiffusionPipeline

        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                found, dtype=getattr(torch, dtype), local_files_only=True
            )
        except OSError as error:
            raise ValueError(f"--bundle: {found} does not load: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def choose_device(name: str) -> str:
    """Returns `name`, or the default device for "auto"; raises ValueError if it is not usable."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: found {name!r}, which PyTorch cannot use here ({reason}); expected auto, "
            "cpu, or a GPU of this machine, such as cuda or cuda:1"
        ) from error
    return name


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hides diffusers' progress bar for loading a bundle's few files."""
    was_enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            diffusers_logging.enable_progress_bar()


def draw(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    scheduler: SchedulerName = "dpmpp",
    **settings: Any,
) -> list[Image.Image]:
    """Returns images made with the named scheduler; `settings` are those of `generate_images`.

    Raises ValueError if an image is not finite.
    """
    own = pipeline.scheduler
    pipeline.scheduler = choose_scheduler(own, scheduler)
    try:
        with warnings.catch_warnings():
            # diffusers would turn NaN into black pixels.
            warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
            return generate_images(pipeline, prompts, seeds, **settings)
    except RuntimeWarning as error:
        raise ValueError(
            f"--bundle: the images are not finite in {pipeline.dtype}; the weights have NaN, or "
            "overflow: try --dtype float32 or bfloat16, or another bundle"
        ) from error
    finally:
        pipeline.scheduler = own


def choose_scheduler(own: Any, name: SchedulerName) -> Any:
    """Returns the named sampler for the noise schedule of `own`, the bundle's scheduler.

    DDIM: Song et al. 2020 (2010.02502). DPM-Solver++ (2M): Lu et al. 2022 (2211.01095), whose
    first order is DDIM, or Euler's method on rectified flow. UniPC: Zhao et al. 2023 (2302.04867).
    Raises ValueError for DDIM with rectified flow.
    """
    if name == "ddim" and own.config.prediction_type == "flow_prediction":
        raise ValueError(
            "--scheduler: found ddim, but the bundle was trained with rectified flow, which DDIM "
            "does not support; expected dpmpp, unipc, euler (its flow counterpart) or bundle"
        )
    if name == "bundle":
        return own
    kind, overrides = SAMPLERS[name]
    return kind.from_config(own.config, **overrides)
