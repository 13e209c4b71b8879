"""Two published protocols on COCO 2014, as settings: `--protocol coco-uvit` and `coco-mlperf`.

A protocol fixes what its figures depend on; paths of data may be given. `coco-mlperf` has a public
list of captions and statistics (https://github.com/mlcommons/training, stable_diffusion).
`coco-uvit` (https://github.com/baofff/U-ViT) publishes no list: 30,000 random images of val2014
with one random caption each. So the choice is written to prompts.json beside the results, and a
second run reads it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from latent_t2i.evaluation.captions import read_items
from latent_t2i.evaluation.config import EvaluationConfig, ProtocolName
from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.model.paths import find_path, hash_file
from latent_t2i.scenes.prompts import Prompt

PROMPTS_FILE = "prompts.json"
UVIT_SEED = 1234
"""The seed of U-ViT's configuration; its loader's order depends on it and on the GPUs' number."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a protocol fixes, and where its data are by default."""

    fixed: Mapping[str, Any]
    """Settings of EvaluationConfig; a dot leads into its nested settings."""
    defaults: Mapping[str, Any]
    """Settings that may be given: paths, and the seed of the images."""
    prompts_seed: int | None
    """Seed of the choice of images and captions; None if the captions file is the list."""
    source: str
    """Where the settings come from."""


PROTOCOLS: Mapping[ProtocolName, Protocol] = MappingProxyType(
    {
        "coco-uvit": Protocol(
            fixed={
                "oracle": False,
                "num_prompts": 30_000,
                "size": 256,
                "resize": "pytorch",
                "scheduler": "dpmpp-singlestep-3",
                "num_steps": 50,
                # U-ViT's scale 1 in cond + scale * (cond - uncond).
                "guidance_scale": 2.0,
                "guidance_interval": None,
            },
            defaults={
                "captions": "data/coco/annotations/captions_val2014.json",
                "reference": "data/coco/val2014",
            },
            prompts_seed=UVIT_SEED,
            source="U-ViT: configs/mscoco_uvit.py, eval_t2i_discrete.py, tools/fid_score.py",
        ),
        "coco-mlperf": Protocol(
            fixed={
                "oracle": False,
                "num_prompts": 30_000,
                "size": 512,
                "resize": "pytorch",
                "scheduler": "ddim",
                "num_steps": 50,
                "guidance_scale": 8.0,
                "guidance_interval": None,
                "weights.clip": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            },
            defaults={
                "captions": "data/coco/val2014_30k.tsv",
                "reference": "data/coco/val2014_30k_stats.npz",
                "seed": 2023,
            },
            prompts_seed=None,
            source="MLPerf training: stable_diffusion/configs/train_32x08x08.yaml",
        ),
    }
)


def apply_protocol(config: EvaluationConfig) -> EvaluationConfig:
    """Returns the settings with the protocol's; raises ValueError if one of them differs.

    A setting differs if it is neither its default nor the protocol's value.
    """
    if config.protocol == "own":
        return config
    protocol = PROTOCOLS[config.protocol]
    changed: dict[str, Any] = {}
    for name, value in protocol.fixed.items():
        given, default = _get(config, name), _default(name)
        if given not in (value, default):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}: found {given!r} with --protocol {config.protocol}, which fixes it to "
                f"{value!r}; omit {flag}, or use --protocol own"
            )
        changed |= _nested(config, changed, name, value)
    for name, value in protocol.defaults.items():
        if _get(config, name) == _default(name):
            changed[name] = value
    return replace(config, **changed)


def chooses_prompts(name: ProtocolName) -> bool:
    """Returns whether a protocol's prompts are a random choice, in an order that is not public."""
    return name in PROTOCOLS and PROTOCOLS[name].prompts_seed is not None


def protocol_items(config: EvaluationConfig, out: Path) -> list[Item]:
    """Returns the protocol's prompts, and writes them to prompts.json in the folder `out`.

    A second run reads that file; raises ValueError if it was made with other settings.
    """
    protocol = PROTOCOLS[config.protocol]
    assert config.captions is not None
    path = find_path(config.captions)
    if path is None or not path.is_file():
        raise ValueError(
            f"--captions: no file {config.captions!r} in the current directory or the project, "
            f"which --protocol {config.protocol} needs; see docs/evaluation.md for its origin"
        )
    record = {
        "protocol": config.protocol,
        "num_prompts": config.num_prompts,
        "seed": protocol.prompts_seed,
        "captions_sha256": hash_file(path),
    }
    listed = out / PROMPTS_FILE
    if listed.exists():
        return _read_prompts(listed, record)
    items = read_items(config.captions, config.num_prompts, seed=protocol.prompts_seed)
    if len(items) < config.num_prompts:
        raise ValueError(
            f"--captions: {path} has captions of {len(items)} images, but --protocol "
            f"{config.protocol} needs {config.num_prompts}: give the whole file"
        )
    _write_prompts(listed, record, items)
    return items


def _write_prompts(path: Path, record: Mapping[str, Any], items: Sequence[Item]) -> None:
    prompts = [{"key": item.key, "captions": list(item.captions)} for item in items]
    path.parent.mkdir(parents=True, exist_ok=True)
    # All processes write the same list, each under its own name, and on several machines.
    partial = path.with_name(f".{path.name}.{uuid4().hex}")
    partial.write_text(json.dumps({**record, "prompts": prompts}, indent=0) + "\n", "utf-8")
    partial.replace(path)


def _read_prompts(path: Path, record: Mapping[str, Any]) -> list[Item]:
    try:
        document = json.loads(path.read_text("utf-8"))
        rows = [(str(row["key"]), tuple(row["captions"])) for row in document["prompts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a list of prompts; delete it to make it again: {error!r:.100}"
        ) from error
    for name, expected in record.items():
        if document.get(name) != expected:
            raise ValueError(
                f"{path}: {name} is {document.get(name)!r}, expected {expected!r}: the results of "
                "another protocol or captions file are in this folder; give another --out"
            )
    return [
        Item(
            position=position, key=key, captions=captions,
            prompt=Prompt(text=captions[0]), group="captions",
        )
        for position, (key, captions) in enumerate(rows)
    ]  # fmt: skip


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _default(name: str) -> Any:
    first, _, rest = name.partition(".")
    default = next(field.default for field in fields(EvaluationConfig) if field.name == first)
    return _get(default, rest) if rest else default


def _nested(
    config: EvaluationConfig, changed: Mapping[str, Any], name: str, value: Any
) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    if not rest:
        return {first: value}
    return {first: replace(changed.get(first, getattr(config, first)), **{rest: value})}
