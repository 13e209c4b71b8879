"""How images reach Inception: the three resize modes that published FID figures use.

The modes give different figures for the same images, so the mode is part of every result. Other
feature networks resize with their own image processors.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latent_t2i.evaluation.config import ResizeMode

INCEPTION_SIZE_PX = 299


def prepare(images: NDArray[np.uint8], mode: ResizeMode) -> Tensor:
    """Resizes images (B, H, W, 3) to 299 px and scales them for Inception.

    Returns (B, 3, 299, 299) float32, about -1 to 1. pytorch-fid scales around 127.5, TensorFlow and
    its other ports around 128.
    """
    if mode == "pytorch":
        return half_pixel(images, INCEPTION_SIZE_PX) / 127.5 - 1
    resized = legacy if mode == "legacy" else clean
    return (resized(images, INCEPTION_SIZE_PX) - 128) / 128


def legacy(images: NDArray[np.uint8], size_px: int) -> Tensor:
    """TensorFlow 1's bilinear resize, as in torch-fidelity: no antialiasing, corners at pixel 0.

    Returns (B, 3, size_px, size_px) float32 from 0 to 255, as the other two do.
    """
    return _lerp(_lerp(_to_tensor(images), 3, size_px), 2, size_px)


def half_pixel(images: NDArray[np.uint8], size_px: int) -> Tensor:
    """PyTorch's bilinear resize without antialiasing, as in pytorch-fid."""
    size = (size_px, size_px)
    return F.interpolate(_to_tensor(images), size=size, mode="bilinear", align_corners=False)


def clean(images: NDArray[np.uint8], size_px: int) -> Tensor:
    """PIL's antialiased bicubic resize of each channel in float32, as in clean-fid (2104.11222)."""
    resized = [
        [_clean_channel(image[:, :, channel], size_px) for channel in range(3)] for image in images
    ]
    return torch.from_numpy(np.array(resized, np.float32))


def _to_tensor(images: NDArray[np.uint8]) -> Tensor:  # (B, 3, H, W)
    # A copy: images may be read-only, of which torch warns.
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def _lerp(pixels: Tensor, dim: int, size_px: int) -> Tensor:
    """Interpolates linearly along a dimension; output i lies at i * input / output."""
    side = pixels.shape[dim]
    # torch-fidelity's float32 positions, so that the result is equal to the bit.
    at = torch.arange(size_px, dtype=torch.float32) * torch.tensor(side / size_px)
    low = at.long()
    high = (low + 1).clamp_max(side - 1)
    weight = (at - low).reshape([-1 if d == dim else 1 for d in range(4)])
    first = pixels.index_select(dim, low)
    return first + (pixels.index_select(dim, high) - first) * weight


def _clean_channel(channel: NDArray[np.uint8], size_px: int) -> NDArray[np.float32]:
    picture = Image.fromarray(channel.astype(np.float32))
    return np.asarray(picture.resize((size_px, size_px), Image.Resampling.BICUBIC)).clip(0, 255)
