"""LPIPS: the distance of two images as people see it (Zhang et al. 2018, 1801.03924).

It has two uses. In the row `reconstruction` it is the VAE's error: the distance of each reference
image from its reconstruction. In the row `diverse` it is the mean distance between images of one
prompt: near 0, the prompt always gives the same image. The network is torchmetrics' with
torchvision's VGG16 or AlexNet; the weights' file decides which. Main trade-off: VGG16's distance is
part of most VAEs' training loss and therefore flatters them.
"""

import importlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.evaluation.metrics.metric import (
    Batch,
    Context,
    ImageMetric,
    MissingWeights,
    Need,
    RowName,
)
from latent_t2i.model.paths import find_path, hash_file

FLAG = "--weights.lpips"
DEFAULT = "vgg16-397923af.pth"
URL = f"https://download.pytorch.org/models/{DEFAULT}"
NUM_AT_ONCE = 16
LAYERS = {
    "vgg": {
        0: (64, 3, 3), 2: (64, 64, 3), 5: (128, 64, 3), 7: (128, 128, 3), 10: (256, 128, 3),
        12: (256, 256, 3), 14: (256, 256, 3), 17: (512, 256, 3), 19: (512, 512, 3),
        21: (512, 512, 3), 24: (512, 512, 3), 26: (512, 512, 3), 28: (512, 512, 3),
    },
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3),
             10: (256, 256, 3)},
}  # fmt: skip
"""Output channels, input channels and kernel size of torchvision's convolutions, by number."""


class Distance:
    """LPIPS with given weights of its backbone."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Loads torchvision's weights; raises ValueError if they are of another network."""
        weights = _read_weights(path)
        self.net = find_net(weights, path)
        self._sha256 = hash_file(path)
        self._device = device
        self._network = make_network(self.net, weights).to(device)

    @torch.inference_mode()
    def measure(
        self, one: NDArray[np.uint8], other: NDArray[np.uint8]
    ) -> NDArray[np.float64]:  # (B,)
        """Returns the distances of images (B, H, W, 3) from others of the same size."""
        starts = range(0, len(one), NUM_AT_ONCE)
        parts = [(one[i : i + NUM_AT_ONCE], other[i : i + NUM_AT_ONCE]) for i in starts]
        found = [self._network(self._scale(a), self._scale(b)).flatten() for a, b in parts]
        return torch.cat(found).cpu().double().numpy()

    def _scale(self, images: NDArray[np.uint8]) -> torch.Tensor:
        pixels = torch.tensor(images, device=self._device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)

    def identity(self) -> dict[str, str]:
        """Returns what the distances depend on."""
        return {"net": self.net, "weights": self._sha256}


class Lpips(ImageMetric):
    """The VAE's error for each image, and the diversity of the images of each prompt."""

    name = "lpips"
    needs: ClassVar[frozenset[Need]] = frozenset({"bundle"})
    rows: ClassVar[tuple[RowName, ...]] = ("reconstruction", "diverse")
    without_ceiling: ClassVar[Mapping[str, str]] = {
        "lpips/diverse": "there are no several real images of one prompt; equal images have 0"
    }
    in_sweeps = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._distance = load_distance(context)

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        if self.context.row == "diverse":
            return self._score_prompt(batch)
        assert batch.originals is not None, self.context.row
        found = self._distance.measure(batch.images, batch.originals)
        return [{self.name: float(value)} for value in found]

    def _score_prompt(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        """Returns the mean distance of all pairs as the value of a prompt's first image."""
        assert len({item.captions[:1] for item in batch.items}) == 1, "the images of one prompt"
        nothing: dict[str, float] = {}
        if len(batch.items) == 1:
            return [nothing]
        pairs = np.array(list(combinations(range(len(batch.items)), 2)))  # (P, 2)
        one, other = batch.images[pairs[:, 0]], batch.images[pairs[:, 1]]
        mean = float(self._distance.measure(one, other).mean())
        # One value per prompt, because the distances of its images depend on each other.
        return [{self.name: mean}, *[nothing] * (len(batch.items) - 1)]

    def identity(self) -> dict[str, str]:
        return self._distance.identity()


def load_distance(context: Context) -> Distance:
    """Returns LPIPS with the weights of the settings, shared by all rows.

    Raises MissingWeights if they or torchvision are unavailable.
    """
    name = context.config.weights.lpips
    path = Path(torch.hub.get_dir()) / "checkpoints" / DEFAULT if name is None else find_path(name)
    if path is None or not path.is_file():
        raise MissingWeights(
            f"{FLAG}: no file {str(name or path)!r}; expected the weights of torchvision's VGG16 "
            f"or AlexNet: download {URL} and give its path, or put it there"
        )
    return context.load(("lpips", path), lambda: Distance(path, context.device))


def make_network(net: str, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Returns torchmetrics' LPIPS on `net`, vgg or alex, with the weights of torchvision's."""
    _require_torchvision()
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    # The public class would download the backbone's weights.
    network = _NoTrainLpips(net=net, pnet_rand=True)  # type: ignore[arg-type]
    # Its slices keep the numbers of torchvision's layers: slice1.0.weight is features.0.weight.
    names = network.net.state_dict()
    layers = {name: weights[f"features.{name.partition('.')[2]}"] for name in names}
    network.net.load_state_dict(layers)
    return network.requires_grad_(False)


def _require_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MissingWeights(
            f"--metrics lpips: torchvision does not import: {reason}; install the build that "
            "matches torch: pip install 'latent-t2i[metrics]'"
        ) from error


def _read_weights(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{FLAG}: {path} is not a file of PyTorch weights: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{FLAG}: {path}: expected weights by name, found a {type(found).__name__}"
        )
    return found


def find_net(weights: Mapping[str, torch.Tensor], path: Path) -> str:
    """Returns whose weights these are, vgg or alex; raises ValueError if they are of another."""
    shapes = {net: shapes_of(net) for net in LAYERS}
    missing = {
        net: [name for name in found if name not in weights] for net, found in shapes.items()
    }
    net = min(missing, key=lambda net: len(missing[net]))
    if missing[net]:
        shown = ", ".join(list(map(str, weights))[:3]) or "nothing"
        raise ValueError(
            f"{FLAG}: {path}: expected the weights of torchvision's VGG16 or AlexNet, found "
            f"{shown} and so on, without {missing[net][0]}"
        )
    for name, expected in shapes[net].items():
        found = getattr(weights[name], "shape", type(weights[name]).__name__)
        if found != expected:
            size = tuple(found) if isinstance(found, torch.Size) else found
            raise ValueError(
                f"{FLAG}: {path}: expected the weights of torchvision's VGG16 or AlexNet, with "
                f"{name} of the shape {expected}, found {size}"
            )
    return net


def shapes_of(net: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights of torchvision's convolutions, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for number, (num_out, num_in, side) in LAYERS[net].items():
        found[f"features.{number}.weight"] = num_out, num_in, side, side
        found[f"features.{number}.bias"] = (num_out,)
    return found
