"""The settings of evaluation."""

from dataclasses import dataclass
from typing import Literal

from latent_t2i.sample.config import SchedulerName


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Draws prompts, judges the pictures, and writes metrics.json and report.html."""

    name: str
    """Name of the run; figures and report go to its folder."""
    bundle: str | None = None
    """Folder of the bundle; default runs/NAME/bundle, else the shipped scenes/bundle."""
    out: str | None = None
    """Folder for metrics.json and report.html; default runs/NAME."""
    run: str | None = None
    """Folder with the metrics.jsonl of training; default runs/NAME."""
    oracle: bool = True
    """Prompts are scenes, and an oracle reads the pictures; else prompts come from `captions`."""
    world: Literal["easy", "full"] = "easy"
    """With the oracle: what the scenes of the prompts may hold."""
    captions: str | None = None
    """Without the oracle: a COCO captions file, the first caption of each image being a prompt."""
    num_prompts: int = 128
    """Prompts of each kind (one object, two, never seen in training) at the main guidance."""
    guidance_scale: float = 4.0
    """The main guidance, whose figures have no suffix."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """Guidance scales to compare, on half as many prompts."""
    num_steps: int = 20
    """Steps of the sampler."""
    scheduler: SchedulerName = "dpmpp"
    """As `sample.run` takes it: dpmpp, unipc, euler, ddim or bundle."""
    batch_size: int = 32
    """Pictures drawn at once."""
    clip: str = "scenes/encoders/clip"
    """Folder or hub name of the CLIP that scores pictures against prompts."""
    seed: int = 0
    """Of the prompts and of their pictures."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda, cuda:1 ..."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Arithmetic of drawing; auto: float16 on a GPU, else float32."""
    started_at: int | None = None
    """Unix time at which the whole work began; gives total_seconds."""

    def __post_init__(self) -> None:
        if self.oracle == (self.captions is not None):
            raise ValueError(
                "--captions: without the oracle it is needed, with it it has no effect; found "
                f"oracle={self.oracle}, captions={self.captions}"
            )
        for flag, count in (("--num-prompts", self.num_prompts), ("--num-steps", self.num_steps)):
            if count < 1:
                raise ValueError(f"{flag}: expected at least 1, found {count}")
        for scale in (self.guidance_scale, *self.guidance_scales):
            if scale < 1:
                raise ValueError(f"--guidance-scales: expected at least 1, found {scale}")
