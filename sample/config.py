"""The settings of `sample.run`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

SchedulerName = Literal["ddim", "dpmpp", "unipc", "euler", "bundle"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Generates images from a bundle with classifier-free guidance."""

    name: str = "samples"
    """Name of the run. Its folder has the bundle, and the images are written to it."""
    bundle: str | None = None
    """Folder of the bundle; default: runs/NAME/bundle, else the shipped scenes/bundle."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--prompt"])
    ] = ()
    """Prompts; the flag accepts several and can be repeated."""
    prompt_file: str | None = None
    """Text file with one prompt per line; these prompts follow those of --prompts."""
    out: str | None = None
    """Output folder for samples.png and samples/; default: runs/NAME."""
    seed: int = 0
    """Seed of the first image; each further image adds 1."""
    images_per_prompt: int = 1
    """Number of images per prompt."""
    guidance_scale: float = 4.0
    """Classifier-free guidance scale; 1 turns guidance off."""
    num_steps: int = 25
    """Number of sampler steps."""
    scheduler: SchedulerName = "dpmpp"
    """dpmpp: DPM-Solver++ (2M). unipc: UniPC. euler: first order. ddim: DDIM, which equals euler
    and does not support rectified flow. bundle: the scheduler stored in the bundle."""
    batch_size: int = 16
    """Number of images generated at once; affects them by rounding only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks; auto: float16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--images-per-prompt", self.images_per_prompt),
            ("--num-steps", self.num_steps),
            ("--batch-size", self.batch_size),
        ):
            if value < 1:
                raise ValueError(f"{flag}: expected at least 1, found {value}")
        if self.guidance_scale < 1:
            raise ValueError(f"--guidance-scale: expected at least 1, found {self.guidance_scale}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected at least 0, found {self.seed}")
