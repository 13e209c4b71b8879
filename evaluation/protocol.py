"""What a figure depends on besides the model, as a readable record with a short id.

Two figures are comparable only if their records are equal: FID alone has four incompatible
resizers, and the number of images, the reference's split and the guidance convention differ between
papers without a word. `evaluation.compare` refuses records that differ, and names the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.feature_stats import read_header
from latent_t2i.evaluation.images import CROP, describe_files
from latent_t2i.model.paths import hash_file

if TYPE_CHECKING:
    from latent_t2i.evaluation.inputs import Inputs

ID_DIGITS = 12
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")
DRAWN_FORMAT = "PNG, 8 bits, rounded to nearest"
GUIDANCE = "uncond + scale * (cond - uncond); 1 turns guidance off"


def hash_texts(texts: Iterable[str]) -> str:
    """Returns the sha256 of texts in order."""
    total = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "big") + encoded)
    return total.hexdigest()


def record_of(
    config: EvaluationConfig,
    inputs: Inputs,
    *,
    num_images: int,
    drawn: Mapping[str, Any] | None,
    identities: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Returns the flat record of an evaluation.

    `drawn` describes how the images were made; None for a folder of finished images. `identities`
    are those of the metrics' networks.
    """
    prompts = [item.captions[0] for item in inputs.items if item.captions]
    captions = [json.dumps(item.captions) for item in inputs.items if item.captions]
    objects = [json.dumps(item.objects, sort_keys=True) for item in inputs.items]
    has_objects = any(item.objects for item in inputs.items)
    record: dict[str, Any] = {
        "protocol": config.protocol,
        "prompts_sha256": hash_texts(prompts) if prompts else "none",
        # Further captions of each image are references of caption similarity and consistency.
        "captions_sha256": hash_texts(captions) if captions else "none",
        "objects_sha256": hash_texts(objects) if has_objects else "none",
        "num_images": num_images,
        "image_size_px": f"{inputs.size[0]} x {inputs.size[1]}",
        "crop": "none" if inputs.fit is None else CROP,
        "file_format": DRAWN_FORMAT if inputs.images is None else describe_files(inputs.images),
        "resize": config.resize,
        "seed": config.seed,
        "num_seed_sets": config.num_seed_sets,
    }
    if inputs.captions_by is not None:
        record["captions_paired_by"] = inputs.captions_by
    if drawn is not None:
        record["num_diverse_prompts"] = config.num_diverse_prompts
    record |= {f"drawn/{name}": value for name, value in (drawn or {}).items()}
    record |= {f"reference/{name}": value for name, value in _reference(inputs).items()}
    for metric, identity in identities.items():
        record |= {f"metrics/{metric}/{name}": value for name, value in identity.items()}
    record |= {f"versions/{name}": _version(name) for name in PACKAGES}
    return record


def _reference(inputs: Inputs) -> dict[str, Any]:
    if inputs.reals is not None:
        return inputs.reals.record()
    if inputs.statistics is None:
        return {"name": "none"}
    path = inputs.statistics
    identity = read_header(path).identity
    names = {"count": "images_count", "crop": "images_size", "resize": "resize"}
    known = {field: identity.get(name, "not stated") for field, name in names.items()}
    return {"name": path.name, "sha256": hash_file(path)} | known


def protocol_id(record: Mapping[str, Any]) -> str:
    """Returns the first digits of the record's sha256."""
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
