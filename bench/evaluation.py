"""Measures the memory of an evaluation's set metrics against the number of images.

    python bench/evaluation.py [--quick]

Streams random images of 32 px through all metrics of a distribution: FID, KID, Inception Score,
prdc, CMMD and MIND. A tiny network with Inception's 2048 features and 1008 classes takes the place
of the real ones, whose memory does not depend on the number of images and whose speed a CPU lacks
for 30,000. Each number of images has a process of its own, so its peak is its own. Prints a table,
then a line of JSON. The second peak includes the figures, which need copies of the kept rows; KID
uses 5 of its 100 subsets, which takes the same memory.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # started as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import platform
import resource
import subprocess
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.evaluation.config import EvaluationConfig
from latent_t2i.evaluation.feature_stats import KEEP, FeatureStats
from latent_t2i.evaluation.features import INCEPTION, Inception
from latent_t2i.evaluation.metrics import METRICS, kid, metric_class
from latent_t2i.evaluation.metrics.inception_score import NUM_CLASSES
from latent_t2i.evaluation.metrics.metric import Batch, Context, FeatureMetric, Item

NAMES = ("fid", "kid", "inception_score", "prdc", "cmmd", "mind")
NUM_SUBSETS = 5
SIDE_PX = 32
BATCH_SIZE = 100
CHUNK_PX = 4
FEATURES = EvaluationConfig(name="bench").weights.features


class TinyNetwork(Inception):
    """Random projections of a small version of the image."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.device, self.dim = name, "cpu", dim
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(3 * (SIDE_PX // CHUNK_PX) ** 2, dim, generator=generator)
        self._classes = torch.randn(dim, NUM_CLASSES, generator=generator) / dim

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255).float()
        small = torch.nn.functional.avg_pool2d(pixels, CHUNK_PX)
        return torch.relu(small.flatten(1) @ self._weight)

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        return (torch.from_numpy(self.features(batch)) @ self._classes).numpy()

    def identity(self) -> dict[str, str]:
        return {"network": "tiny"}


def main() -> None:
    """Measures each number of images in a process of its own."""
    args = parse()
    if args.num_images is not None:
        print(json.dumps(measure(args.num_images, args.dim)))
        return
    counts = (100, 300, 600) if args.quick else (3_000, 10_000, 20_000, 30_000)
    rows = [run_child(count, args.dim) for count in counts]
    print(f"{'images':>8} {'streaming, MB':>14} {'with figures, MB':>17} {'images/s':>9}")
    for row in rows:
        print(
            f"{row['num_images']:8,} {row['streaming_mb']:14,.0f} {row['with_figures_mb']:17,.0f} "
            f"{row['images_per_s']:9,.0f}"
        )
    versions = {name: version(name) for name in ("torch", "numpy")}
    setup = {"python": platform.python_version(), **versions, "dim": args.dim, "keep": KEEP}
    print(json.dumps({"benchmark": "evaluation", "setup": setup, "rows": rows}))


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Memory of an evaluation's set metrics.")
    parser.add_argument("--quick", action="store_true", help="under a minute, few images")
    parser.add_argument("--dim", type=int, help="number of features; default: 2048, quick: 64")
    parser.add_argument("--num-images", type=int, help="measure this number in this process")
    args = parser.parse_args()
    args.dim = args.dim or (64 if args.quick else 2048)
    return args


def run_child(num_images: int, dim: int) -> dict[str, Any]:
    """Returns what a new process measures."""
    command = [sys.executable, __file__, "--num-images", str(num_images), "--dim", str(dim)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(num_images: int, dim: int) -> dict[str, Any]:
    """Streams the images and computes the figures; returns peaks and speed."""
    kid.NUM_SUBSETS = NUM_SUBSETS
    context = make_context(dim)
    metrics = [metric_class(name)(context) for name in NAMES if name in METRICS]
    began = time.perf_counter()
    for batch in batches(num_images):
        for metric in metrics:
            metric.update(batch)
    counts = {m.stats.count for m in metrics if isinstance(m, FeatureMetric)}
    assert counts == {num_images}
    seconds, streaming_mb = time.perf_counter() - began, peak_mb()
    figures = {name: value for metric in metrics for name, value in metric.compute().items()}
    return {
        "num_images": num_images,
        "streaming_mb": streaming_mb,
        "with_figures_mb": peak_mb(),
        "images_per_s": num_images / seconds,
        "figures": figures,
    }


def make_context(dim: int) -> Context:
    """Returns a context with the tiny network under both names, and a reference of 1000 images."""
    config = EvaluationConfig(name="bench")
    networks = {name: TinyNetwork(name, dim) for name in (INCEPTION, FEATURES)}
    shared: dict[Any, Any] = {
        ("extractor", name, None, config.resize): network for name, network in networks.items()
    }
    references = {}
    for name, network in networks.items():
        references[name] = FeatureStats(dim)
        for batch in batches(1000, seed=1):
            references[name].update(batch, network)
    return Context(config=config, shared=shared, reference=references.__getitem__)


def batches(num_images: int, seed: int = 0) -> Any:
    """Yields random images, the same for the same seed."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_images, BATCH_SIZE):
        positions = range(start, min(start + BATCH_SIZE, num_images))
        shape = (len(positions), SIDE_PX, SIDE_PX, 3)
        items = [Item(position=position, key=str(position)) for position in positions]
        yield Batch(images=rng.integers(0, 256, shape, np.uint8), items=items)


def peak_mb() -> float:
    """Returns the largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
