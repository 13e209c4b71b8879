"""LPIPS against torchmetrics' own metric and the lpips package, with random backbones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.metrics.lpips import Distance, Lpips
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item
from tests.judging import judge

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other packages
torchvision = pytest.importorskip("torchvision", reason="see .ci/references")

NETS = {"vgg": "vgg16", "alex": "alexnet"}


@pytest.fixture(scope="module", params=NETS)
def backbone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A network's name and a file of its weights, as torchvision publishes them."""
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    save_backbone(request.param, path)
    return request.param, path


def save_backbone(net: str, path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(torchvision.models, NETS[net])(weights=None)
    # The classifiers are large and not used.
    weights = {k: v for k, v in network.state_dict().items() if k.startswith("features.")}
    torch.save(weights, path)


def images(seed: int, num: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num, 64, 64, 3), np.uint8)


def as_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_distances_equal_torchmetrics(
    backbone: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.functional.image import lpips as reference

    net, path = backbone

    def features(name: str, pretrained: bool = False) -> torch.nn.Module:
        network = getattr(torchvision.models, name)(weights=None).features
        stored = torch.load(path, weights_only=True)
        network.load_state_dict({k.removeprefix("features."): v for k, v in stored.items()})
        return network

    # torchmetrics would download the published weights here.
    monkeypatch.setattr(reference, "_get_tv_model_features", features)
    expected = reference.learned_perceptual_image_patch_similarity(
        as_tensor(images(0)), as_tensor(images(1)), net_type=net, reduction="none"
    )
    monkeypatch.undo()
    distance = Distance(path)
    assert distance.net == net
    assert distance.measure(images(0), images(1)) == pytest.approx(expected.numpy(), rel=1e-5)


def test_distances_equal_the_lpips_package(backbone: tuple[str, Path]) -> None:
    lpips = pytest.importorskip("lpips", reason="see .ci/references")
    net, path = backbone
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    stored = torch.load(path, weights_only=True)
    names = network.net.state_dict()
    network.net.load_state_dict({n: stored[f"features.{n.partition('.')[2]}"] for n in names})
    with torch.inference_mode():
        expected = network(as_tensor(images(0)), as_tensor(images(1))).flatten()
    found = Distance(path).measure(images(0), images(1))
    # The package normalises with an epsilon of its own.
    assert found == pytest.approx(expected.numpy(), rel=1e-3)


@pytest.fixture
def alex(tmp_path: Path) -> Path:
    path = tmp_path / "alex.pth"
    save_backbone("alex", path)
    return path


def test_properties_of_the_distance(alex: Path) -> None:
    distance = Distance(alex)
    same = images(0)
    assert distance.measure(same, same) == pytest.approx(0, abs=1e-6)
    levels = np.arange(0, 256, 4, dtype=np.uint8)
    smooth = np.broadcast_to(levels[None, :, None, None], (1, 64, 64, 3)).copy()
    noise = np.random.default_rng(0).normal(size=smooth.shape)
    noisy = [np.clip(smooth + sigma * noise, 0, 255).astype(np.uint8) for sigma in (5, 20, 60)]
    found = [float(distance.measure(smooth, image)[0]) for image in noisy]
    assert found == sorted(found)
    assert found[0] > 0
    many, others = images(2, 20), images(3, 20)
    parts = [distance.measure(many[i : i + 3], others[i : i + 3]) for i in range(0, 20, 3)]
    assert np.concatenate(parts) == pytest.approx(distance.measure(many, others), rel=1e-4)


def test_the_metric_uses_the_weights_of_the_settings(alex: Path) -> None:
    weights = WeightsConfig(lpips=str(alex))
    context = Context(config=EvaluationConfig(name="x", weights=weights), row="reconstruction")
    items = [Item(position=n, key=f"{n}.png") for n in range(3)]
    batch = Batch(images=images(0), items=items, originals=images(1))
    metric = judge(Lpips(context), batch)
    expected = Distance(alex).measure(images(0), images(1)).mean()
    assert metric.compute() == {"lpips": pytest.approx(float(expected))}
    assert metric.identity()["net"] == "alex"
