"""Draws pictures with the stock `StableDiffusionPipeline`, so that what is seen here is what any
diffusers program gives for the same bundle. One seed is one picture (model/generate.py).
"""

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
    """Returns images made with the named scheduler; the pipeline keeps its own."""
    own = pipeline.scheduler
    pipeline.scheduler = choose_scheduler(own, scheduler)
    try:
        return generate_images(
            pipeline,
            prompts,
            seeds,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            batch_size=batch_size,
            title=title,
        )
    finally:
        pipeline.scheduler = own


def choose_scheduler(own: Any, name: SchedulerName) -> Any:
    """Returns the named sampler for the noise schedule of `own`, the bundle's scheduler.

    DDIM: Song et al. 2020 (2010.02502). DPM-Solver++ (2M): Lu et al. 2022 (2211.01095); of first
    order it is DDIM, and Euler's method on rectified flow. UniPC: Zhao et al.
    2023 (2302.04867). Raises ValueError for DDIM on a bundle of flow.
    """
    is_flow = own.config.prediction_type == "flow_prediction"
    if name == "ddim" and is_flow:
        raise ValueError(
            "--scheduler: the bundle was trained on rectified flow, which DDIM does not know; "
            "expected dpmpp, unipc, euler (DDIM's counterpart) or bundle, found ddim"
        )
    if name == "bundle":
        return own
    kind, settings = SAMPLERS[name]
    return kind.from_config(own.config, **settings)
