"""The settings of `evaluation.run`."""

from dataclasses import dataclass
from time import time
from typing import Literal

from latent_t2i.model.checks import check_number
from latent_t2i.sample.config import SEED_LIMIT, DtypeName, SchedulerName


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Generates images, computes their metrics and writes metrics.json and report.html."""

    name: str
    """Name of the run; the metrics and the report are written to its folder."""
    bundle: str | None = None
    """Folder of the bundle; default: runs/NAME/bundle."""
    out: str | None = None
    """Output folder for metrics.json and report.html; default: runs/NAME."""
    run: str | None = None
    """Folder with the training's metrics.jsonl; default: the folder that contains the bundle."""
    oracle: bool = True
    """Use generated scene prompts and check the images with the oracle."""
    world: Literal["easy", "full"] = "easy"
    """With the oracle: the distribution of the scenes."""
    captions: str | None = None
    """Without the oracle: prompts, the first caption of each image. A COCO captions file, a .jsonl
    file, a folder with captions as for stage one, or a folder of shards."""
    num_prompts: int = 128
    """Number of prompts of each kind (single, pair, held out) at the main guidance scale."""
    guidance_scale: float = 4.0
    """The main guidance scale, whose metrics have no suffix."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """Guidance scales to compare, on half of the prompts."""
    num_steps: int = 20
    """Number of sampler steps."""
    scheduler: SchedulerName = "dpmpp"
    """The sampler, as for sample.run."""
    batch_size: int = 32
    """Number of images generated at once."""
    clip: str = "scenes/encoders/clip"
    """Folder or Hub name of the CLIP model for the CLIP score."""
    seed: int = 0
    """Seed of the prompts and of the first image."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks; auto: float16 on a GPU, float32 elsewhere."""
    started_at: int | None = None
    """Unix time at which the whole pipeline started, for total_seconds."""

    def __post_init__(self) -> None:
        if self.oracle and self.captions is not None:
            raise ValueError(
                f"--captions: found {self.captions!r}, but the oracle uses generated prompts; "
                "add --no-oracle or omit --captions"
            )
        if not self.oracle and self.captions is None:
            raise ValueError(
                "--captions: required with --no-oracle; expected a file, or a folder of "
                "captions or shards"
            )
        check_number("--num-prompts", self.num_prompts, least=1)
        check_number("--num-steps", self.num_steps, least=1)
        check_number("--batch-size", self.batch_size, least=1)
        check_number("--guidance-scale", self.guidance_scale, least=1)
        for scale in self.guidance_scales:
            check_number("--guidance-scales", scale, least=1)
        scales = {self.guidance_scale, *self.guidance_scales}
        if len({f"{scale:g}" for scale in scales}) < len(scales):
            raise ValueError(
                f"--guidance-scales: found {sorted(scales)}, of which two have the same name in "
                "the metrics; expected scales that differ in six digits"
            )
        check_number("--seed", self.seed, least=0, below=SEED_LIMIT)
        if self.started_at is not None:
            check_number("--started-at", self.started_at, least=0, most=int(time()) + 1)
