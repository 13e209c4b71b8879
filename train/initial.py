"""Initial weights from an existing network (`init_from`) instead of random initialization.

`init_from` is a bundle (its EMA weights), a diffusers pipeline (its `unet`) or a
UNet2DConditionModel, as a folder or Hub name. The network is compared with the settings before
anything is built. Only safetensors are read.
"""

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel

from latent_t2i.model import denoiser
from latent_t2i.model.bundle import fold_shift
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.encoders import Autoencoder, latent_affine, load_text_encoder, load_vae
from latent_t2i.model.folders import fetch, find_part, loading, read_config, require_weights

FLAG = "--init-from"
STEM = "diffusion_pytorch_model"
FILES = (
    "config.json",
    f"{STEM}.safetensors",
    f"{STEM}.safetensors.index.json",
    f"{STEM}-*-of-*.safetensors",
    "scheduler_config.json",
)
MAX_LISTED = 12
# Our names for fields of diffusers' config. The shards decide the last three.
SETTINGS = {
    "block_out_channels": "model.channels",
    "layers_per_block": "model.layers_per_block",
    "down_block_types": "model.attention",
    "up_block_types": "model.attention (up blocks)",
    "attention_head_dim": "model.attention_head_dim, model.heads",
    "transformer_layers_per_block": "model.transformer_layers",
    "norm_num_groups": "model.norm_num_groups",
    "use_linear_projection": "model.linear_projection",
    "in_channels": "latent channels",
    "out_channels": "output channels",
    "cross_attention_dim": "text width",
}
# Any value of these fits the weights: AttnProcessor2_0 does not read upcast_attention.
NOT_COMPARED = ("sample_size", "dropout", "upcast_attention")
SCHEDULE = (
    "prediction_type",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, kw_only=True)
class Initial:
    """A network on disk whose tensors are not loaded yet."""

    root: Path
    """The pipeline, or the network itself."""
    folder: Path
    """The network."""
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    """diffusers' config, completed with its defaults."""
    shapes: Mapping[str, tuple[int, ...]]
    sha256: str
    """Hash of the weight files."""


def find(source: str) -> Initial:
    """Returns the network at a folder or Hub name; raises ValueError if there is none to read."""
    root = fetch(source, None, FILES, flag=FLAG, parts=("unet", "scheduler"))
    folder = find_part(root, "unet", flag=FLAG)
    read_config(folder, "_class_name", ("UNet2DConditionModel",), flag=FLAG)
    config = _with_defaults(UNet2DConditionModel, _read_json(folder / "config.json"))
    _require_types(folder, config)
    files = find_weights(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    total = hashlib.sha256()
    with loading(folder, flag=FLAG):
        for path in files:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
            with path.open("rb") as stream:
                hashlib.file_digest(stream, lambda: total)
    return Initial(
        root=root,
        folder=folder,
        files=files,
        config=config,
        shapes=shapes,
        sha256=total.hexdigest(),
    )


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Returns a network's weight files, of the variant fp16 if there is no other.

    Raises ValueError if there are no safetensors.
    """
    for variant in ("", ".fp16"):
        single = folder / f"{STEM}{variant}.safetensors"
        index = folder / f"{STEM}.safetensors.index{variant}.json"
        if single.is_file():
            return (single,)
        if index.is_file():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict) or not _is_list_of(str, list(names.values())):
                raise ValueError(
                    f"{FLAG}: {index}: weight_map: expected file names by tensor, found {names!r}"
                )
            return tuple(folder / Path(name).name for name in sorted(set(names.values())))
    require_weights(folder, STEM, flag=FLAG)
    raise AssertionError("require_weights found weights that find_weights did not")


def _read_json(path: Path) -> dict[str, Any]:
    with loading(path.parent, flag=FLAG):
        return read_json_object(path)


def _is_list_of(kind: type, value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return is_list and all(type(item) is kind for item in value)


def _require_types(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the fields that `describe_model` reads have other types."""
    heads = config["attention_head_dim"]
    for field, kind, value in (
        ("block_out_channels", int, config["block_out_channels"]),
        ("down_block_types", str, config["down_block_types"]),
        ("attention_head_dim", int, [heads] if type(heads) is int else heads),
    ):
        if not _is_list_of(kind, value):
            raise ValueError(
                f"{FLAG}: {folder / 'config.json'}: {field}: expected a list of {kind.__name__}, "
                f"found {config[field]!r}"
            )


def _with_defaults(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a diffusers config completed with the defaults of its class."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | {name: value for name, value in config.items() if name[0] != "_"}


def describe_model(initial: Initial, ours: DenoiserConfig) -> DenoiserConfig:
    """Returns `ours` with the architecture of a network, except dropout and attention kernel.

    `require_fit` reports what DenoiserConfig cannot express.
    """
    found = {name: _simplify(value) for name, value in initial.config.items()}
    heads = found["attention_head_dim"]
    numbers = {name: found[name] for name in ("layers_per_block", "norm_num_groups")}
    numbers["transformer_layers"] = found["transformer_layers_per_block"]
    # DenoiserConfig has one number for all levels.
    changes: dict[str, Any] = {n: value for n, value in numbers.items() if isinstance(value, int)}
    return replace(
        ours,
        channels=tuple(initial.config["block_out_channels"]),
        attention=tuple("CrossAttn" in name for name in initial.config["down_block_types"]),
        attention_head_dim=heads if isinstance(heads, int) else ours.attention_head_dim,
        heads=() if isinstance(heads, int) else tuple(heads),
        linear_projection=bool(found["use_linear_projection"]),
        **changes,
    )


def describe_overrides(before: DenoiserConfig, now: DenoiserConfig) -> list[str]:
    """Returns a line for each setting that `model_from_init` changed."""
    return [
        f"model.{name}: {value} from {FLAG} replaces {getattr(before, name)}"
        for name, value in vars(now).items()
        if value != getattr(before, name)
    ]


def require_fit(
    initial: Initial,
    model: DenoiserConfig,
    *,
    latent_channels: int,
    text_width: int,
    partial: bool,
) -> list[str]:
    """Returns a line for each difference between a network and the settings.

    Raises ValueError with these lines unless `partial`, and always if no tensor fits.
    """
    with torch.device("meta"):
        expected = denoiser.build(
            model, latent_channels=latent_channels, sample_size=8, text_width=text_width
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    lines = [
        *compare_configs(initial.config, _with_defaults(UNet2DConditionModel, expected.config)),
        *compare_shapes(initial.shapes, shapes),
    ]
    num_fit = sum(initial.shapes.get(name) == shape for name, shape in shapes.items())
    if lines and not (partial and num_fit):
        more = f"; and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        remedy = (
            "use --model-from-init to copy its model settings, or --init-allow partial to "
            "initialize the tensors that do not fit randomly"
            if num_fit
            else "no tensor fits, so this is another kind of network"
        )
        raise ValueError(
            f"{FLAG}: {initial.folder} does not match the model settings: "
            f"{'; '.join(lines[:MAX_LISTED])}{more} ({remedy})"
        )
    if lines:
        lines.append(f"{num_fit} of {len(shapes)} tensors come from {FLAG}; the others are random")
    return [f"init_from: {line}" for line in lines]


def compare_configs(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each field in which two diffusers configs differ, our settings first."""
    fields = sorted(found.keys() | expected.keys(), key=lambda name: (name not in SETTINGS, name))
    for field in fields:
        theirs, ours = (_simplify(config.get(field)) for config in (found, expected))
        if field not in NOT_COMPARED and field[0] != "_" and theirs != ours:
            name = SETTINGS.get(field, f"{field} (no setting changes it)")
            yield f"{name}: found {theirs}, expected {ours}"


def _simplify(value: Any) -> Any:
    """Returns a value as our settings express it.

    A list of equal numbers, one per level, becomes that number, and the usual block types become
    booleans: with or without cross-attention.
    """
    usual = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    if not isinstance(value, list | tuple) or not value:
        return value
    if all(item in usual for item in value):
        return [item.startswith("CrossAttn") for item in value]
    same = isinstance(value[0], int) and all(item == value[0] for item in value)
    return value[0] if same else list(value)


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yields a line for each group of tensors of another shape, missing or not in our network."""
    groups: Counter[tuple[str, str]] = Counter()
    for name in sorted(found.keys() | expected.keys()):
        theirs, ours = found.get(name), expected.get(name)
        block = ".".join(name.split(".")[: 2 if name.startswith(("down_", "up_")) else 1])
        if theirs is None:
            groups[block, "missing"] += 1
        elif ours is None:
            groups[block, "not in this network"] += 1
        elif theirs != ours:
            shapes = ("x".join(map(str, shape)) for shape in (theirs, ours))
            what = "found {}, expected {}".format(*shapes)
            groups[".".join(name.split(".")[-3:]), what] += 1
    for (name, what), num in groups.items():
        yield f"{name}{f' ({num} tensors)' if num > 1 else ''}: {what}"


def compare_encoders(
    initial: Initial, vae: Autoencoder, text_encoder: CLIPTextModel
) -> Iterator[str]:
    """Yields a warning for each frozen network of the pipeline that is not the shards'."""
    expected: dict[str, tuple[Any, ...]] = {
        "vae": (vae, fold_shift(vae)),
        "text_encoder": (text_encoder,),
    }
    for part, networks in expected.items():
        folder = initial.root / part
        if not (folder / "config.json").is_file():
            yield f"init_from: {initial.root} has no {part} to compare with the shards'"
            continue
        try:
            found: Any = (
                load_vae(str(folder)) if part == "vae" else load_text_encoder(str(initial.root))[1]
            )
        except ValueError as error:
            yield f"init_from: cannot compare {folder} with the shards' {part}: {error}"
            continue
        if not any(_is_same(found, network) for network in networks):
            yield (
                f"warning: init_from: {folder} differs from the shards' {part}: the denoiser was "
                "trained on other inputs"
            )


def _is_same(one: Any, other: Any) -> bool:
    """Returns whether two encoders have the same weights, scaling and shift."""
    a, b = one.state_dict(), other.state_dict()
    # In half precision, in which a pipeline may store its encoders.
    same = a.keys() == b.keys() and all(
        tensor.shape == b[name].shape and torch.equal(tensor.half(), b[name].half())
        for name, tensor in a.items()
    )
    if isinstance(one, CLIPTextModel):
        return same
    return same and all(map(torch.allclose, latent_affine(one), latent_affine(other)))


def compare_objectives(initial: Initial, objective: ObjectiveConfig) -> Iterator[str]:
    """Yields a warning if the pipeline's scheduler belongs to another objective."""
    path = initial.root / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        yield f"init_from: {initial.root} has no scheduler; cannot check its objective"
        return
    theirs = _with_defaults(DDPMScheduler, _read_json(path))
    ours = make_scheduler(objective).config
    different = [
        f"{name}: found {theirs.get(name)!r}, expected {ours.get(name)!r}"
        for name in SCHEDULE
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        yield f"warning: init_from: trained with another objective: {'; '.join(different)}"


@torch.no_grad()
def load(initial: Initial, unet: UNet2DConditionModel) -> None:
    """Copies the tensors that fit into `unet`, as float32.

    Raises ValueError for damaged files and for tensors that are not finite.
    """
    ours: dict[str, Tensor] = unet.state_dict()
    for path in initial.files:
        with loading(path, flag=FLAG), safe_open(path, framework="pt") as file:
            for name in sorted(ours.keys() & set(file.keys())):
                if initial.shapes[name] == tuple(ours[name].shape):
                    tensor = file.get_tensor(name)
                    if not tensor.isfinite().all():
                        raise ValueError(f"tensor {name} is not finite")
                    ours[name].copy_(tensor)
