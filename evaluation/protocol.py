"""What a figure depends on besides the model, as a readable record with a short id.

Two figures are comparable only if their records are equal: FID alone has four incompatible
resizers, and the number of images, the reference's split and the guidance convention differ between
papers without a word. `evaluation.compare` refuses records that differ, and names the fields.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.metrics.metric import Item

ID_DIGITS = 12
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")
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
    *,
    items: Iterable[Item],
    num_images: int,
    image_size: tuple[int, int],
    drawn: Mapping[str, Any] | None,
    reference: Mapping[str, Any],
    identities: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Returns the flat record of an evaluation.

    `drawn` describes how the images were made; None for a folder of finished images. `identities`
    are those of the metrics' networks.
    """
    texts = [item.captions[0] for item in items if item.captions]
    record: dict[str, Any] = {
        "protocol": config.protocol,
        "prompts_sha256": hash_texts(texts) if texts else "none",
        "num_images": num_images,
        "image_size_px": f"{image_size[0]} x {image_size[1]}",
        "file_format": "PNG, 8 bits, rounded to nearest" if drawn else "files as given",
        "resize": config.resize,
    }
    record |= {f"drawn/{name}": value for name, value in (drawn or {}).items()}
    record |= {f"reference/{name}": value for name, value in reference.items()}
    for metric, identity in identities.items():
        record |= {f"metrics/{metric}/{name}": value for name, value in identity.items()}
    record |= {f"versions/{name}": _version(name) for name in PACKAGES}
    return record


def protocol_id(record: Mapping[str, Any]) -> str:
    """Returns the first digits of the record's sha256."""
    text = json.dumps(dict(record), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
