"""Settings of training. Checks that need the shards or the process count are in preflight.py."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from latent_t2i.model.checks import check_number
from latent_t2i.model.config import DenoiserConfig, EMAConfig, ObjectiveConfig
from latent_t2i.shards.order import LastBatch, Shuffle
from latent_t2i.shards.settings import CACHE_BYTES, WINDOW_RECORDS, AccessMode, ReadMode, Verify

Precision = Literal["no", "fp16", "bf16"]
TrackerName = Literal["auto", "none", "tensorboard", "wandb", "trackio"]

MAX_SEED = 2**63 - 1
# Progress keeps three numbers per step of an interval on the device.
MAX_LOG_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019, 1711.05101) and its learning rate schedule."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """Optimizer. `adamw8bit` is AdamW of bitsandbytes: 2 bytes of moments per parameter, not 8,
    but the host waits for the device at every step (pip install 'latent-t2i[8bit]')."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or decayed to zero at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            check_number(f"optim.{name}", getattr(self, name), above=0)
        check_number("optim.warmup_steps", self.warmup_steps, least=0, whole=True)
        check_number("optim.weight_decay", self.weight_decay, least=0)
        for beta in self.betas:
            check_number("optim.betas", beta, least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How the shards are read and in which order."""

    access: AccessMode = "auto"
    """`map`: memory-map a local folder. `cache`: download shards ahead of use to a local folder and
    memory-map them. `stream`: read shards sequentially without storing them. `auto`: `map` for a
    folder, `cache` for a URL."""
    read: ReadMode = "auto"
    """How shards on a local path are read (access `map` and `cache`). `map`: through memory maps.
    `pread`: by positioned reads in a thread pool, for network file systems, where a page fault is a
    round trip. `auto`: `pread` on a network file system, else `map`. The batches are the same."""
    cache_dir: str | None = None
    """Folder of the shard cache (access `cache`). Default: latent-t2i/shards in the user's cache
    folder."""
    cache_bytes: int = CACHE_BYTES
    """Maximum size of the shard cache in bytes (access `cache`)."""
    num_workers: int = 0
    """Reader processes per rank (access `stream`). 0: the training process reads."""
    window_records: int = WINDOW_RECORDS
    """Size of each reader's shuffle buffer in records (access `stream`)."""
    shuffle: Shuffle = "full"
    """`full`: a new permutation of all records each epoch (access `stream`: of all shards, and of
    the records within the shuffle buffer). `blocks`: a permutation of the shards, and of the
    records within each `window_shards` of them. `none`: the order of the shards."""
    window_shards: int = 16
    """Number of shards whose records are shuffled together (shuffle `blocks`)."""
    weights: tuple[float, ...] = ()
    """One number per set of `shards`: how often an epoch visits each of its records, on average.
    1: once; 2: twice; 0.5: every second record. Default: all records once, in one order."""
    last_batch: LastBatch = "fill"
    """The last, partial batch of an epoch is filled from the next epoch or dropped."""
    verify: Verify = "lazy"
    """Compare the hash of shards on a local disk with the manifest: `lazy`, in the background after
    a shard's first use; `full`, all shards before the first step; `none`, never. Downloads and
    streams are always hashed."""

    def __post_init__(self) -> None:
        _check_text("data.cache_dir", self.cache_dir)
        check_number("data.num_workers", self.num_workers, least=0, whole=True)
        for name in ("cache_bytes", "window_records", "window_shards"):
            check_number(f"data.{name}", getattr(self, name), least=1, whole=True)
        for weight in self.weights:
            check_number("data.weights", weight, above=0)
        default = type(self).window_shards
        if self.window_shards != default and self.shuffle != "blocks":
            raise ValueError(
                f"data.window_shards: has no effect with data.shuffle {self.shuffle}; expected "
                f"{default}, or data.shuffle blocks, found {self.window_shards}"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss of the EMA weights on held-out records."""

    shards: str | None = None
    """Folder of the validation shards. None: no validation."""
    every_steps: int = 500
    """Steps between two validations. The last step is validated too."""
    num_examples: int = 1024
    """Number of records to validate on; all records of a smaller set."""
    batch_size: int = 64
    """Examples per process and forward pass."""

    def __post_init__(self) -> None:
        _check_text("validation.shards", self.shards)
        for name in ("every_steps", "num_examples", "batch_size"):
            check_number(f"validation.{name}", getattr(self, name), least=1, whole=True)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Images of fixed prompts and seeds, drawn during training with the EMA weights."""

    every_steps: int | None = None
    """Steps between two previews. The last step gets one too. None: no previews."""
    prompts: tuple[str, ...] = ()
    """Prompts, one image each."""
    seed: int = 0
    """Seed of the first image; each further image uses the next seed."""
    num_steps: int = 20
    """Sampling steps of the bundle's sampler."""
    guidance_scale: float = 4.0
    """Scale of classifier-free guidance; 1 turns it off."""

    def __post_init__(self) -> None:
        if self.every_steps is not None:
            check_number("preview.every_steps", self.every_steps, least=1, whole=True)
            if not self.prompts:
                raise ValueError(
                    "preview.prompts: expected prompts for preview.every_steps, found none"
                )
        check_number("preview.num_steps", self.num_steps, least=1, whole=True)
        check_number("preview.guidance_scale", self.guidance_scale, least=1)
        last = MAX_SEED - max(0, len(self.prompts) - 1)
        check_number("preview.seed", self.seed, least=0, most=last, whole=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a text-to-image denoiser from shards and writes a diffusers bundle."""

    EXCLUSIVE: ClassVar = (("num_steps", "num_epochs"),)
    """Groups of settings of which a user's flag replaces the preset's."""

    name: str
    """Name of the run, and of the data set unless `shards` is given."""
    vae: str | None = None
    """VAE for the bundle, a folder or Hub name. Default: the one named in the shards."""
    text_encoder: str | None = None
    """Text encoder for the bundle, a folder or Hub name. Default: the one named in the shards."""
    shards: tuple[str, ...] | None = None
    """Folder or URL of the shards, or several, which are trained on as one set. Default:
    shards/data/NAME/train."""
    out: str | None = None
    """Output folder of the run. Default: runs/NAME."""
    init_from: str | None = None
    """Start from the weights of a bundle, a diffusers pipeline or a U-Net, a folder or Hub name."""
    init_allow: Literal["strict", "partial"] = "strict"
    """`strict`: every tensor of `init_from` must fit. `partial`: tensors that do not fit keep their
    random initialization."""
    model_from_init: bool = False
    """Use the `model` settings of `init_from` (except dropout and attention_kernel)."""
    dry_run: bool = False
    """Check everything, print the memory, disk and compute that the run needs, and exit without
    creating its folder."""
    seed: int = 0
    """Seed of the initial weights, the data order and all noise."""
    batch_size: int = 64
    """Examples per step, summed over all processes."""
    micro_batch_size: int | None = None
    """Examples per process and forward pass. Default: the process's share of the batch. A smaller
    number accumulates gradients."""
    num_steps: int | None = None
    """Length of the run in steps. Give this or num_epochs."""
    num_epochs: int | None = None
    """Length of the run in epochs. Give this or num_steps."""
    max_train_s: float | None = None
    """Finish the run after this many seconds of training, summed over restarts."""
    mixed_precision: Precision = "fp16"
    """Precision of the forward and backward pass; weights stay float32. fp16 needs a GPU, bf16 a
    GPU or a CPU with bfloat16 instructions; elsewhere the run uses float32, with a warning."""
    compile: bool = False
    """Compile the denoiser's blocks with torch.compile: a slow first step, faster ones after."""
    channels_last: bool = False
    """Use the channels_last memory format, which is faster on a GPU in half precision together
    with `compile`."""
    cuda_graph: bool = False
    """Capture the training step as a CUDA graph, which is faster where kernel launches limit the
    speed (small latents or batches). One GPU only."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    tf32: bool = True
    """Allow TF32 for float32 matrix products and convolutions on a GPU. float32 training is several
    times faster with it; bf16 and fp16 training hardly changes."""
    fsdp: bool = False
    """Shard weights, gradients, optimizer moments and EMA over the processes (FSDP), for networks
    that do not fit into one GPU's memory."""
    log_every_steps: int = 50
    """Steps between two lines of metrics.jsonl."""
    trackers: tuple[TrackerName, ...] = ("auto",)
    """Experiment trackers that also receive the metrics. `auto`: TensorBoard if it is installed."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints. The last step and a signal also write one."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep."""
    max_bad_steps: int = 50
    """After more than this many consecutive steps with non-finite gradients, restore the last
    checkpoint before them and stop."""
    bundle_dtype: Literal["float32", "float16"] = "float32"
    """Data type of the weights in the bundle."""
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    """Denoiser architecture."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Diffusion objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Moving averages of the weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shard access and order."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation loss."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Preview images."""

    def __post_init__(self) -> None:
        for name in ("name", "vae", "text_encoder", "out", "init_from"):
            _check_text(name, getattr(self, name))
        _check_locations(self.shards, self.data.weights)
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "num_steps, num_epochs: expected exactly one of them, found "
                f"num_steps={self.num_steps} and num_epochs={self.num_epochs}"
            )
        for name in ("batch_size", "checkpoint_every_steps", "keep_checkpoints"):
            check_number(name, getattr(self, name), least=1, whole=True)
        for name in ("micro_batch_size", "num_steps", "num_epochs"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least=1, whole=True)
        if self.max_train_s is not None:
            check_number("max_train_s", self.max_train_s, above=0)
        interval = self.log_every_steps
        check_number("log_every_steps", interval, least=1, most=MAX_LOG_STEPS, whole=True)
        check_number("seed", self.seed, least=0, most=MAX_SEED, whole=True)
        check_number("max_bad_steps", self.max_bad_steps, least=0, whole=True)
        _check_trackers(self.trackers)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        if self.fsdp and self.mixed_precision == "fp16":
            raise ValueError(
                "fsdp: does not support fp16 gradient scaling; expected mixed_precision bf16 or "
                "no, found fp16"
            )
        if self.cuda_graph and self.gradient_checkpointing and self.model.dropout > 0:
            raise ValueError(
                "cuda_graph: cannot capture gradient_checkpointing with dropout, which restores "
                f"the random state; expected model.dropout 0, found {self.model.dropout}"
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


def _check_text(name: str, value: str | None) -> None:
    """Raises ValueError for an empty text, such as the value of an unset shell variable."""
    if value is not None and not value.strip():
        raise ValueError(f"{name}: expected a name or path, found {value!r}")


def _check_locations(shards: tuple[str, ...] | None, weights: tuple[float, ...]) -> None:
    """Raises ValueError for locations or weights that cannot be those of sets."""
    if shards is not None and (isinstance(shards, str) or not shards):
        raise ValueError(f"shards: expected one or more folders or URLs, found {shards!r}")
    for location in shards or ():
        _check_text("shards", location)
    num_sets = len(shards or (None,))
    if weights and (num_sets == 1 or len(weights) != num_sets):
        raise ValueError(
            f"data.weights: expected a weight for each of several --shards, found {len(weights)} "
            f"weights for {num_sets} sets"
        )


def _check_trackers(names: tuple[TrackerName, ...]) -> None:
    """Raises ValueError for names that exclude each other, are repeated or missing."""
    exclusive = len(names) > 1 and {"auto", "none"} & set(names)
    if not names or exclusive or len(set(names)) < len(names):
        raise ValueError(
            "trackers: expected auto, none, or a list of different trackers, found "
            f"{' '.join(names) or 'nothing'}"
        )
