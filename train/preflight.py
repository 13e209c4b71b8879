"""Everything that can be wrong with a run and known before its first step, checked in seconds."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import CLIPTextModel, CLIPTokenizer

from latent_t2i.model.bundle import require_stock_shards, sampling_scheduler
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.diffusion import make_scheduler
from latent_t2i.model.drawing import check_steps
from latent_t2i.model.encoders import (
    Autoencoder,
    fingerprint,
    latent_channels,
    load_text_encoder,
    load_vae,
    tokenizer_fingerprint,
    vae_downscale,
)
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.shards.access import Access, check_order, choose_kind, open_set
from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.buckets import BucketedShards
from latent_t2i.shards.order import Order, share
from latent_t2i.shards.reader import ShardSet, require_encoders
from latent_t2i.shards.remote.transport import is_remote
from latent_t2i.shards.schema import Identity
from latent_t2i.train import checkpoint, initial
from latent_t2i.train.config import DataConfig, TrainConfig
from latent_t2i.train.initial import Initial
from latent_t2i.train.optim import check_bitsandbytes
from latent_t2i.train.validation import Validation, no_validation, open_validation

USED_BY = {
    "cache_dir": ("cache",),
    "cache_bytes": ("cache",),
    "num_workers": ("stream",),
    "window_records": ("stream",),
    "window_shards": ("map", "cache"),
    "last_batch": ("map", "cache"),
    "verify": ("map", "cache"),
}
"""Which access a setting of the data has an effect with; those not named, with any."""
ORDER_OF_ACCESS = "order of data.access"
"""The setting that tells map and cache, which visit the same batches, from stream."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run whose parts fit together."""

    config: TrainConfig
    """As asked for, `model` from `init_from` where that was asked for."""
    folder: Path
    initial: Initial | None
    """Where the first weights are; None where they are drawn or a checkpoint has later ones."""
    shards: ShardSet | BucketedShards
    access: Access
    vae: Autoencoder
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    order: Order | BucketOrder
    latent_shape: tuple[int, int, int]
    """(C, h, w); of several buckets, of the square or else the most frequent one."""
    micro_batch_size: int
    num_steps: int
    settings: dict[str, Any]
    """The resolved configuration and the shards' hash, as checkpoints and the bundle keep them."""
    notes: tuple[str, ...]
    """What to say of the first weights and the data, a line each."""
    validation: Validation | None
    """What the loss is measured on while training."""


def validate(config: TrainConfig, num_processes: int) -> Plan:
    """Opens the shards, loads the encoders, and checks them and the arithmetic of the batch.

    Raises ValueError naming the setting, what was found and what would be right.
    """
    if config.optim.kind == "adamw8bit":
        check_bitsandbytes()
    micro_batch_size = split_batch(config.batch_size, config.micro_batch_size, num_processes)
    root = output_root()
    folder = run_folder(config)
    config, first, first_sha256, notes = find_initial(config, folder)
    location = find_shards(config.shards or str(root / "shards" / "data" / config.name / "train"))
    access = make_access(config.data, location)
    shards = open_set(location, access, verify=config.data.verify)
    manifest = shards.manifest
    order = shards.order(
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window_shards=config.data.window_shards,
        last_batch=config.data.last_batch,
    )
    check_order(shards, order, access, num_processes)
    if config.preview.every_steps is not None:
        sampler = sampling_scheduler(make_scheduler(config.objective))
        check_steps(sampler, config.preview.num_steps, "preview.num_steps")
    check_graph(config.cuda_graph, num_processes, shards)
    vae = load_vae(*choose(config.vae, manifest.vae))
    for shape in shards.latent_shapes:
        text_name = manifest.text_encoder.name
        require_stock_shards(vae, text_name=text_name, latent_size=shape[1:])
        check_sides(shape[1:], len(config.model.channels), vae_downscale(vae))
    tokenizer, text_encoder = load_text_encoder(*choose(config.text_encoder, manifest.text_encoder))
    require_encoders(
        location, manifest, vae_sha256=fingerprint(vae), text_sha256=fingerprint(text_encoder)
    )
    check_tokenizer(manifest.tokenizer.sha256, tokenizer_fingerprint(tokenizer))
    check_equal("latent channels", manifest.latent_channels, "VAE's", latent_channels(vae))
    width = text_encoder.config.hidden_size
    check_equal("text width", manifest.text_width, "text encoder's", width)
    if first is not None:
        notes += initial.require_fit(
            first,
            config.model,
            latent_channels=manifest.latent_channels,
            text_width=manifest.text_width,
            partial=config.init_allow == "partial",
        )
        notes += initial.compare_encoders(first, vae, text_encoder)
        notes += initial.compare_objectives(first, config.objective)
    _, height, breadth = manifest.latent_shape
    validation, note = find_validation(config, shards)
    return Plan(
        config=config,
        folder=folder,
        initial=first,
        shards=shards,
        access=access,
        order=order,
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        latent_shape=(manifest.latent_channels, height, breadth),
        micro_batch_size=micro_batch_size,
        num_steps=count_steps(config, order),
        settings=asdict(config)
        | {
            "latent_shape": [manifest.latent_channels, height, breadth],
            "shards_sha256": shards.sha256,
            "init_sha256": first_sha256,
            ORDER_OF_ACCESS: "stream" if access.kind == "stream" else "map and cache",
        },
        notes=(
            *notes,
            *describe_buckets(shards, order),
            *describe_sharing(config.fsdp, num_processes),
            note,
        ),
        validation=validation,
    )


def find_initial(
    config: TrainConfig, folder: Path
) -> tuple[TrainConfig, Initial | None, str | None, list[str]]:
    """Returns the settings, the network to begin with, the hash of its weights, and what to say.

    With `model_from_init` the settings under `model` are the network's. A run that has a checkpoint
    takes all of this from there.
    """
    name = config.init_from
    if name is None:
        return config, None, None, []
    found = checkpoint.find_all(folder / "checkpoints")
    if found:
        before = checkpoint.read_state(found[-1])["settings"]
        if config.model_from_init and before.get("init_from") == name:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in before["model"].items()
            }
            config = replace(config, model=DenoiserConfig(**values))
        return config, None, before.get("init_sha256"), []
    first = initial.find(name)
    notes = [f"init_from: the first weights are those of {', '.join(map(str, first.files))}"]
    if config.model_from_init:
        model = initial.describe_model(first, config.model)
        notes += initial.describe_overrides(config.model, model)
        config = replace(config, model=model)
    return config, first, first.sha256, notes


def run_folder(config: TrainConfig) -> Path:
    """Returns where a run keeps everything."""
    return Path(config.out).expanduser() if config.out else output_root() / "runs" / config.name


def find_validation(
    config: TrainConfig, shards: ShardSet | BucketedShards
) -> tuple[Validation | None, str]:
    """Returns the examples of the validation set, if there is one, and what to say of it."""
    given = config.validation.shards
    if given is None:
        return None, no_validation(output_root() / "shards" / "data" / config.name / "val")
    return open_validation(
        config.validation,
        find_shards(given, "validation.shards"),
        shards,
        seed=config.seed,
        objective=config.objective,
    )


def find_shards(given: str, flag: str = "shards") -> str:
    """Returns where shards are: a URL as it is, a folder as `find_path` finds it."""
    if is_remote(given):
        return given
    path = find_path(given)
    if path is None:
        raise ValueError(f"{flag}: no folder {given!r}; make it with python -m pipeline.run")
    return str(path)


def make_access(data: DataConfig, location: str) -> Access:
    """Returns how the shards are reached.

    Raises ValueError for settings that would have no effect.
    """
    kind = choose_kind(location, data.access)
    for part in fields(DataConfig):
        found = getattr(data, part.name)
        if found != part.default and kind not in USED_BY.get(part.name, (kind,)):
            raise ValueError(
                f"data.{part.name}: has no effect with {kind} access to {location}; "
                f"expected {part.default}, found {found}"
            )
    if kind == "stream" and data.shuffle == "blocks":
        raise ValueError(
            "data.shuffle: stream access mixes records within data.window_records; "
            "expected full or none, found blocks"
        )
    return Access(
        kind=kind,
        cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        cache_bytes=data.cache_bytes,
        num_workers=data.num_workers,
        window_records=data.window_records,
    )


def choose(given: str | None, noted: Identity) -> tuple[str, str | None]:
    """Returns name and revision of an encoder: the one asked for, else the one the shards name."""
    return (given, None) if given else (noted.name, noted.revision)


def split_batch(batch_size: int, micro_batch_size: int | None, num_processes: int) -> int:
    """Returns the examples per forward pass; raises ValueError with the arithmetic if none fits."""
    mine = share(batch_size, 0, num_processes)
    per_process = mine.stop - mine.start
    if micro_batch_size is None:
        return per_process
    if per_process % micro_batch_size:
        raise ValueError(
            f"micro_batch_size: {batch_size} examples / {num_processes} processes = {per_process} "
            f"each, which {micro_batch_size} does not divide; expected a divisor of {per_process}"
        )
    return micro_batch_size


def count_steps(config: TrainConfig, order: Order | BucketOrder) -> int:
    """Returns the length of the run in steps; a last epoch that ends within one is filled up."""
    if config.num_steps is not None:
        return config.num_steps
    assert config.num_epochs is not None
    return order.num_steps(config.num_epochs)


def check_sides(latent_size: tuple[int, ...], num_levels: int, downscale: int) -> None:
    """Refuses latents (h, w) that the denoiser cannot halve from level to level."""
    multiple = 2 ** (num_levels - 1)
    height, width = latent_size
    if height % multiple or width % multiple:
        raise ValueError(
            f"shards: latents of {width} x {height}: a denoiser of {num_levels} levels "
            f"(model.channels) halves them {num_levels - 1} times; expected multiples of "
            f"{multiple}: fewer levels, or shards of images whose sides are multiples of "
            f"{multiple * downscale} px (pipeline's --image-size-px, --bucket-multiple-px)"
        )


def describe_buckets(
    shards: ShardSet | BucketedShards, order: Order | BucketOrder
) -> Iterator[str]:
    """Yields what the steps of an epoch are, a line for each bucket; nothing for a plain set."""
    if not (isinstance(shards, BucketedShards) and isinstance(order, BucketOrder)):
        return
    size = order.batch_size
    yield (
        f"{len(shards.sets)} buckets of {len(shards)} records: {order.num_steps(1)} batches of "
        f"{size} in the first epoch, each of one bucket"
    )
    for bucket in shards.buckets.buckets:
        num = bucket.records
        if num < size and order.last_batch == "drop":
            how = "fewer than a batch: never visited (data.last_batch drop)"
        elif num < size:
            how = f"fewer than a batch: one every {size / num:.3g} epochs, of records repeated"
        elif order.last_batch == "drop":
            how = f"{num // size} batches an epoch, {num % size} records left out of each"
        else:
            how = f"{num / size:.4g} batches an epoch"
        yield f"bucket {bucket.name}: {num} records, {how}"


def describe_sharing(fsdp: bool, num_processes: int) -> Iterator[str]:
    """Yields that there is nobody to share a network with, where that is so."""
    if fsdp and num_processes == 1:
        yield "fsdp: one process, so the whole network is in it"


def check_graph(cuda_graph: bool, num_processes: int, shards: ShardSet | BucketedShards) -> None:
    """Refuses steps that cannot be recorded once for all."""
    if cuda_graph and num_processes > 1:
        raise ValueError(f"cuda_graph: expected one process, found {num_processes}")
    if cuda_graph and len(shards.latent_shapes) > 1:
        raise ValueError(
            f"cuda_graph: expected batches of one shape, found {len(shards.latent_shapes)} buckets"
        )


def check_tokenizer(expected: str, found: str) -> None:
    """Refuses a tokenizer that gives other ids than the shards were made with."""
    if found != expected:
        raise ValueError(
            f"text_encoder: its tokenizer is not the shards'; they name {expected[:12]}, this one "
            f"is {found[:12]}"
        )


def check_equal(what: str, found: int, of: str, expected: int) -> None:
    """Refuses shards whose shapes do not fit the encoders'."""
    if found != expected:
        raise ValueError(f"shards: {what}: found {found}, the {of} is {expected}")
