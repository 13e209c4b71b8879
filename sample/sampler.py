"""Draws pictures with the stock `StableDiffusionPipeline`, so that what is seen here is what any
diffusers program gives for the same bundle. One seed is one picture (model/drawing.py).
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
OWN_SCHEDULER = "bundle_scheduler"
"""The pipeline's attribute that keeps what its bundle named, whatever it draws with."""


def load(
    folder: str | Path, *, device: str = "auto", dtype: DtypeName = "auto"
) -> "StableDiffusionPipeline":
    """Loads a bundle, ready to draw. Raises ValueError where there is none or it does not load."""
    found = find_bundle(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    with (
        quiet(),
        without_bar(),
    ):  # the import tells at length of an image processor that nothing here uses
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
def without_bar() -> Iterator[None]:
    """Holds back diffusers' bar over the few files of a bundle."""
    was_on = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            diffusers_logging.enable_progress_bar()


def draw(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float,
    num_steps: int,
    scheduler: SchedulerName = "dpmpp",
    batch_size: int = 16,
    title: str = "draw",
) -> list[Image.Image]:
    """Gives the pipeline the scheduler that was asked for, and draws with it as `drawing.draw`."""
    use_scheduler(pipeline, scheduler)
    return drawing.draw(
        pipeline,
        prompts,
        seeds,
        guidance_scale=guidance_scale,
        num_steps=num_steps,
        batch_size=batch_size,
        title=title,
    )


def use_scheduler(pipeline: "StableDiffusionPipeline", name: SchedulerName) -> None:
    """Gives the pipeline a sampler on the schedule that its bundle was trained on.

    DDIM: Song et al. 2020 (2010.02502). DPM-Solver++ (2M): Lu et al. 2022 (2211.01095); of first
    order it is DDIM, and Euler's method on rectified flow. UniPC: Zhao et al.
    2023 (2302.04867). Raises ValueError for DDIM on a bundle of flow.
    """
    own = getattr(pipeline, OWN_SCHEDULER, pipeline.scheduler)
    setattr(pipeline, OWN_SCHEDULER, own)
    is_flow = own.config.prediction_type == "flow_prediction"
    if name == "ddim" and is_flow:
        raise ValueError(
            "--scheduler: the bundle was trained on rectified flow, which DDIM does not know; "
            "expected dpmpp, unipc, euler (DDIM's counterpart) or bundle, found ddim"
        )
    if name == "bundle":
        pipeline.scheduler = own
        return
    kind, settings = SAMPLERS[name]
    pipeline.scheduler = kind.from_config(own.config, **settings)
