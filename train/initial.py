"""The first weights of a run, where they are not drawn: `init_from` names a network to go on from.

A bundle of ours (its averaged weights), a stock diffusers pipeline (its `unet`) or a bare
UNet2DConditionModel, as a folder or hub name. The network is compared with the settings field by
field and tensor by tensor before anything is built; what does not fit is refused with the list, or
with `init_allow: partial` begins with fresh weights and is told. Only safetensors are read; half
precision becomes float32. A run that goes on from a checkpoint does not read it again.
"""

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel

from latent_t2i.model import denoiser
from latent_t2i.model.bundle import fold_shift
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
SETTINGS = {
    "block_out_channels": "model.channels",
    "layers_per_block": "model.layers_per_block",
    "down_block_types": "model.attention",
    "up_block_types": "model.attention (on the way up)",
    "attention_head_dim": "model.attention_head_dim, model.heads",
    "transformer_layers_per_block": "model.transformer_layers",
    "norm_num_groups": "model.norm_num_groups",
    "use_linear_projection": "model.linear_projection",
    "in_channels": "the latents' channels",
    "out_channels": "the channels that it gives",
    "cross_attention_dim": "the text's width",
}
"""What we call a field of diffusers' config; the last three are the shards' to say."""
NOT_OF_THE_WEIGHTS = ("sample_size", "dropout", "upcast_attention")
"""Fields that weights fit with any value of; AttnProcessor2_0 does not read upcast_attention."""
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
    """A network on disk: its config and its tensors' shapes, the tensors themselves unread."""

    root: Path
    """The pipeline, or the network itself."""
    folder: Path
    """The network."""
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    """diffusers' config, with its defaults for what is left out."""
    shapes: Mapping[str, tuple[int, ...]]
    sha256: str
    """Over the files of weights."""


def find(name: str) -> Initial:
    """Finds a network; raises ValueError, with the remedy, where there is none that can be read."""
    root = fetch(name, None, FILES, flag=FLAG, parts=("unet", "scheduler"))
    folder = find_part(root, "unet", flag=FLAG)
    read_config(folder, "_class_name", ("UNet2DConditionModel",), flag=FLAG)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
        config=_with_defaults(UNet2DConditionModel, config),
        shapes=shapes,
        sha256=total.hexdigest(),
    )


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Returns the files of a network's weights: the full ones, or else those of variant fp16.

    Raises ValueError where there are no safetensors.
    """
    for variant in ("", ".fp16"):
        single = folder / f"{STEM}{variant}.safetensors"
        index = folder / f"{STEM}.safetensors.index{variant}.json"
        if single.is_file():
            return (single,)
        if index.is_file():
            with loading(folder, flag=FLAG):
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return tuple(folder / Path(name).name for name in sorted(names))
    require_weights(folder, STEM, flag=FLAG)
    raise AssertionError("require_weights knows of weights that find_weights does not")


def _with_defaults(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a diffusers config with the class's defaults for fields that it leaves out."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | {name: value for name, value in config.items() if name[0] != "_"}


def describe_model(initial: Initial, ours: DenoiserConfig) -> DenoiserConfig:
    """Returns the settings of a network, as far as ours can say them; dropout and kernel are ours.

    What they cannot say shows when the two networks are compared.
    """
    found = {name: _simplify(value) for name, value in initial.config.items()}
    heads = found["attention_head_dim"]
    types = initial.config["down_block_types"]
    return replace(
        ours,
        channels=tuple(initial.config["block_out_channels"]),
        attention=tuple("CrossAttn" in name for name in types),
        attention_head_dim=heads if isinstance(heads, int) else ours.attention_head_dim,
        heads=() if isinstance(heads, int) else tuple(heads),
        linear_projection=bool(found["use_linear_projection"]),
        **{
            name: found[theirs]
            for name, theirs in (
                ("layers_per_block", "layers_per_block"),
                ("transformer_layers", "transformer_layers_per_block"),
                ("norm_num_groups", "norm_num_groups"),
            )
            if isinstance(found[theirs], int)
        },
    )


def describe_overrides(before: DenoiserConfig, now: DenoiserConfig) -> list[str]:
    """Returns a line for each setting that `model_from_init` changed."""
    return [
        f"model.{name}: {value} from {FLAG}, in place of {getattr(before, name)}"
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
    """Compares a network with the one that the settings ask for.

    Returns a line for each difference. Raises ValueError with them unless `partial` allows any, and
    where not one tensor fits.
    """
    with torch.device("meta"):
        wanted = denoiser.build(
            model, latent_channels=latent_channels, sample_size=8, text_width=text_width
        )
    ours = {name: tuple(tensor.shape) for name, tensor in wanted.state_dict().items()}
    lines = [
        *compare_configs(initial.config, _with_defaults(UNet2DConditionModel, wanted.config)),
        *compare_shapes(initial.shapes, ours),
    ]
    num_fit = sum(initial.shapes.get(name) == shape for name, shape in ours.items())
    if lines and not (partial and num_fit):
        more = len(lines) - MAX_LISTED
        told = "; ".join(lines[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
        remedy = (
            "--model-from-init takes the model settings from it, --init-allow partial begins "
            "with fresh weights where they do not fit"
            if num_fit
            else "no tensor fits: this is another kind of network"
        )
        raise ValueError(
            f"{FLAG}: {initial.folder} is not the network of this run: {told} ({remedy})"
        )
    if lines:
        lines.append(f"{num_fit} of {len(ours)} tensors are from {FLAG}, the others fresh")
    return [f"init_from: {line}" for line in lines]


def compare_configs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each field in which two networks' configs differ, by our names for it."""
    for field in sorted(
        found.keys() | wanted.keys(), key=lambda name: (name not in SETTINGS, name)
    ):
        theirs, ours = (_simplify(config.get(field)) for config in (found, wanted))
        if field in NOT_OF_THE_WEIGHTS or field[0] == "_" or theirs == ours:
            continue
        if field.endswith("block_types"):
            theirs, ours = _attention(theirs), _attention(ours)
        name = SETTINGS.get(field, f"{field} (which no setting here changes)")
        yield f"{name}: {theirs} there, {ours} here"


def _simplify(value: Any) -> Any:
    """Returns a value as JSON has it; a list of equal numbers, one a level, as that number."""
    if not isinstance(value, list | tuple):
        return value
    values = list(value)
    same = len(values) > 0 and all(each == values[0] for each in values)
    return values[0] if same and isinstance(values[0], int) else values


def _attention(types: Any) -> Any:
    """Returns block types as `model.attention` has them, where they are of the usual kinds."""
    usual = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    if isinstance(types, list) and all(name in usual for name in types):
        return [name.startswith("CrossAttn") for name in types]
    return types


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yields a line for each group of tensors that do not fit, are missing or are left over."""
    groups: Counter[tuple[str, str]] = Counter()
    for name in sorted(found.keys() | wanted.keys()):
        theirs, ours = found.get(name), wanted.get(name)
        if theirs == ours:
            continue
        if theirs is None:
            groups[_block(name), "not there: fresh"] += 1
        elif ours is None:
            groups[_block(name), "not in this network: left out"] += 1
        else:
            shapes = f"{_show(theirs)} there, {_show(ours)} here: fresh"
            groups[".".join(name.split(".")[-3:]), shapes] += 1
    for (name, what), num in groups.items():
        yield f"{name}{f' ({num} tensors)' if num > 1 else ''}: {what}"


def _block(name: str) -> str:
    """Returns the part of the network that a tensor is of, as in down_blocks.1."""
    found = re.match(r"(?:down|up)_blocks\.\d+|[^.]+", name)
    return found[0] if found else name


def _show(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def compare_encoders(
    initial: Initial, vae: Autoencoder, text_encoder: CLIPTextModel
) -> Iterator[str]:
    """Yields a warning for each frozen network that is not the one the weights were trained with.

    Weights are compared in half precision, in which a pipeline may keep them.
    """
    for part, what in (("vae", "latents"), ("text_encoder", "text")):
        if not (initial.root / part / "config.json").is_file():
            yield f"init_from: {initial.root} has no {part}, so whose {what} it knows is not known"
            continue
        try:
            if part == "vae":
                theirs: nn.Module = load_vae(str(initial.root / part))
                same = any(_same_vae(theirs, ours) for ours in (vae, fold_shift(vae)))
            else:
                theirs = load_text_encoder(str(initial.root))[1]
                same = _same_weights(theirs, text_encoder)
        except ValueError as error:
            yield f"init_from: whose {what} it knows is not known: {error}"
            continue
        if not same:
            yield (
                f"warning: init_from: its {part} is not that of the shards: the weights were "
                f"trained on other {what} and have to learn these"
            )


def _same_vae(one: Any, other: Any) -> bool:
    """Returns whether two autoencoders have the same weights, scale and shift."""
    if not _same_weights(one, other):
        return False
    return all(map(torch.allclose, latent_affine(one), latent_affine(other)))


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether two networks have the same weights, in half precision."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        tensor.shape == b[name].shape and torch.equal(tensor.half(), b[name].half())
        for name, tensor in a.items()
    )


def compare_objectives(initial: Initial, objective: ObjectiveConfig) -> Iterator[str]:
    """Yields a line where the weights' scheduler tells of another objective."""
    path = initial.root / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        yield f"init_from: no scheduler in {initial.root} says what its weights predict"
        return
    with loading(path.parent, flag=FLAG):
        theirs = _with_defaults(DDPMScheduler, json.loads(path.read_text(encoding="utf-8")))
    ours = make_scheduler(objective).config
    different = [
        f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in SCHEDULE
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        yield f"warning: init_from: trained on another objective: {', '.join(different)}"


@torch.no_grad()
def load(initial: Initial, unet: UNet2DConditionModel) -> None:
    """Copies the tensors that fit into `unet`, as float32.

    Raises ValueError for files that are damaged, or hold what is not finite.
    """
    ours: dict[str, Tensor] = unet.state_dict()
    for path in initial.files:
        with loading(path, flag=FLAG), safe_open(path, framework="pt") as file:
            for name in sorted(initial.shapes.keys() & ours.keys() & set(file.keys())):
                if initial.shapes[name] == tuple(ours[name].shape):
                    tensor = file.get_tensor(name)
                    if not tensor.isfinite().all():
                        raise ValueError(f"{name} is not finite")
                    ours[name].copy_(tensor)
