"""Small feature networks for tests of metrics, in the place of Inception and CLIP.

context = make_context(RandomNetwork())
feed(Fid(context), images)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.feature_stats import FeatureStats
from latent_t2i.evaluation.features import Extractor
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, Metric

Images = NDArray[np.uint8]


class RandomNetwork(Extractor):
    """Two random convolutions and the mean and deviation of their channels."""

    def __init__(self, name: str = "inception", channels: int = 8) -> None:
        super().__init__(name, "cpu")
        self.dim = 2 * channels
        self.num_calls = 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._body = nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, channels, 3), nn.ReLU()
            )

    def _forward(self, images: Images) -> Tensor:
        self.num_calls += 1
        found = self._body(torch.from_numpy(images.transpose(0, 3, 1, 2) / 255).float())
        return torch.cat([found.mean((2, 3)), found.std((2, 3))], 1)

    def identity(self) -> dict[str, str]:
        return {"network": "random", "weights_sha256": "0" * 64, "resize": "none", "torch": "x"}


def make_context(
    network: Extractor,
    reference: Callable[[str], FeatureStats] | None = None,
    **settings: Any,
) -> Context:
    """Returns a context in which every metric of `network.name` uses `network`."""
    config = EvaluationConfig(name="tests", **settings)
    key = ("extractor", network.name, config.weights.inception, config.resize)
    return Context(config=config, reference=reference, shared={key: network})


def feed(metric: Metric, images: Images, batch_size: int = 16) -> None:
    for batch in make_batches(images, batch_size):
        metric.update(batch)


def make_batches(images: Images, batch_size: int = 16) -> list[Batch]:
    return [
        Batch(
            images=images[start : start + batch_size],
            items=[
                Item(position=n, key=f"{n}.png")
                for n in range(start, min(start + batch_size, len(images)))
            ],
        )
        for start in range(0, len(images), batch_size)
    ]


def smooth_images(num: int, *, seed: int, side: int = 32) -> Images:
    """Returns images (N, side, side, 3) of smooth random colours with a fine texture."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (num, 3, 5, 5)))
    fine = nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    texture = rng.normal(0, 15, (num, 1, side, side))
    return (fine.numpy() + texture).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
