"""Finds COCO's objects in images with a detector of transformers.

Closed detectors (RT-DETR, DETR and others of AutoModelForObjectDetection) use their own labels, of
which those that mean a category of COCO count. Zero-shot detectors (Grounding DINO, OWL-ViT, OWLv2)
get the names of COCO's categories as queries. Scores of different detectors are not comparable, so
the caller sets the threshold. Images are resized by the PIL versions of the image processors,
whether or not torchvision is installed, because the two differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from latent_t2i.evaluation.networks import (
    find_network,
    load_image_processor,
    load_tokenizer,
)
from latent_t2i.evaluation.objects import CATEGORIES, category_of
from latent_t2i.model.encoders import fingerprint, load_network, quiet
from latent_t2i.model.folders import loading

FLAG = "--weights.detector"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer*", "vocab*",
         "merges.txt", "special_tokens_map.json")  # fmt: skip
MIN_SCORE = 0.05
"""Detections below are dropped at once; no useful threshold is lower."""
MAX_OBJECTS = 100
"""Most detections that are kept per image, by score, as in COCO's own evaluation."""
OVERLAP = 0.6
"""Two boxes of one category with a larger intersection over union are one object."""
OWL, GROUNDING_DINO = ("owlvit", "owlv2"), ("grounding-dino", "mm-grounding-dino")
"""Supported model types of zero-shot detectors."""
OWL_TOKENS = 16
"""Tokens of a query of OWL-ViT."""
QUERY = "a photo of a {}"
"""The text of OWL-ViT's queries."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """The objects of an image, best first."""

    labels: NDArray[np.int16]  # (N,)
    """Numbers of CATEGORIES."""
    scores: NDArray[np.float32]  # (N,)
    boxes: NDArray[np.float32]  # (N, 4)
    """x, y, width, height, as shares of the image's sides."""

    def of(self, category: str, threshold: float) -> NDArray[np.float32]:
        """Returns the boxes (M, 4) of a category with at least this score."""
        chosen = (self.labels == CATEGORIES.index(category)) & (self.scores >= threshold)
        return self.boxes[chosen]

    def best(self) -> dict[str, float]:
        """Returns the highest score of each category that was found."""
        found: dict[str, float] = {}
        for label, score in zip(self.labels.tolist(), self.scores.tolist(), strict=True):
            found.setdefault(CATEGORIES[label], score)
        return found


class Detector(Protocol):
    """What semantic consistency needs of a detector."""

    @property
    def categories(self) -> frozenset[str]:
        """The categories of COCO that it can find."""

    def identity(self) -> dict[str, str]:
        """Returns its name and the sha256 of its weights."""

    def __call__(self, images: NDArray[np.uint8]) -> list[Detections]:
        """Returns the objects of each image of (B, H, W, 3)."""


def make_detections(labels: ArrayLike, scores: ArrayLike, boxes: ArrayLike) -> Detections:
    """Returns detections sorted by score, once per object.

    `labels` are numbers of CATEGORIES, or -1 for anything else; `boxes` are (x, y, width, height),
    as shares of the image's sides.
    """
    label, score = np.asarray(labels, np.int16), np.asarray(scores, np.float32)
    box = np.asarray(boxes, np.float32).reshape(-1, 4)
    chosen = np.flatnonzero((label >= 0) & (score >= MIN_SCORE))
    chosen = chosen[np.argsort(-score[chosen], kind="stable")][:MAX_OBJECTS]
    kept: list[int] = []
    for index in chosen.tolist():
        same = [other for other in kept if label[other] == label[index]]
        if not same or _overlaps(box[index], box[same]).max() <= OVERLAP:
            kept.append(index)
    return Detections(labels=label[kept], scores=score[kept], boxes=box[kept])


def _overlaps(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the intersection over union of a box (4,) with others (N, 4).  # (N,)"""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    union = box[2:].prod() + others[:, 2:].prod(1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def load_detector(name: str, device: str = "cpu") -> "TransformersDetector":
    """Loads a detector from a folder or Hub repository.

    Raises MissingWeights if it is unavailable, ValueError if it is no detector or broken, and
    ModuleNotFoundError if its backbone needs a package that is not installed.
    """
    folder = find_network(name, FILES, flag=FLAG)
    with quiet(), loading(folder, flag=FLAG):
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    is_closed = kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    if not is_closed and kind not in (*OWL, *GROUNDING_DINO):
        raise ValueError(
            f"{FLAG}: {folder} is a {kind!r} model; expected an object detector of transformers, "
            f"such as rt_detr, detr, {', '.join((*GROUNDING_DINO, *OWL))}"
        )
    loader = AutoModelForObjectDetection if is_closed else AutoModelForZeroShotObjectDetection
    try:
        network = load_network(loader, folder, "an object detector", flag=FLAG).to(device)
    except ImportError as error:  # DETR's usual backbone is timm's
        reason = " ".join(str(error).split())
        raise ModuleNotFoundError(
            f"{FLAG}: {folder} needs a package that is not installed: {reason}; "
            "pip install 'latent-t2i[metrics]'"
        ) from error
    processor = load_image_processor(folder, flag=FLAG)
    tokenizer = None if is_closed else load_tokenizer(AutoTokenizer, folder, flag=FLAG)
    return TransformersDetector(name, folder, network, processor, tokenizer)


class TransformersDetector:
    """A detector of transformers with its image processor and, for zero-shot ones, its queries."""

    def __init__(
        self, name: str, folder: Path, network: Any, processor: Any, tokenizer: Any
    ) -> None:
        self.name = name
        self._network = network
        self._processor = processor
        self._inputs: Mapping[str, Tensor] = {}
        self._spans: Sequence[slice] = ()
        if tokenizer is None:
            self._labels = _closed_labels(network.config.id2label, folder)
        else:
            self._labels = np.arange(len(CATEGORIES))
            if network.config.model_type in OWL:
                self._inputs = _owl_queries(tokenizer)
            else:
                self._inputs, self._spans = _phrase_queries(tokenizer, folder, network.config)
        self.categories = frozenset(CATEGORIES[label] for label in self._labels if label >= 0)
        self._sha256 = fingerprint(network)

    def identity(self) -> dict[str, str]:
        """Returns the name and the sha256 of the weights."""
        return {"detector": self.name, "detector_sha256": self._sha256, "detector_resize": "pil"}

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> list[Detections]:
        """Returns the objects of each image of (B, H, W, 3)."""
        height, width = images.shape[1:3]
        inputs = self._processor(images=list(images), return_tensors="pt")
        queries = {
            name: tensor.repeat(len(images), 1) for name, tensor in self._inputs.items()
        }  # OWL-ViT takes (B * Q, T)
        device = self._network.device
        outputs = self._network(**{k: v.to(device) for k, v in (inputs | queries).items()})
        if self._spans:
            outputs.logits = _logits_of_spans(outputs.logits, self._spans)
        found = self._processor.post_process_object_detection(
            outputs, threshold=MIN_SCORE, target_sizes=torch.tensor([[height, width]] * len(images))
        )
        return [self._read(one, width, height) for one in found]

    def _read(self, found: Mapping[str, Tensor], width: int, height: int) -> Detections:
        corners = found["boxes"].float().cpu().numpy() / np.array([width, height] * 2, np.float32)
        low, high = np.clip(corners[:, :2], 0, 1), np.clip(corners[:, 2:], 0, 1)
        return make_detections(
            self._labels[found["labels"].cpu().numpy()],
            found["scores"].float().cpu().numpy(),
            np.concatenate([low, high - low], axis=1),
        )


def _closed_labels(id2label: Mapping[int, str], folder: Path) -> NDArray[np.int64]:
    """Returns the number of the category in CATEGORIES for each label, or -1."""
    labels = np.full(max(id2label) + 1, -1)
    for number, label in id2label.items():
        category = category_of(label)
        if category is not None:
            labels[number] = CATEGORIES.index(category)
    if (labels < 0).all():
        found = ", ".join(list(id2label.values())[:3])
        raise ValueError(
            f"{FLAG}: {folder} has labels such as {found}; expected some of COCO's categories, "
            "such as person, dog or chair"
        )
    return labels


def _owl_queries(tokenizer: Any) -> dict[str, Tensor]:
    """Returns the tokens (Q, T) of a query per category."""
    texts = [QUERY.format(category) for category in CATEGORIES]
    # The model's own processor pads to 16 tokens; its text tower accepts no more.
    encoded = tokenizer(
        texts, padding="max_length", truncation=True, max_length=OWL_TOKENS, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _phrase_queries(
    tokenizer: Any, folder: Path, config: Any
) -> tuple[dict[str, Tensor], list[slice]]:
    """Returns the text "person. bicycle. ..." as tokens (1, T), and each category's part of it."""
    ids, spans = [tokenizer.cls_token_id], []
    stop = tokenizer.convert_tokens_to_ids(".")
    for category in CATEGORIES:
        own = tokenizer(category, add_special_tokens=False)["input_ids"]
        spans.append(slice(len(ids), len(ids) + len(own)))
        ids += [*own, stop]
    ids.append(tokenizer.sep_token_id)
    if len(ids) > config.max_text_len:
        raise ValueError(
            f"{FLAG}: {folder}: COCO's categories have {len(ids)} tokens, but max_text_len is "
            f"{config.max_text_len}; expected a tokenizer of words, such as BERT's"
        )
    tokens = torch.tensor([ids])
    zeros = torch.zeros_like(tokens)
    return {"input_ids": tokens, "token_type_ids": zeros, "attention_mask": zeros + 1}, spans


def _logits_of_spans(logits: Tensor, spans: Sequence[slice]) -> Tensor:
    """Returns a logit per category, that of its best token, of logits (B, Q, T).  # (B, Q, C)"""
    return torch.stack([logits[..., span].amax(-1) for span in spans], dim=-1)
