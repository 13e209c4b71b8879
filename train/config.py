"""Stage two's settings. Checks that need the shards or the process count are in preflight.py."""

from dataclasses import dataclass, field
from typing import Literal

from latent_t2i.model.config import DenoiserConfig, EMAConfig, ObjectiveConfig
from latent_t2i.shards.order import LastBatch, Shuffle
from latent_t2i.shards.settings import CACHE_BYTES, WINDOW_RECORDS, AccessMode

Precision = Literal["no", "fp16", "bf16"]
TrackerName = Literal["auto", "none", "tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019, 1711.05101) and its learning rate over the steps."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit`: bitsandbytes', whose moments take 2 bytes a weight in place of 8 (pip install
    'latent-t2i[8bit]'); the host then waits for the device once a step."""
    learning_rate: float = 1e-4
    """The highest rate, reached after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear growth from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: stay, or fall to zero at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(
                f"optim.learning_rate: expected more than 0, found {self.learning_rate}"
            )
        if self.max_grad_norm <= 0:
            raise ValueError(f"optim.max_grad_norm: expected above 0, found {self.max_grad_norm}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: expected 0 <= beta < 1, found {self.betas}")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps: expected 0 or more, found {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How records are reached and visited."""

    access: AccessMode = "auto"
    """`map`: a local folder, mapped; `cache`: fetched ahead of use into a local folder, then
    mapped; `stream`: read front to back, nothing kept; `auto`: map a folder, cache a URL."""
    cache_dir: str | None = None
    """cache: its folder; default: latent-t2i/shards in the user's cache folder."""
    cache_bytes: int = CACHE_BYTES
    """cache: the most that the shards may take there."""
    num_workers: int = 0
    """stream: processes that read for each rank; 0: the rank itself."""
    window_records: int = WINDOW_RECORDS
    """stream: among how many records each of them mixes."""
    shuffle: Shuffle = "full"
    """`full`: each epoch is a fresh permutation of all records (stream: of the shards, records
    mixed in the window); `blocks`: of the shards, mixed within some; `none`: the shards' order."""
    window_shards: int = 16
    """How many shards `blocks` mixes with each other."""
    last_batch: LastBatch = "fill"
    """An epoch's last, partial batch: filled up from the next epoch, or dropped."""
    verify: bool = False
    """Hash every shard against the manifest before the first step; a fetched one always is."""

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 1), ("num_workers", 0), ("window_records", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"data.{name}: expected {least} or more, found {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on records that training never sees, with the averaged weights."""

    shards: str | None = None
    """Folder of the validation set; without one there is no validation, and the run says so."""
    every_steps: int = 500
    """Steps between two measurements; the end of the run makes one too."""
    num_examples: int = 1024
    """How many of the set's records to measure on; a smaller set is taken whole."""
    batch_size: int = 64
    """Examples per process and forward pass."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "num_examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"validation.{name}: expected 1 or more, found {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures of the same prompts and seeds while training, with the averaged weights."""

    every_steps: int | None = None
    """Steps between two previews; the end of the run makes one too. None: no previews."""
    prompts: tuple[str, ...] = ()
    """What to draw, a picture each."""
    seed: int = 0
    """Seed of the first picture; the next ones count up from it."""
    num_steps: int = 20
    """Steps of the sampler, which is the one that the bundle names."""
    guidance_scale: float = 4.0
    """Classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"preview.every_steps: expected 1 or more, found {self.every_steps}")
        if self.every_steps is not None and not self.prompts:
            raise ValueError("preview.prompts: expected what to draw every_steps, found nothing")
        if self.num_steps < 1:
            raise ValueError(f"preview.num_steps: expected 1 or more, found {self.num_steps}")
        if self.guidance_scale < 1:
            raise ValueError(
                f"preview.guidance_scale: expected 1 or more, found {self.guidance_scale}"
            )
        if self.seed < 0:
            raise ValueError(f"preview.seed: expected 0 or more, found {self.seed}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that stage two can be told."""

    name: str
    """Name of the run, and of the data set unless `shards` says otherwise."""
    vae: str | None = None
    """VAE for the bundle, a folder or hub name; default: the one that the shards name."""
    text_encoder: str | None = None
    """Text encoder for the bundle, a folder or hub name; default: the one that the shards name."""
    shards: str | None = None
    """Folder or URL of shards, or pipe:COMMAND; default shards/data/NAME/train."""
    out: str | None = None
    """Folder of the run; default runs/NAME."""
    init_from: str | None = None
    """Begin with the weights of a bundle, a diffusers pipeline or a U-Net, a folder or hub name."""
    init_allow: Literal["strict", "partial"] = "strict"
    """What of `init_from` may not fit: nothing, or any part, which begins with fresh weights."""
    model_from_init: bool = False
    """Take the settings under `model` from `init_from` (dropout and attention_kernel stay)."""
    dry_run: bool = False
    """Check everything, say what the run takes, and stop without making its folder."""
    seed: int = 0
    """Decides the first weights, the order and all noise."""
    batch_size: int = 64
    """Examples per step over all processes together."""
    micro_batch_size: int | None = None
    """Examples per process and forward pass; fewer than its share means gradient accumulation."""
    num_steps: int | None = None
    """Length of the run in steps; give this or num_epochs."""
    num_epochs: int | None = None
    """Length of the run in visits to each record; give this or num_steps."""
    max_train_s: float | None = None
    """Stop after this many seconds of training, over all starts, as if the last step had come."""
    mixed_precision: Precision = "fp16"
    """Arithmetic of the forward and backward pass; weights stay float32. fp16 needs a GPU."""
    compile: bool = False
    """Compile the denoiser with torch.compile: a slow first step, faster ones after."""
    channels_last: bool = False
    """Keep activations channels-last, which convolutions on a GPU prefer in half precision."""
    cuda_graph: bool = False
    """Record a whole step as a CUDA graph and play it back, for small latents or batches, whose
    steps the launches of kernels would hold up. On one GPU."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, about a third more work."""
    tf32: bool = True
    """Let a GPU round the factors of float32 products to TF32, which bf16 and fp16 training hardly
    has any of; float32 training is several times faster."""
    fsdp: bool = False
    """Share out weights, gradients, moments and averages over the processes (FSDP), for a network
    that does not fit into one GPU's memory."""
    log_every_steps: int = 50
    """Steps between two lines of metrics.jsonl."""
    trackers: tuple[TrackerName, ...] = ("auto",)
    """Who gets these lines too: tensorboard, wandb, trackio; auto: TensorBoard if installed."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints; the end of the run and a signal also make one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    max_bad_steps: int = 50
    """Give up after more than this many steps in a row with non-finite gradients: go back to the
    checkpoint from before them and stop."""
    bundle_dtype: Literal["float32", "float16"] = "float32"
    """How the bundle's weights are stored."""
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The denoiser."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it learns."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it learns."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """The average of its weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it sees."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """What it is measured on while it runs."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """What it draws while it runs."""

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"num_steps, num_epochs: give exactly one, found num_steps={self.num_steps} and "
                f"num_epochs={self.num_epochs}"
            )
        counts = ("batch_size", "micro_batch_size", "num_steps", "num_epochs", "max_train_s")
        intervals = ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints")
        for name in (*counts, *intervals):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, found {value}")
        if self.fsdp and self.mixed_precision == "fp16":
            raise ValueError(
                "fsdp: its gradients have no loss scale for fp16; expected mixed_precision bf16 "
                "or no, found fp16"
            )
        if self.optim.kind == "adamw8bit" and (self.fsdp or self.cuda_graph):
            other = "fsdp" if self.fsdp else "cuda_graph"
            raise ValueError(f"optim.kind: expected adamw with {other}, found adamw8bit")
        if self.init_from is None:
            for name, default in (("init_allow", "strict"), ("model_from_init", False)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: has no effect without init_from; expected {default}, found "
                        f"{getattr(self, name)}"
                    )
        _check_trackers(self.trackers)
        for name in ("seed", "max_bad_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")


def _check_trackers(names: tuple[TrackerName, ...]) -> None:
    """Raises ValueError for names that exclude each other, are repeated or missing."""
    exclusive = len(names) > 1 and {"auto", "none"} & set(names)
    if not names or exclusive or len(set(names)) < len(names):
        raise ValueError(
            "trackers: expected auto, none, or a list of different trackers, found "
            f"{' '.join(names) or 'nothing'}"
        )
