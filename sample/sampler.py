"""Samples with the stock `StableDiffusionPipeline`, so that any diffusers program gives the same
image for the same bundle, seed and settings (model/drawing.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from latent_t2i.model import drawing
from latent_t2i.model.bundle import find_bundle
from latent_t2i.model.encoders import quiet
from latent_t2i.sample.config import DtypeName, SchedulerName

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (DPMSolverMultistepScheduler, {"solver_order": 1}),
}
BUNDLE_SCHEDULER = "bundle_scheduler"
"""The pipeline attribute that keeps the bundle's own scheduler."""


def load(
    folder: str | Path, *, device: str = "auto", dtype: DtypeName = "auto"
) -> "StableDiffusionPipeline":
    """Loads a bundle for sampling. Raises ValueError if it is missing or incomplete."""
    found = find_bundle(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    """Calls `drawing.draw` with `settings` after setting the scheduler."""
    use_scheduler(pipeline, scheduler)
    return drawing.draw(pipeline, prompts, seeds, **settings)


def use_scheduler(pipeline: "StableDiffusionPipeline", name: SchedulerName) -> None:
    """Sets the pipeline's scheduler, on the noise schedule that the bundle was trained with.

    DDIM: Song et al. 2020 (2010.02502). DPM-Solver++ (2M): Lu et al. 2022 (2211.01095), whose
    first order is DDIM, or Euler's method on rectified flow. UniPC: Zhao et al. 2023 (2302.04867).
    Raises ValueError for DDIM with rectified flow.
    """
    own = getattr(pipeline, BUNDLE_SCHEDULER, pipeline.scheduler)
    setattr(pipeline, BUNDLE_SCHEDULER, own)
    if name == "ddim" and own.config.prediction_type == "flow_prediction":
        raise ValueError(
            "--scheduler: found ddim, but the bundle was trained with rectified flow, which DDIM "
            "does not support; expected dpmpp, unipc, euler (its flow counterpart) or bundle"
        )
    if name == "bundle":
        pipeline.scheduler = own
        return
    kind, overrides = SAMPLERS[name]
    pipeline.scheduler = kind.from_config(own.config, **overrides)
