"""Checks a run before its first step: settings, shards, encoders and the batch arithmetic."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from latent_t2i.model.bundle import require_stock_shards, sampling_scheduler
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.diffusion import make_scheduler
from latent_t2i.model.encoders import (
    Autoencoder,
    fingerprint,
    latent_affine,
    latent_channels,
    load_text_encoder,
    load_vae,
    tokenizer_fingerprint,
    vae_downscale,
)
from latent_t2i.model.generate import check_num_steps
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.shards.access import Access, Kind, check_order, choose_kind, open_sets
from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.buckets import BucketedShards
from latent_t2i.shards.filesystems import file_system
from latent_t2i.shards.joining import Shards
from latent_t2i.shards.mixed_order import MixedOrder
from latent_t2i.shards.order import Epochs, share
from latent_t2i.shards.reader import ShardSet, require_encoders
from latent_t2i.shards.remote.transport import is_remote
from latent_t2i.shards.schema import Identity
from latent_t2i.shards.union import UnionShards
from latent_t2i.train import checkpoint, initial
from latent_t2i.train.config import DataConfig, TrainConfig
from latent_t2i.train.draws import DRAWS_VERSION
from latent_t2i.train.initial import Initial
from latent_t2i.train.on_main import on_main
from latent_t2i.train.optim import check_bitsandbytes
from latent_t2i.train.validation import Validation, no_validation, open_validation

# The kinds of access that read a setting; settings that are not listed apply to all kinds.
READ_BY = {
    "read": ("map", "cache"),
    "cache_dir": ("cache",),
    "cache_bytes": ("cache",),
    "num_workers": ("stream",),
    "window_records": ("stream",),
    "window_shards": ("map", "cache"),
    "last_batch": ("map", "cache"),
    "verify": ("map", "cache"),
}
# In the saved settings: map and cache access visit the same batches, stream access others.
ORDER_OF_ACCESS = "order of data.access"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked configuration and the parts that it names."""

    config: TrainConfig
    """With `model` taken from `init_from` if `model_from_init` is set."""
    folder: Path
    initial: Initial | None
    """The network of `init_from`; None if the weights are random or in a checkpoint."""
    shards: Shards
    access: Access
    vae: Autoencoder
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    order: Epochs | BucketOrder
    latent_shape: tuple[int, int, int]
    """(C, h, w); for a bucketed set, of the square bucket or else the most frequent one."""
    micro_batch_size: int
    num_steps: int
    settings: dict[str, Any]
    """The configuration and the hashes that checkpoints and the bundle record."""
    notes: tuple[str, ...]
    """Lines for the log."""
    validation: Validation | None


def validate(given: TrainConfig, num_processes: int) -> Plan:
    """Checks a configuration: opens the shards, loads the encoders, computes the batch split.

    Raises ValueError naming the setting, the value found and the value expected.
    """
    folder = run_folder(given)
    config, first, first_sha256, notes = resolve_initial(given, folder)
    if config.optim.kind == "adamw8bit":
        check_bitsandbytes()
    micro_batch_size = split_batch(config.batch_size, config.micro_batch_size, num_processes)
    locations = find_locations(config)
    access = make_access(config.data, locations)
    shards, opened = open_sets(locations, access, config.data.access, verify=config.data.verify)
    order = make_order(config, shards)
    check_order(shards, order, access, num_processes)
    if config.preview.every_steps is not None:
        sampler = sampling_scheduler(make_scheduler(config.objective))
        check_num_steps(sampler, config.preview.num_steps, "preview.num_steps")
    check_graph(config.cuda_graph, num_processes, shards)
    vae, tokenizer, text_encoder = load_encoders(config, locations[0], shards)
    if first is not None:
        notes += initial.require_fit(
            first,
            config.model,
            latent_channels=shards.manifest.latent_channels,
            text_width=shards.manifest.text_width,
            partial=config.init_allow == "partial",
        )
        notes += on_main(partial(list, initial.compare_encoders(first, vae, text_encoder)))
        notes += initial.compare_objectives(first, config.objective)
    validation, validation_note = find_validation(config, shards)
    if config.fsdp and num_processes == 1:
        notes.append("fsdp: has no effect with one process")
    _, height, width = shards.manifest.latent_shape
    latent_shape = (shards.manifest.latent_channels, height, width)
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
        latent_shape=latent_shape,
        micro_batch_size=micro_batch_size,
        num_steps=count_steps(config, order),
        settings=asdict(config)
        | {
            "latent_shape": list(latent_shape),
            **describe_constants(vae, shards),
            "shards_sha256": describe_digests(opened),
            "init_sha256": first_sha256,
            "draws": DRAWS_VERSION,
            ORDER_OF_ACCESS: "stream" if access.kind == "stream" else "map and cache",
        },
        notes=(
            *notes,
            *describe_sets(locations, opened, order),
            *describe_read(shards, config.data),
            *describe_buckets(shards, order),
            validation_note,
        ),
        validation=validation,
    )


def resolve_initial(
    config: TrainConfig, folder: Path
) -> tuple[TrainConfig, Initial | None, str | None, list[str]]:
    """Returns the resolved configuration, the network of `init_from`, its hash, and log lines.

    A run that has a checkpoint does not read the network again.
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
    first = on_main(lambda: initial.find(name))
    notes = [f"init_from: initial weights from {', '.join(map(str, first.files))}"]
    if config.model_from_init:
        model = initial.describe_model(first, config.model)
        notes += initial.describe_overrides(config.model, model)
        config = replace(config, model=model)
    return config, first, first.sha256, notes


def load_encoders(
    config: TrainConfig, location: str, shards: Shards
) -> tuple[Autoencoder, CLIPTokenizer, CLIPTextModel]:
    """Loads VAE, tokenizer and text encoder; raises ValueError if the shards are of others.

    Also refuses shards that a stock pipeline or the configured denoiser cannot work on.
    """
    manifest = shards.manifest
    vae = load_vae(*encoder_name(config.vae, manifest.vae))
    for shape in shards.latent_shapes:
        text_name = manifest.text_encoder.name
        require_stock_shards(vae, text_name=text_name, latent_size=shape[1:])
        check_sides(shape[1:], len(config.model.channels), vae_downscale(vae))
    tokenizer, text_encoder = load_text_encoder(
        *encoder_name(config.text_encoder, manifest.text_encoder)
    )
    vae_sha256, text_sha256, tokenizer_sha256 = on_main(
        lambda: (fingerprint(vae), fingerprint(text_encoder), tokenizer_fingerprint(tokenizer))
    )
    require_encoders(location, manifest, vae_sha256=vae_sha256, text_sha256=text_sha256)
    width = text_encoder.config.hidden_size
    for what, expected, found in (
        ("text_encoder: tokenizer sha256", manifest.tokenizer.sha256, tokenizer_sha256),
        ("text_encoder: width", manifest.text_width, width),
        ("vae: latent channels", manifest.latent_channels, latent_channels(vae)),
    ):
        if found != expected:
            raise ValueError(
                f"{what}: the shards in {location} were made with {expected}, found {found}; use "
                "the encoders that the shards were made with"
            )
    return vae, tokenizer, text_encoder


def describe_constants(vae: Autoencoder, shards: Shards) -> dict[str, Any]:
    """Returns the constants of the loss that come from files and not from settings.

    The hashes that the shards name cover the VAE's weights, but not the scaling in its config.json.
    """
    shift, scale = latent_affine(vae)
    return {
        "latent_shift": shift.flatten().tolist(),
        "latent_scale": scale.flatten().tolist(),
        "empty_text_sha256": hash_tensor(shards.empty_text),
        "text_scale_sha256": hash_tensor(shards.text_scale),
    }


def hash_tensor(tensor: Tensor | None) -> str | None:
    """Returns the sha256 of a tensor's bytes."""
    return None if tensor is None else hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def run_folder(config: TrainConfig) -> Path:
    """Returns the folder of a run."""
    return Path(config.out).expanduser() if config.out else output_root() / "runs" / config.name


def find_validation(config: TrainConfig, shards: Shards) -> tuple[Validation | None, str]:
    """Opens the validation set, if one is configured; returns it and a line for the log."""
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
    """Returns the location of a set: a URL unchanged, a folder as `find_path` resolves it."""
    if is_remote(given):
        return given
    path = find_path(given)
    if path is None:
        raise ValueError(
            f"{flag}: the folder {given!r} does not exist; encode it with python -m pipeline.run"
        )
    return str(path)


def find_locations(config: TrainConfig) -> list[str]:
    """Returns the locations of the sets. Raises ValueError for one that is given twice."""
    default = output_root() / "shards" / "data" / config.name / "train"
    found = [find_shards(given) for given in config.shards or (str(default),)]
    names = [one.rstrip("/") if is_remote(one) else str(Path(one).resolve()) for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"shards: expected each set once, found {name} twice; use --data.weights to visit "
                "a set more often"
            )
    return found


def make_order(config: TrainConfig, shards: Shards) -> Epochs | BucketOrder:
    """Returns the order of a run. Raises ValueError for weights of bucketed sets."""
    data = config.data
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "shuffle": data.shuffle,
        "window_shards": data.window_shards,
        "last_batch": data.last_batch,
    }
    if not data.weights:
        return shards.order(**settings)
    if not isinstance(shards, UnionShards):
        raise ValueError(
            "data.weights: sets with buckets cannot be weighted; expected none, found "
            f"{' '.join(map(str, data.weights))}"
        )
    return shards.mixed_order(data.weights, **settings)


def make_access(data: DataConfig, locations: Sequence[str]) -> Access:
    """Returns how the shards are read; raises ValueError for settings that have no effect.

    With `auto` and both folders and URLs, it is the access to the URLs.
    """
    kinds = {choose_kind(location, data.access) for location in locations}
    kind: Kind = "cache" if "cache" in kinds else kinds.pop()
    location = ", ".join(locations)
    if kind == "stream" and len(locations) > 1:
        raise ValueError(
            f"data.access: stream reads one set, found {len(locations)}; use map for folders, or "
            "cache for URLs"
        )
    for part in fields(DataConfig):
        found = getattr(data, part.name)
        if found != part.default and kind not in READ_BY.get(part.name, (kind,)):
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
        read=data.read,
    )


def encoder_name(given: str | None, recorded: Identity) -> tuple[str, str | None]:
    """Returns an encoder's name and revision: those configured, else those of the shards."""
    return (given, None) if given else (recorded.name, recorded.revision)


def split_batch(batch_size: int, micro_batch_size: int | None, num_processes: int) -> int:
    """Returns the number of examples per forward pass; raises ValueError with the arithmetic."""
    mine = share(batch_size, 0, num_processes)
    per_process = mine.stop - mine.start
    if micro_batch_size is None:
        return per_process
    if per_process % micro_batch_size:
        raise ValueError(
            f"micro_batch_size: {batch_size} examples / {num_processes} processes = {per_process} "
            f"each, found {micro_batch_size}, expected a divisor of {per_process}"
        )
    return micro_batch_size


def count_steps(config: TrainConfig, order: Epochs | BucketOrder) -> int:
    """Returns the number of steps of the run; a last epoch that ends within a step completes it."""
    if config.num_steps is not None:
        return config.num_steps
    assert config.num_epochs is not None
    return order.num_steps(config.num_epochs)


def check_sides(latent_size: tuple[int, ...], num_levels: int, downscale: int) -> None:
    """Raises ValueError for latents (h, w) that the denoiser cannot halve at every level."""
    multiple = 2 ** (num_levels - 1)
    height, width = latent_size
    if height % multiple or width % multiple:
        raise ValueError(
            f"shards: found latents of {width} x {height}; a denoiser of {num_levels} levels "
            f"(model.channels) halves them {num_levels - 1} times, expected multiples of "
            f"{multiple}; use fewer levels, or encode the shards from images whose sides are "
            f"multiples of {multiple * downscale} px (pipeline's --image-size-px and "
            "--bucket-multiple-px)"
        )


def describe_read(shards: Shards, data: DataConfig) -> Iterator[str]:
    """Yields a line for each set for which positioned reads were chosen."""
    for part in shards.sets:
        if part.read == "pread" and data.read == "auto":
            yield (
                f"data.read: {part.folder} is on a network file system "
                f"({file_system(part.folder)}), so shards are read instead of mapped; to map "
                "them: --data.read map"
            )


def describe_digests(opened: Sequence[ShardSet | BucketedShards]) -> str | list[str]:
    """Returns the hash of the only set, or those of several."""
    digests = [one.sha256 for one in opened]
    return digests[0] if len(digests) == 1 else digests


def describe_sets(
    locations: Sequence[str],
    opened: Sequence[ShardSet | BucketedShards],
    order: Epochs | BucketOrder,
) -> Iterator[str]:
    """Yields a line for each of several sets: its records and its share of an epoch."""
    if len(locations) == 1:
        return
    mixed = order if isinstance(order, MixedOrder) else None
    weights = mixed.weights if mixed else (1.0,) * len(opened)
    visits = mixed.counts if mixed else tuple(map(len, opened))
    for number, (location, one) in enumerate(zip(locations, opened, strict=True)):
        yield (
            f"set {number + 1} of {len(opened)}: {location}: {len(one)} records, weight "
            f"{weights[number]:g}, {visits[number]} visits per epoch "
            f"({visits[number] / sum(visits):.1%})"
        )


def describe_buckets(shards: Shards, order: Epochs | BucketOrder) -> Iterator[str]:
    """Yields a line for each bucket: how often an epoch visits it."""
    if not (isinstance(shards, BucketedShards) and isinstance(order, BucketOrder)):
        return
    size = order.batch_size
    yield (
        f"{len(shards.parts)} buckets of {len(shards)} records: {order.num_steps(1)} batches of "
        f"{size} in the first epoch, each from one bucket"
    )
    for bucket in shards.buckets.buckets:
        num = bucket.records
        if num < size and order.last_batch == "drop":
            use = "less than a batch, never visited (data.last_batch drop)"
        elif num < size:
            use = f"less than a batch, one every {size / num:.3g} epochs with repeated records"
        elif order.last_batch == "drop":
            use = f"{num // size} batches per epoch, {num % size} records dropped from each"
        else:
            use = f"{num / size:.4g} batches per epoch"
        yield f"bucket {bucket.name}: {num} records, {use}"


def check_graph(cuda_graph: bool, num_processes: int, shards: Shards) -> None:
    """Raises ValueError for steps that one CUDA graph cannot replay."""
    if cuda_graph and num_processes > 1:
        raise ValueError(f"cuda_graph: expected one process, found {num_processes}")
    if cuda_graph and len(shards.latent_shapes) > 1:
        raise ValueError(
            f"cuda_graph: expected batches of one shape, found {len(shards.latent_shapes)} buckets"
        )
