"""LPIPS' rows with a simple distance in the network's place, and its weights' errors.

The distances themselves are compared with torchmetrics and lpips in tests/evaluation/references.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.metrics import lpips
from latent_t2i.evaluation.metrics.lpips import Lpips, load_distance
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, MissingWeights, RowName
from tests.judging import judge, judge_by_two, split


class MeanDifference:
    """The mean absolute difference of two images."""

    def measure(
        self, one: NDArray[np.uint8], other: NDArray[np.uint8]
    ) -> NDArray[np.float64]:  # (B,)
        return np.abs(one.astype(float) - other).mean((1, 2, 3))

    def identity(self) -> dict[str, str]:
        return {"net": "mean difference"}


def context(row: RowName, weights: Path) -> Context:
    config = EvaluationConfig(name="x", weights=WeightsConfig(lpips=str(weights)))
    return Context(config=config, row=row, shared={("lpips", weights): MeanDifference()})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "vgg16.pth"
    path.touch()
    return path


def flat(*levels: int) -> NDArray[np.uint8]:
    return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])


def items(num: int, first: int = 0, prompt: str = "a dog") -> list[Item]:
    return [Item(position=first + n, key=f"{n}.png", captions=(prompt,)) for n in range(num)]


def test_reconstructions_are_compared_with_their_originals(weights: Path) -> None:
    batch = Batch(images=flat(1, 12, 23), items=items(3), originals=flat(0, 10, 20))
    metric = judge(Lpips(context("reconstruction", weights)), batch)
    assert metric.values == {0: {"lpips": 1.0}, 1: {"lpips": 2.0}, 2: {"lpips": 3.0}}
    assert metric.compute() == {"lpips": 2.0}
    assert metric.identity() == {"net": "mean difference"}


def test_diversity_is_the_mean_distance_of_all_pairs_of_each_prompt(weights: Path) -> None:
    one = Batch(images=flat(0, 10, 30), items=items(3))
    other = Batch(images=flat(7, 7, 7), items=items(3, 3, "a cat"))
    metric = judge(Lpips(context("diverse", weights)), one, other)
    assert metric.values[0] == {"lpips": pytest.approx((10 + 30 + 20) / 3)}
    assert metric.values[3] == {"lpips": 0.0}, "equal images"
    assert metric.compute() == {"lpips": pytest.approx(10.0)}, "the mean over prompts"
    shared = judge_by_two(lambda: Lpips(context("diverse", weights)), [one, other])
    assert shared.values == metric.values
    (single, *_) = split(one, 1)
    assert judge(Lpips(context("diverse", weights)), single).compute() == {}


def load(path: object) -> None:
    load_distance(Context(config=EvaluationConfig(name="x", weights=WeightsConfig(lpips=path))))


def test_missing_weights_are_named_with_their_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingWeights, match=r"no file 'gone\.pth'; .* https://download\.pytorch"):
        load("gone.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(MissingWeights, match=f"no file '{path}'.*put it there"):
        load(None)


VGG19 = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
"""The numbers of torchvision's convolutions."""


def make_weights(net: str = "vgg") -> dict[str, torch.Tensor]:
    """Returns weights with the names and shapes of torchvision's, without memory of their own."""
    return {name: torch.zeros(1).expand(shape) for name, shape in lpips.shapes_of(net).items()}


def test_the_network_is_found_by_its_weights(tmp_path: Path) -> None:
    assert [lpips.find_net(make_weights(net), tmp_path) for net in ("vgg", "alex")] == [
        "vgg",
        "alex",
    ]


def test_weights_of_a_similar_network_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    vgg19 = {f"features.{n}.{k}": torch.zeros(1) for n in VGG19 for k in ("weight", "bias")}
    last = "features.28.weight"
    for content, message in (
        (vgg19, "VGG16 or AlexNet, found features.0.weight, .*without features.17.weight$"),
        ({last: torch.zeros(2)}, f"found {last} and so on, without features.0.weight$"),
        (
            make_weights() | {last: torch.zeros(3)},
            rf"{last} of the shape \(512, 512, 3, 3\), found \(3,\)$",
        ),
        (
            make_weights("alex") | {"features.3.bias": "x"},
            r"features.3.bias of the shape \(192,\), found str$",
        ),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"^--weights\.lpips: {path}: .*{message}"):
            load(str(path))


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content, message in (
        ({"fc.weight": torch.zeros(2)}, "expected the weights of .* VGG16 .*, found fc.weight"),
        ([torch.zeros(2)], "expected weights by name, found a list"),
        (Path("a"), "is not a file of PyTorch weights"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"^--weights\.lpips: {path}:? {message}"):
            load(str(path))
    for junk in (b"", b"<html>not found</html>"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match=rf"{path} is not a file of PyTorch weights"):
            load(str(path))


def test_an_absent_torchvision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    path = tmp_path / "weights.pth"
    torch.save(make_weights(), path)
    with pytest.raises(MissingWeights, match=r"torchvision does not import.*latent-t2i\[metrics\]"):
        load(str(path))
