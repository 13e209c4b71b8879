"""The settings of `sample.run`, and those that determine a picture."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from latent_t2i.model.checks import check_number

SchedulerName = Literal[
    "bundle",
    "ddim",
    "ddpm",
    "deis",
    "dpmpp",
    "dpmpp-sde",
    "dpmpp-singlestep",
    "dpmpp-singlestep-3",
    "euler",
    "euler-ancestral",
    "euler-discrete",
    "heun",
    "kdpm2",
    "kdpm2-ancestral",
    "lms",
    "pndm",
    "sa-solver",
    "unipc",
]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
BATCH_SIZE = 16
SEED_LIMIT = 2**63
"""torch accepts seeds below 2**64; the rest is for the images after the first."""


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """What determines a picture, besides its prompt, its seed and the bundle."""

    guidance_scale: float = 4.0
    """Classifier-free guidance scale; 1 turns guidance off."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels sigma with LOW < sigma <= HIGH, where sigma is the ratio of noise
    to signal (Kynkäänniemi et al. 2024, 2404.07724). The other steps cost half. None: all steps."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that gets the standard deviation of the conditional one,
    against overexposure (Lin et al. 2023, 2305.08891, section 3.4); 0.7 is usual."""
    guide: str | None = None
    """A weaker model of the same run, whose prediction replaces the unconditional one
    (autoguidance, Karras et al. 2024, 2406.02507): a bundle, a snapshot, whose shortest average
    counts, or the file of another of its averages."""
    num_steps: int = 25
    """Number of sampler steps."""
    scheduler: SchedulerName = "dpmpp"
    """The sampler; docs/samplers.md lists which fit which bundle. dpmpp: DPM-Solver++ (2M). euler:
    its first order, which is DDIM, or Euler's method on rectified flow. bundle: the scheduler
    stored in the bundle."""
    negative_prompt: str = ""
    """Prompt to guide away from, in place of the empty one."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None: the size that the bundle was trained with."""

    def __post_init__(self) -> None:
        check_number("--num-steps", self.num_steps, least=1, whole=True)
        check_number("--guidance-scale", self.guidance_scale, least=1)
        check_number("--guidance-rescale", self.guidance_rescale, least=0, most=1)
        self._check_types()
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            check_number("--guidance-interval: LOW", low, least=0)
            check_number("--guidance-interval: HIGH", high, above=low)
        for length in self.size or ():
            check_number("--size", length, least=8, whole=True)
        if self.guide is not None and self.negative_prompt:
            raise ValueError(
                "--negative-prompt: has no effect with --guide, which replaces the unconditional "
                f"prediction; expected one of them, found {self.negative_prompt!r} and "
                f"{self.guide!r}"
            )
        if self.guidance_scale == 1:
            self._check_unguided()

    def _check_types(self) -> None:
        """Refuses values of wrong types, which a JSON file may have."""
        for name in ("guidance_interval", "size"):
            pair = getattr(self, name)
            if pair is not None and not (isinstance(pair, tuple) and len(pair) == 2):
                raise ValueError(f"--{name.replace('_', '-')}: expected two numbers, found {pair}")
        for name in ("negative_prompt", "guide"):
            text = getattr(self, name)
            if not isinstance(text, str) and not (name == "guide" and text is None):
                raise ValueError(f"--{name.replace('_', '-')}: expected text, found {text!r:.80}")
        check_text("--negative-prompt", self.negative_prompt)
        if self.scheduler not in get_args(SchedulerName):
            names = ", ".join(get_args(SchedulerName))
            raise ValueError(f"--scheduler: expected one of {names}, found {self.scheduler!r:.80}")

    def _check_unguided(self) -> None:
        """Refuses settings of guidance if there is none."""
        for name in ("guidance_interval", "guidance_rescale", "guide", "negative_prompt"):
            if found := getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag}: has no effect with --guidance-scale 1, which turns guidance off; "
                    f"expected a larger scale, found {flag} {found}"
                )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawSettings):
    """Generates images from a bundle with classifier-free guidance."""

    EXCLUSIVE: ClassVar = tuple(
        ("like", name)
        for name in (
            *(field.name for field in dataclasses.fields(DrawSettings)),
            "prompts",
            "prompt_file",
            "seed",
        )
    )

    REPLACES_PRESET: ClassVar = (("prompts", "prompt_file"), ("like", "batch_size"))

    name: str | None = None
    """Name of the run: selects its bundle and the output folder."""
    bundle: str | None = None
    """Folder of the bundle, or of a stock Stable Diffusion pipeline; default: runs/NAME/bundle, or
    the shipped scenes/bundle if there is neither a name nor a preset."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["--prompt"])
    ] = ()
    """Prompts; the flag accepts several and can be repeated."""
    prompt_file: str | None = None
    """File with prompts, which follow those of --prompt and replace a preset's: text with one per
    line; .jsonl with an object per line, which has `prompt` and optionally `seed` and settings such
    as `guidance_scale`; or COCO captions (.json), of which --num-prompts are chosen."""
    num_prompts: int | None = None
    """With COCO captions: the number of images to choose, one caption of each; default: all."""
    prompt_seed: int = 0
    """With COCO captions: the seed that chooses images and captions. A larger --num-prompts keeps
    those of a smaller one."""
    like: str | None = None
    """PNG of an earlier call, whose prompt, seed, settings, bundle, data type and batch size are
    used again. Of these, only --bundle, --dtype and --batch-size may be given beside it."""
    out: str | None = None
    """Output folder for samples.png, samples.jsonl and samples/; default: runs/NAME, or
    runs/samples."""
    overwrite: bool = False
    """Delete pictures that an earlier call with other settings left in the output folder. Without
    it they are an error; pictures with the same settings are kept in both cases."""
    seed: int = 0
    """Seed of the first image; each further image adds 1."""
    num_images: int = 1
    """Number of images per prompt."""
    batch_size: int | None = None
    """Number of images generated at once; affects them by rounding only. None: that of the picture
    with --like, else 16."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks; auto: float16 on a GPU, float32 elsewhere. A VAE that may overflow
    in float16 decodes in float32."""
    channels_last: bool = False
    """Store the weights of convolutions with channels last; faster on most GPUs in half precision.
    """
    compile: bool = False
    """Compile the U-Net with torch.compile; the first batch takes longer, the others less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("--num-images", self.num_images, least=1)
        for prompt in self.prompts:
            check_text("--prompt", prompt)
        if self.batch_size is not None:
            check_number("--batch-size", self.batch_size, least=1, whole=True)
        check_number("--seed", self.seed, least=0, below=SEED_LIMIT)
        check_number("--prompt-seed", self.prompt_seed, least=0)
        if self.num_prompts is not None:
            check_number("--num-prompts", self.num_prompts, least=1)
        if (self.num_prompts, self.prompt_seed) != (None, 0) and not (
            self.prompt_file and self.prompt_file.lower().endswith(".json")
        ):
            raise ValueError(
                "--num-prompts, --prompt-seed: need COCO captions; expected --prompt-file with a "
                f".json file, found {self.prompt_file!r}"
            )
        if self.like is not None:
            self._check_like()

    def _check_like(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for _, name in self.EXCLUSIVE:
            if (found := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')}: found {found!r} beside --like, which takes this "
                    "setting from the picture; expected one of them"
                )

    def draw_settings(self) -> DrawSettings:
        """Returns the settings that determine each picture."""
        names = [field.name for field in dataclasses.fields(DrawSettings)]
        return DrawSettings(**{name: getattr(self, name) for name in names})


def check_text(name: str, text: str) -> None:
    """Raises ValueError for text with half a surrogate pair, which no tokenizer takes.

    JSON may have one as an escape, and a command line that is not UTF-8 becomes such text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected Unicode text, found {text!r:.80}, whose character "
            f"{error.start + 1} is half a surrogate pair"
        ) from error


def settings_from(values: Mapping[str, Any], where: str) -> DrawSettings:
    """Returns settings of plain values, such as JSON has them.

    Raises ValueError, which starts with `where`, for an unknown name or an invalid value.
    """
    names = [field.name for field in dataclasses.fields(DrawSettings)]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(
            f"{where}: unknown setting {unknown[0]!r:.80}; expected one of {', '.join(names)}"
        )
    pairs: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return DrawSettings(**pairs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
