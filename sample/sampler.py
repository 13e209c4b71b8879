"""Draws pictures with the stock `StableDiffusionPipeline`, so that what is seen here is what any
diffusers program gives for the same bundle.

One seed is one picture: each has a generator of its own on the CPU, so neither the batch size nor
the device changes what is drawn beyond rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from tqdm import tqdm

from model.bundle import find_bundle
from model.encoders import quiet
from sample.config import DtypeName, SchedulerName

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
    """Draws one picture per prompt and seed, in their order.

    Guidance is eq. 6 of Ho & Salimans 2022 (2207.12598) with 1 + w = `guidance_scale`.
    """
    assert len(prompts) == len(seeds), (len(prompts), len(seeds))
    use_scheduler(pipeline, scheduler)
    check_steps(pipeline.scheduler, num_steps)
    pictures: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=title, unit="image", disable=None, leave=False) as bar:
        for start in range(0, len(prompts), batch_size):
            piece = slice(start, start + batch_size)
            result = pipeline(
                prompt=list(prompts[piece]),
                guidance_scale=guidance_scale,
                num_inference_steps=num_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[piece]],
            )
            pictures += result.images
            bar.update(len(result.images))
    return pictures


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


def check_steps(scheduler: Any, num_steps: int) -> None:
    """Raises ValueError for a number of steps with which the sampler would miss.

    Two faults of diffusers (0.42) would go unseen. Its DDIM goes down by a whole number of
    timesteps whatever the next one is, so that noise stays where the steps do not divide the
    timesteps (of 150 steps, 9 % too much deviation). And of two first steps that fall on one
    timestep, as many steps of flow do, its solvers take the second for the first.
    """
    num_timesteps = scheduler.config.num_train_timesteps
    if num_steps > num_timesteps:
        raise ValueError(
            f"--num-steps: expected at most the bundle's {num_timesteps} timesteps, "
            f"found {num_steps}"
        )
    if isinstance(scheduler, DDIMScheduler) and num_timesteps % num_steps:
        raise ValueError(
            f"--num-steps: DDIM leaves noise unless the steps divide the bundle's {num_timesteps} "
            f"timesteps; expected a divisor of them (or --scheduler euler, which is DDIM without "
            f"that), found {num_steps}"
        )
    scheduler.set_timesteps(num_steps)
    first = scheduler.timesteps[:2].tolist()
    if len(first) == 2 and first[0] == first[1]:
        raise ValueError(
            f"--num-steps: the first two of {num_steps} steps fall on timestep {first[0]} of the "
            f"bundle's {num_timesteps}; expected fewer steps"
        )
