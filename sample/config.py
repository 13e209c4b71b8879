"""The settings of `sample.run`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from latent_t2i.model.checks import check_number

SchedulerName = Literal["ddim", "dpmpp", "unipc", "euler", "bundle"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
SEED_LIMIT = 2**63
"""torch accepts seeds below 2**64; the rest is for the images after the first."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Generates images from a bundle with classifier-free guidance."""

    name: str | None = None
    """Name of the run: selects its bundle and the output folder."""
    bundle: str | None = None
    """Folder of the bundle; default: runs/NAME/bundle, or the shipped scenes/bundle if there is
    neither a name nor a preset."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--prompt"])
    ] = ()
    """Prompts; the flag accepts several and can be repeated."""
    prompt_file: str | None = None
    """Text file with one prompt per line; these prompts follow those of --prompts."""
    out: str | None = None
    """Output folder for samples.png and samples/; default: runs/NAME, or runs/samples."""
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
        check_number("--images-per-prompt", self.images_per_prompt, least=1)
        check_number("--num-steps", self.num_steps, least=1)
        check_number("--batch-size", self.batch_size, least=1)
        check_number("--guidance-scale", self.guidance_scale, least=1)
        check_number("--seed", self.seed, least=0, below=SEED_LIMIT)
