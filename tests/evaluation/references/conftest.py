"""The packages that published figures come from; the tests of a missing one are skipped.

`.ci/references` makes an environment with all of them.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

MISSING_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Operators of torchvision's compiled part, which its wheel lacks beside another build of torch. No
metric uses them, but importing torchvision needs their names."""


def pytest_configure() -> None:
    """Makes torchvision importable before transformers looks for it."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # kept below
        for name, schema in MISSING_OPERATORS.items():
            library.define(name + schema)
        sys.modules["torchvision"] = importlib.import_module("torchvision")
        sys.modules["torchvision"].__dict__["_operators_of_tests"] = library


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of the FID Inception, as torch-fidelity and pytorch-fid read it."""
    inception = _import("pytorch_fid.inception")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = inception._inception_v3(
            num_classes=1008, aux_logits=False, weights=None, init_weights=False
        )
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # keeps the size of activations through the layers
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(network.fc.weight, std=1.0)  # classes that differ between images
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photos() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two sets of smooth random images (N, H, W, 3), the second darker and with noise."""
    return smooth_images(24, seed=0), darker(smooth_images(20, seed=1))


def smooth_images(num: int, *, seed: int, height: int = 80, width: int = 96) -> NDArray[np.uint8]:
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (num, 3, 6, 7)))
    fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return fine.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def darker(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    noise = np.random.default_rng(2).normal(0, 12, images.shape)
    return (images * 0.8 + noise).clip(0, 255).astype(np.uint8)


def _import(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name} is not installed: see .ci/references")
