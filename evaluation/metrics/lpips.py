"""LPIPS: the distance of two images as people see it (Zhang et al. 2018, 1801.03924).

It has two uses. In the row `reconstruction`, `lpips` is the VAE's error: the distance of each
reference image from its reconstruction. Among the samples, `lpips_diversity` is the mean distance
between images of one prompt, over the items of the group `diverse`: 0 means that the prompt always
gives the same image. The network is torchmetrics' with torchvision's VGG16 or AlexNet; the weights
decide which. Main trade-off: VGG16 is the training loss of most VAEs, which it therefore favours.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.evaluation.clip_model import first_caption
from latent_t2i.evaluation.metrics.metric import Batch, Context, ImageMetric, MissingWeights, merge
from latent_t2i.evaluation.processes import Group
from latent_t2i.model.paths import find_path

FLAG = "--weights.lpips"
DEFAULT = "vgg16-397923af.pth"
URL = f"https://download.pytorch.org/models/{DEFAULT}"
DIVERSE = "diverse"
"""The group of several images per prompt."""
NUM_AT_ONCE = 16
LAST_LAYERS = {"vgg": "features.28.weight", "alex": "features.10.weight"}


class Distance:
    """LPIPS with given weights of its backbone."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Loads torchvision's weights; raises ValueError if they are of another network."""
        weights = _read_weights(path)
        self.net = _find_net(weights, path)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._device = device
        self._network = make_network(self.net, weights).to(device)

    @torch.inference_mode()
    def measure(self, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Returns the distances (B,) of images (B, H, W, 3) from others of the same size."""
        starts = range(0, len(one), NUM_AT_ONCE)
        parts = [(one[i : i + NUM_AT_ONCE], other[i : i + NUM_AT_ONCE]) for i in starts]
        found = [self._network(self._scale(a), self._scale(b)).flatten() for a, b in parts]
        return torch.cat(found).cpu().double().numpy() if found else np.zeros(0)

    def _scale(self, images: NDArray[np.uint8]) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)

    def identity(self) -> dict[str, str]:
        return {"net": self.net, "weights": self.sha256}


class Lpips(ImageMetric):
    """The VAE's error, and the diversity of images of one prompt."""

    name = "lpips"
    rows = ("samples", "reconstruction")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._distance = load_distance(context)
        self._diverse: dict[int, tuple[str, NDArray[np.uint8]]] = {}
        """The few images of the group `diverse`, with their prompts, by position."""

    def score(self, batch: Batch) -> Sequence[Mapping[str, float]]:
        if batch.originals is not None:
            found = self._distance.measure(batch.images, batch.originals)
            return [{"lpips": float(value)} for value in found]
        for item, image in zip(batch.items, batch.images, strict=True):
            if item.group == DIVERSE:
                self._diverse[item.position] = first_caption(item), image
        return [{} for _ in batch.items]  # the other images of a prompt may be in another batch

    def gather(self, group: Group) -> None:
        super().gather(group)
        by_prompt: dict[str, dict[int, NDArray[np.uint8]]] = {}
        for position, (prompt, image) in merge(group, self._diverse).items():
            by_prompt.setdefault(prompt, {})[position] = image
        for images in by_prompt.values():
            if len(images) > 1:
                # One value per prompt: the distances of one prompt depend on each other.
                self.values[min(images)] = {"lpips_diversity": self._diversity([*images.values()])}

    def _diversity(self, images: Sequence[NDArray[np.uint8]]) -> float:
        pairs = list(combinations(range(len(images)), 2))
        stacked = np.stack(images)
        one, other = (stacked[[pair[side] for pair in pairs]] for side in (0, 1))
        return float(self._distance.measure(one, other).mean())

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
    """Returns torchmetrics' LPIPS `net` with the weights of torchvision's network."""
    _require_torchvision()
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    network = _NoTrainLpips(net=net, pnet_rand=True)  # type: ignore[arg-type]
    # Its backbone holds torchvision's layers under their numbers, in slices.
    own = network.net.state_dict()
    backbone = {key: weights[f"features.{key.partition('.')[2]}"] for key in own}
    network.net.load_state_dict(backbone)
    return network.requires_grad_(False)


def _require_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{FLAG}: {path} is not a file of PyTorch weights: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{FLAG}: {path}: expected weights by name, found a {type(found).__name__}"
        )
    return found


def _find_net(weights: Mapping[str, torch.Tensor], path: Path) -> str:
    for net, layer in LAST_LAYERS.items():
        if layer in weights and weights[layer].ndim == 4:
            return net
    shown = ", ".join(list(map(str, weights))[:3])
    raise ValueError(
        f"{FLAG}: {path}: expected the weights of torchvision's VGG16 or AlexNet, found {shown}"
    )
