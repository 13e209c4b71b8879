"""The settings of `evaluation.run`."""

from dataclasses import dataclass
from time import time
from typing import Literal

from latent_t2i.model.checks import check_number
from latent_t2i.sample.config import SEED_LIMIT, DtypeName, SchedulerName

ResizeMode = Literal["legacy", "clean", "pytorch"]
ProtocolName = Literal["own", "coco-uvit", "coco-mlperf"]


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Networks that metrics use, each a file, a folder or a Hub name."""

    clip: str = "scenes/encoders/clip"
    """CLIP model of the CLIP score and of R-precision."""
    inception: str | None = None
    """torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth) for FID, KID
    and the Inception score; default: the torch hub cache."""
    lpips: str | None = None
    """Weights of LPIPS' backbone (torchvision's vgg16-397923af.pth); default: the torch hub
    cache."""
    features: str = "scenes/encoders/clip"
    """Feature extractor of the Frechet distance, CMMD, MIND and of memorisation: a transformers
    or timm model, such as facebook/dinov2-large or openai/clip-vit-large-patch14-336."""
    captioner: str | None = None
    """Captioner of caption similarity, such as Salesforce/blip-image-captioning-large."""
    sentences: str | None = None
    """Sentence encoder of caption similarity; default: the text tower of `clip`."""
    detector: str | None = None
    """Object detector of semantic consistency, such as PekingU/rtdetr_r50vd or
    google/owlv2-base-patch16-ensemble."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Further settings to compare, each on a part of the prompts."""

    num_prompts: int | None = None
    """Prompts of each kind per setting; default: half of --num-prompts."""
    guidance_intervals: tuple[tuple[float, float], ...] = ()
    """Guidance intervals to compare, in sigma, at the main guidance scale."""
    guides: tuple[str, ...] = ()
    """Weaker models for autoguidance: bundles, or snapshots of earlier steps, each with its
    shortest average or as the file of another one; a folder of snapshots is all of them."""
    schedulers: tuple[SchedulerName, ...] = ()
    """Samplers to compare, each at all of `num_steps`."""
    num_steps: tuple[int, ...] = ()
    """Numbers of steps to compare, with each of `schedulers`."""
    checkpoints: tuple[str, ...] = ()
    """Weights of one run at different steps, for the metrics against images seen: bundles,
    snapshots with their shortest average, or folders of either."""

    def __post_init__(self) -> None:
        if self.num_prompts is not None:
            check_number("--sweep.num-prompts", self.num_prompts, least=1, whole=True)
        for steps in self.num_steps:
            check_number("--sweep.num-steps", steps, least=1, whole=True)
        for low, high in self.guidance_intervals:
            check_number("--sweep.guidance-intervals", low, least=0)
            check_number("--sweep.guidance-intervals", high, above=low)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Judges a bundle, or a folder of images: metrics, their floors and ceilings, and a report."""

    name: str
    """Name of the run; the results are written to its folder."""
    bundle: str | None = None
    """Folder of the bundle; default: runs/NAME/bundle."""
    images: str | None = None
    """Folder of finished images to judge instead of a bundle."""
    reference: str | None = None
    """Real images to compare with: a folder, or statistics (.npz) of evaluation.reference, which
    also names the resize mode of those of pytorch-fid and clean-fid. Default: with the oracle, the
    scenes of the prompts."""
    size: int | None = None
    """Side in pixels to which images are cropped and resized. Default: the bundle's size for the
    reference; with --images, all images must have one size."""
    out: str | None = None
    """Output folder; default: runs/NAME."""
    compare: tuple[str, ...] = ()
    """Output folders of earlier evaluations, shown side by side in the report."""
    run: str | None = None
    """Folder with the training's metrics.jsonl; default: the folder that contains the bundle."""
    metrics: tuple[str, ...] = ("all",)
    """Metrics to compute; `all`: every metric whose weights and inputs are available."""
    protocol: ProtocolName = "own"
    """own: these settings. coco-uvit, coco-mlperf: the published protocols, which fix prompts,
    number of images, size, crop and resize mode."""
    oracle: bool = True
    """Use generated scene prompts and check the images with the oracle."""
    world: Literal["easy", "full"] = "easy"
    """With the oracle: the distribution of the scenes."""
    captions: str | None = None
    """Without the oracle: prompts, the first caption of each image. A COCO captions file, a .jsonl
    file, a folder with captions as for stage one, or a folder of shards."""
    objects: str | None = None
    """COCO instances file of the captions' images, for semantic consistency."""
    train_shards: tuple[str, ...] | None = None
    """Folders of the training set or sets, for memorisation and the check for contamination;
    default: the run's."""
    num_train_images: int = 10_000
    """Most training images to decode for memorisation; of a larger set, a fixed random part."""
    allow_contamination: bool = False
    """Continue if prompts or reference images are in the training set; marked in every result."""
    num_prompts: int = 128
    """Number of prompts of each kind (single, pair, held out) at the main guidance scale."""
    num_seed_sets: int = 3
    """Disjoint parts of the images, at least three, for the spread of set metrics such as FID."""
    num_diverse_prompts: int = 8
    """Prompts of which several images are drawn, for LPIPS as diversity."""
    resize: ResizeMode = "legacy"
    """How images reach Inception's 299 px. legacy: TF1 bilinear, as in torch-fidelity. clean: PIL
    bicubic with antialiasing, as in clean-fid. pytorch: bilinear without antialiasing, as in
    pytorch-fid, U-ViT and MLPerf."""
    guidance_scale: float = 4.0
    """The main guidance scale, whose metrics have no suffix."""
    guidance_interval: tuple[float, float] | None = None
    """Interval of sigma in which guidance applies (Kynkaanniemi et al. 2024, 2404.07724)."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """Guidance scales to compare, on half of the prompts."""
    num_steps: int = 20
    """Number of sampler steps."""
    scheduler: SchedulerName = "dpmpp"
    """The sampler, as for sample.run."""
    sweep: SweepConfig = SweepConfig()
    """Further settings to compare."""
    weights: WeightsConfig = WeightsConfig()
    """Networks of the metrics."""
    batch_size: int = 32
    """Number of images generated or judged at once."""
    seed: int = 0
    """Seed of the prompts and of the first image."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: DtypeName = "auto"
    """Data type of the networks that draw; auto: float16 on a GPU, float32 elsewhere."""
    started_at: int | None = None
    """Unix time at which the whole pipeline started, for total_seconds."""

    def __post_init__(self) -> None:
        self._check_inputs()
        for name in ("num_prompts", "num_steps", "batch_size"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name), least=1)
        # The deviation of two values says nothing.
        check_number("--num-seed-sets", self.num_seed_sets, least=3, whole=True)
        check_number("--num-diverse-prompts", self.num_diverse_prompts, least=0)
        check_number("--num-train-images", self.num_train_images, least=2, whole=True)
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

    def _check_inputs(self) -> None:
        if self.images is not None and self.bundle is not None:
            raise ValueError(
                f"--images: found {self.images!r} beside --bundle {self.bundle!r}; expected one of "
                "them: finished images, or a bundle that draws them"
            )
        if self.images is not None:
            return
        if self.oracle and self.captions is not None:
            raise ValueError(
                f"--captions: found {self.captions!r}, but the oracle uses generated prompts; "
                "add --no-oracle or omit --captions"
            )
        if not self.oracle and self.captions is None and self.protocol == "own":
            raise ValueError(
                "--captions: required with --no-oracle; expected a file, or a folder of "
                "captions or shards"
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Makes statistics of real images, once for all evaluations."""

    images: str
    """A folder of images; a .npz of pytorch-fid or clean-fid; or, with --kind, what a source of
    stage one reads: a folder, a file, a pattern, braces or a URL."""
    kind: Literal["images", "coco", "folder", "webdataset", "parquet", "statistics"] = "images"
    """images: all images of a folder; statistics: a .npz; others: as for stage one."""
    captions: str = ""
    """coco: the captions file, which lists the images."""
    extractor: str = "inception"
    """inception, or the folder or Hub name of a transformers or timm model."""
    inception: str | None = None
    """torch-fidelity's Inception weights; default: the torch hub cache."""
    resize: ResizeMode = "legacy"
    """How images reach Inception's 299 px, as for evaluation.run."""
    size: int | None = None
    """Side in pixels to which images are cropped around their centre and resized; default: all
    images must have one size."""
    num_images: int | None = None
    """Use only the first images."""
    batch_size: int = 32
    """Number of images in the network at once."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    out: str | None = None
    """The .npz file; default: data/reference/NAME-HASH.npz."""

    def __post_init__(self) -> None:
        check_number("--batch-size", self.batch_size, least=1, whole=True)
        for name in ("size", "num_images"):
            if (value := getattr(self, name)) is not None:
                check_number(f"--{name.replace('_', '-')}", value, least=1, whole=True)
        if self.captions and self.kind != "coco":
            raise ValueError(f"--captions: has no effect with --kind {self.kind}, only with coco")
