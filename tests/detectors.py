"""Tiny detectors of random weights, and a detector made of a function, for tests.

from tests import detectors
detectors.folder("rt_detr")                     # a folder for --weights.detector
detectors.Fixed({position: [("dog", 0.9, (0, 0, 0.5, 0.5))]})
"""

import atexit
import functools
import shutil
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    SwinConfig,
)

from latent_t2i.evaluation.detector import Detections, make_detections
from latent_t2i.evaluation.objects import CATEGORIES, Box
from latent_t2i.model.encoders import quiet

Found = Sequence[tuple[str, float, Box]]
"""Category, score and box (x, y, width, height, as shares)."""
SIDE_PX = 64
LABELS = {0: "N/A", 1: "person", 2: "tvmonitor", 3: "street sign", 4: "dog"}
"""Labels as detectors have them: with gaps, and in another spelling."""


class Fixed:
    """Detects what a list says, for each image by the value of its first pixel."""

    def __init__(self, found: Sequence[Found], categories: Sequence[str] = CATEGORIES) -> None:
        self.found = found
        self.categories = frozenset(categories)
        self.num_calls = 0

    def identity(self) -> dict[str, str]:
        return {"detector": "fixed"}

    def __call__(self, images: NDArray[np.uint8]) -> list[Detections]:
        self.num_calls += 1
        return [detections_of(self.found[image[0, 0, 0]]) for image in images]


def detections_of(found: Found) -> Detections:
    """Returns detections as the metric reads them."""
    return make_detections(
        [CATEGORIES.index(category) for category, _, _ in found],
        [score for _, score, _ in found],
        [box for _, _, box in found],
    )


@functools.cache
def folder(kind: str) -> Path:
    """Returns the folder of a detector of this test process; the first call makes it."""
    path = _root() / kind
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        KINDS[kind](path)
    return path


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny-detectors-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def _make_rt_detr(path: Path) -> None:
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8],
        encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16,
        num_queries=10, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_layers=1,
        decoder_attention_heads=2, num_denoising=0, id2label=LABELS,
    )  # fmt: skip
    RTDetrForObjectDetection(config).save_pretrained(path)
    RTDetrImageProcessorPil(size=_square()).save_pretrained(path)


def _make_detr(path: Path) -> None:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=16, num_queries=10,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, id2label=LABELS,
    )  # fmt: skip
    DetrForObjectDetection(config).save_pretrained(path)
    DetrImageProcessorPil(
        size={"shortest_edge": SIDE_PX, "longest_edge": 2 * SIDE_PX}
    ).save_pretrained(path)


_TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def _make_owl(path: Path, config: Any, network: Any, processor: Any) -> None:
    characters = string.ascii_lowercase
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16).save_pretrained(path)
    text = _TOWER | {"vocab_size": len(vocab), "max_position_embeddings": 16,
                     "pad_token_id": 0, "bos_token_id": 52, "eos_token_id": 53}  # fmt: skip
    vision = _TOWER | {"image_size": SIDE_PX, "patch_size": 16}
    network(config(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    processor(size=_square()).save_pretrained(path)


def _make_grounding_dino(path: Path) -> None:
    vocab = [f"[unused{number}]" for number in range(1100)]
    # Grounding DINO's code has the numbers of BERT's special tokens.
    for number, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: "."}.items():
        vocab[number] = word
    letters = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    words = sorted({word for category in CATEGORIES for word in category.split()})
    vocab[200 : 200 + len(letters) + len(words)] = [*letters, *words]
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    backbone = SwinConfig(
        image_size=SIDE_PX, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1],
        window_size=2, out_indices=[2, 3, 4],
    )  # fmt: skip
    text = BertConfig(vocab_size=len(vocab), max_position_embeddings=512, **_TOWER)
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, num_queries=10, encoder_layers=1,
        encoder_ffn_dim=16, encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=16,
        decoder_attention_heads=2, d_model=32, num_feature_levels=4, encoder_n_points=2,
        decoder_n_points=2,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(path)
    GroundingDinoImageProcessorPil(
        size={"shortest_edge": SIDE_PX, "longest_edge": 2 * SIDE_PX}
    ).save_pretrained(path)


def _square() -> dict[str, int]:
    return {"height": SIDE_PX, "width": SIDE_PX}


KINDS: Mapping[str, Callable[[Path], None]] = {
    "rt_detr": _make_rt_detr,
    "detr": _make_detr,
    "owlvit": lambda p: _make_owl(
        p, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil
    ),
    "owlv2": lambda p: _make_owl(p, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
    "grounding_dino": _make_grounding_dino,
}
