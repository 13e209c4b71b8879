"""The settings of the commands around `sample.run`: grids, edits, interpolation, export, the page.

They have `sample.run`'s flags where they mean the same. Edits run diffusers' stock pipelines, which
have no guidance interval, rescaling or guide, so these flags are missing there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latent_t2i.model.checks import check_number
from latent_t2i.sample.config import SEED_LIMIT, DrawSettings, DtypeName, SchedulerName, check_text

Prompts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--prompt"])]
STRIP_SUFFIXES = (".png", ".apng", ".gif")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Draws a table of images: a row per prompt, and a column per value of one setting.

    The setting with several values makes the columns: --guidance-scale, --seed, --num-steps or
    --bundle, such as bundles of several training steps.
    """

    prompts: Prompts = ()
    """Prompts, one row each; the flag accepts several and can be repeated."""
    bundle: tuple[str, ...] = ("scenes/bundle",)
    """Folders of bundles; several make the columns."""
    guidance_scale: tuple[float, ...] = (4.0,)
    """Classifier-free guidance scales; several make the columns."""
    seed: tuple[int, ...] = (0,)
    """Seeds; several make the columns. All images of a column have the same seed."""
    num_steps: tuple[int, ...] = (25,)
    """Numbers of sampler steps; several make the columns."""
    scheduler: SchedulerName = "dpmpp"
    """The sampler, as for sample.run."""
    negative_prompt: str = ""
    """Prompt to guide away from, in place of the empty one."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: the size that the bundle was trained with."""
    out: str = "grid.png"
    """Output file, a PNG that carries these settings."""
    batch_size: int = 16
    """Number of images generated at once; affects them by rounding only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks; auto: float16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        _check_prompts(self.prompts, least=1)
        for name, values in self.axes().items():
            if not values:
                raise ValueError(f"--{name}: expected at least one value, found none")
        _check_seeds(self.seed)
        check_number("--batch-size", self.batch_size, least=1)
        for scale in self.guidance_scale:
            check_number("--guidance-scale", scale, least=1)
        for steps in self.num_steps:
            check_number("--num-steps", steps, least=1)
        if self.negative_prompt and set(self.guidance_scale) == {1}:
            raise ValueError(
                "--negative-prompt: has no effect with --guidance-scale 1, which turns guidance "
                f"off; expected a larger scale, found {self.negative_prompt!r}"
            )
        several = [f"--{name}" for name, values in self.axes().items() if len(values) > 1]
        if len(several) > 1:
            raise ValueError(
                f"{' and '.join(several)}: found several values for each; expected several for "
                "one of them, which makes the columns"
            )
        _check_suffix(self.out, (".png",))

    def axes(self) -> dict[str, tuple[object, ...]]:
        """Returns the values of each setting that can make the columns."""
        return {
            "bundle": self.bundle,
            "guidance-scale": self.guidance_scale,
            "seed": self.seed,
            "num-steps": self.num_steps,
        }


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Changes an image: image to image, inpainting with a mask, or variations without a prompt.

    The image is cropped and resized to the size of the output.
    """

    init_image: str | None = None
    """The image to change (required): any format that Pillow reads."""
    mask: str | None = None
    """Image of the same size as --init-image: white is repainted, black is kept bit for bit, grey
    is mixed."""
    strength: float = 0.6
    """How much may change, above 0 and up to 1: the share of the noise schedule that is run. The
    number of steps stays --num-steps at every strength."""
    prompts: Prompts = ()
    """What the result shows; several give that many results per seed. Default: the prompt that
    --init-image carries if it was made here, else the empty prompt, which gives variations."""
    num_images: int = 4
    """Number of images per prompt."""
    seed: int = 0
    """Seed of the first image of each prompt; each further image adds 1."""
    out: str | None = None
    """Output folder for edits.png and edits/; default: runs/edits. An earlier edits/ is replaced,
    unless it has files that this command did not write."""
    bundle: str = "scenes/bundle"
    """Folder of the bundle, or of a stock Stable Diffusion pipeline."""
    negative_prompt: str = ""
    """Prompt to guide away from, in place of the empty one."""
    guidance_scale: float = 4.0
    """Classifier-free guidance scale; 1 turns guidance off."""
    num_steps: int = 25
    """Number of sampler steps that are run."""
    scheduler: SchedulerName = "dpmpp"
    """The sampler, as for sample.run."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: the size that the bundle was trained with."""
    batch_size: int = 16
    """Number of images generated at once; affects them by rounding only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks; auto: float32, because a stock pipeline also runs the VAE in it,
    and most VAEs overflow in float16."""

    def __post_init__(self) -> None:
        # The checks of the settings that sample.run has too.
        DrawSettings(
            negative_prompt=self.negative_prompt,
            guidance_scale=self.guidance_scale,
            num_steps=self.num_steps,
            scheduler=self.scheduler,
            size=self.size,
        )
        check_number("--batch-size", self.batch_size, least=1)
        _check_prompts(self.prompts, least=0)
        if self.init_image is None and self.mask is not None:
            raise ValueError(
                f"--mask: found {self.mask!r} without --init-image; expected the image that it "
                "belongs to"
            )
        if self.init_image is None:
            raise ValueError("--init-image: required; expected an image file")
        check_number("--strength", self.strength, above=0, most=1)
        check_number("--num-images", self.num_images, least=1)
        check_number("--seed", self.seed, least=0, below=SEED_LIMIT)


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(DrawSettings):
    """Draws the way between prompts, seeds or both, as a strip or an animation.

    Noise and text states are interpolated on the sphere (slerp).
    """

    prompts: Prompts = ()
    """Prompts of the key frames; one is used for all."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the key frames; one is used for all."""
    num_frames: int = 9
    """Number of images from one key frame to the next, both included."""
    frame_ms: int = 120
    """Time that an animation shows each image, in milliseconds."""
    out: str = "interpolation.png"
    """Output file: .png is a strip, .gif and .apng are animations that run forth and back."""
    bundle: str = "scenes/bundle"
    """Folder of the bundle, or of a stock Stable Diffusion pipeline."""
    batch_size: int = 16
    """Number of images generated at once; affects them by rounding only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks; auto: float16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("--batch-size", self.batch_size, least=1)
        _check_prompts(self.prompts, least=1)
        _check_seeds(self.seed)
        check_number("--num-frames", self.num_frames, least=2)
        check_number("--frame-ms", self.frame_ms, least=20, most=60_000)
        counts = (len(self.prompts), len(self.seed))
        if max(counts) < 2 or (min(counts) > 1 and counts[0] != counts[1]):
            raise ValueError(
                "--prompt, --seed: expected several prompts, several seeds, or as many prompts as "
                f"seeds, found {counts[0]} prompts and {counts[1]} seeds"
            )
        _check_suffix(self.out, STRIP_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a bundle with a model card, sample images and float16 weights, ready to publish."""

    bundle: str
    """Folder of the bundle."""
    out: str
    """Output folder: new, or one that this command wrote, which is replaced."""
    title: str | None = None
    """Title of the model card; default: the name of the run."""
    license: str = "other"
    """Licence of the weights, as the Hub spells it (apache-2.0, openrail, ...); `other` makes the
    card say that none was chosen."""
    metrics: str | None = None
    """metrics.json of evaluation.run; default: the one beside the bundle, if there is one."""
    prompts: Prompts = ()
    """Prompts of the sample grid; default: those of the run's previews, else there is no grid."""
    seed: int = 0
    """Seed of the sample grid's first image; each further image adds 1."""
    guidance_scale: float = 4.0
    """Guidance scale of the sample grid."""
    num_steps: int = 25
    """Sampler steps of the sample grid."""
    fp16: bool = True
    """Add `*.fp16.safetensors`, which `from_pretrained(..., variant="fp16")` loads."""
    repo: str | None = None
    """Repository on the Hugging Face Hub, USER/NAME, that --push uploads to."""
    push: bool = False
    """Upload the folder to --repo in one commit. Without it nothing leaves this machine, and the
    command lists what would be uploaded."""
    private: bool = True
    """Create the repository as a private one; an existing repository keeps its visibility."""

    def __post_init__(self) -> None:
        check_number("--seed", self.seed, least=0, below=SEED_LIMIT)
        check_number("--guidance-scale", self.guidance_scale, least=1)
        check_number("--num-steps", self.num_steps, least=1)
        _check_prompts(self.prompts, least=0)
        if self.push and self.repo is None:
            raise ValueError("--push: needs --repo; expected USER/NAME, found none")


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Serves a web page that generates images with the bundles of this machine."""

    bundle: str | None = None
    """Folder of a bundle that the page offers first, besides those of runs/ and scenes/bundle."""
    out: str | None = None
    """Folder for the pictures, which carry their settings; default: runs/page."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 serves the page, which has no password, to the network."""
    port: int = 7860
    """Port to listen on; 0 chooses a free one."""
    max_images: int = 16
    """Most images per click."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks, as for sample.run; image to image runs in float32 at auto."""

    def __post_init__(self) -> None:
        check_number("--port", self.port, least=0, most=65535)
        check_number("--max-images", self.max_images, least=1, most=1000)


def _check_prompts(prompts: tuple[str, ...], *, least: int) -> None:
    if len(prompts) < least:
        raise ValueError(f"--prompt: expected at least {least}, found {len(prompts)}")
    for prompt in prompts:
        check_text("--prompt", prompt)


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if not seeds:
        raise ValueError("--seed: expected at least one, found none")
    for seed in seeds:
        check_number("--seed", seed, least=0, below=SEED_LIMIT)


def _check_suffix(out: str, suffixes: tuple[str, ...]) -> None:
    if Path(out).suffix.lower() not in suffixes:
        expected = ", ".join(suffixes)
        raise ValueError(f"--out: expected a file name that ends in {expected}, found {out!r}")
