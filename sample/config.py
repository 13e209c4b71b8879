"""The settings of sampling."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

SchedulerName = Literal["ddim", "dpmpp", "unipc", "euler", "bundle"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draws pictures from a bundle with classifier-free guidance."""

    name: str = "samples"
    """Name of the run: its bundle is drawn from and its folder takes the pictures."""
    bundle: str | None = None
    """Folder of the bundle; default runs/NAME/bundle, else the shipped scenes/bundle."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--prompt"])
    ] = ()
    """What to draw; several prompts may follow one flag, and the flag may be repeated."""
    prompt_file: str | None = None
    """Text file with one prompt per line, drawn after the prompts."""
    out: str | None = None
    """Folder for samples.png and samples/; default runs/NAME."""
    seed: int = 0
    """Seed of the first picture; the next ones count up from it."""
    images_per_prompt: int = 1
    """Pictures of each prompt."""
    guidance_scale: float = 4.0
    """Classifier-free guidance; 1 is none."""
    num_steps: int = 25
    """Steps of the sampler."""
    scheduler: SchedulerName = "dpmpp"
    """dpmpp: DPM-Solver++ (2M); unipc: UniPC; euler: one first-order step each; ddim: the same as
    euler, but not for a bundle of rectified flow; bundle: what the bundle names."""
    batch_size: int = 16
    """Pictures drawn at once; changes their last bits at most."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda, cuda:1 ..."""
    dtype: DtypeName = "auto"
    """Arithmetic of the networks; auto: float16 on a GPU, else float32."""

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
