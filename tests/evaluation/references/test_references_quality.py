"""Image quality metrics equal those of the packages that define them, with random weights."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from latent_t2i.evaluation import resize
from latent_t2i.evaluation.config import EvaluationConfig, ResizeMode, WeightsConfig
from latent_t2i.evaluation.feature_stats import FeatureStats, stats_of
from latent_t2i.evaluation.features import Inception, TransformersExtractor, load_extractor
from latent_t2i.evaluation.metrics.frechet import Fid, FrechetDistance
from latent_t2i.evaluation.metrics.inception_score import NUM_PARTS, InceptionScore
from latent_t2i.evaluation.metrics.kid import Kid, kernel_distance
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, Metric
from latent_t2i.evaluation.metrics.prdc import prdc

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other packages
fidelity = pytest.importorskip("torch_fidelity", reason="see .ci/references")
Images = NDArray[np.uint8]
Photos = tuple[Images, Images]
WITHIN = 1e-3


class Pixels(Dataset[torch.Tensor]):
    """Images as torch-fidelity reads them."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.images[index].transpose(2, 0, 1).copy())


def make_context(weights: Path, mode: ResizeMode = "legacy") -> Context:
    config = EvaluationConfig(
        name="references", resize=mode, weights=WeightsConfig(inception=str(weights))
    )
    return Context(config=config)


def feed(metric: Metric, images: Images, batch_size: int = 16) -> None:
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        items = [Item(position=start + n, key=str(start + n)) for n in range(len(part))]
        metric.update(Batch(images=part, items=items))


@pytest.fixture(scope="module")
def extractors(inception_weights: Path) -> dict[ResizeMode, Inception]:
    modes: tuple[ResizeMode, ...] = ("legacy", "clean", "pytorch")
    found: dict[ResizeMode, Inception] = {}
    for mode in modes:
        extractor = load_extractor("inception", make_context(inception_weights, mode))
        assert isinstance(extractor, Inception)
        found[mode] = extractor
    return found


@pytest.fixture(scope="module")
def theirs(inception_weights: Path, photos: Photos) -> dict[str, float]:
    found: dict[str, float] = fidelity.calculate_metrics(
        input1=Pixels(photos[0]),
        input2=Pixels(photos[1]),
        feature_extractor_weights_path=str(inception_weights),
        fid=True, kid=True, isc=True, kid_subset_size=15, kid_subsets=20, isc_splits=NUM_PARTS,
        samples_shuffle=False, batch_size=16, cuda=False, verbose=False, cache=False,
        save_cpu_ram=True,
    )  # fmt: skip
    return found


def test_fid_and_kid_legacy_equal_torch_fidelity(
    inception_weights: Path,
    photos: Photos,
    theirs: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("latent_t2i.evaluation.metrics.kid.SUBSET_SIZE", 15)
    monkeypatch.setattr("latent_t2i.evaluation.metrics.kid.NUM_SUBSETS", 20)
    context = make_context(inception_weights)
    reference = Fid(context)
    feed(reference, photos[1])
    ours = Context(
        config=context.config, shared=context.shared, reference=lambda _: reference.stats
    )
    fid, kid = Fid(ours), Kid(ours)
    feed(fid, photos[0])  # the statistics are shared
    assert fid.compute()["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=WITHIN)
    assert kid.compute()["kid"] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=WITHIN
    )
    assert kid.details()["std_of_subsets"] == pytest.approx(
        theirs["kernel_inception_distance_std"], rel=WITHIN
    )


def test_inception_score_equals_torch_fidelity(
    inception_weights: Path, photos: Photos, theirs: dict[str, float]
) -> None:
    """The same parts: torch-fidelity's are consecutive images, ours every tenth position."""
    metric = InceptionScore(make_context(inception_weights))
    count = len(photos[0])
    parts = [range(i * count // NUM_PARTS, (i + 1) * count // NUM_PARTS) for i in range(NUM_PARTS)]
    positions = {image: NUM_PARTS * n + p for p, part in enumerate(parts)
                 for n, image in enumerate(part)}  # fmt: skip
    items = [Item(position=positions[n], key=str(n)) for n in range(count)]
    metric.update(Batch(images=photos[0], items=items))
    assert metric.compute()["inception_score"] == pytest.approx(
        theirs["inception_score_mean"], rel=WITHIN
    )
    assert metric.details()["std_of_parts"] == pytest.approx(
        theirs["inception_score_std"], rel=WITHIN
    )


@pytest.mark.parametrize("side", [64, 299, 512])
def test_legacy_resize_is_torch_fidelitys_to_the_bit(side: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    images = np.random.default_rng(0).integers(0, 256, (2, side, side + 7, 3), np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(pixels, (299, 299), align_corners=False)
    assert torch.equal(resize.legacy(images, 299), expected)


@pytest.mark.parametrize("side", [64, 299, 512])
def test_clean_resize_is_clean_fids_to_the_bit(side: int) -> None:
    theirs = pytest.importorskip("cleanfid.resize", reason="see .ci/references")
    images = np.random.default_rng(0).integers(0, 256, (2, side, side + 7, 3), np.uint8)
    resizer = theirs.build_resizer("clean")
    expected = np.stack([resizer(image) for image in images]).transpose(0, 3, 1, 2)
    assert np.array_equal(resize.clean(images, 299).numpy(), expected)


def write_images(folder: Path, images: Images) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def test_fid_clean_equals_clean_fid(
    extractors: dict[ResizeMode, Inception], photos: Photos, tmp_path: Path
) -> None:
    """clean-fid's own network has no random weights, so it gets ours; all else is its own."""
    theirs = pytest.importorskip("cleanfid.fid", reason="see .ci/references")
    extractor = extractors["clean"]
    rows = [
        theirs.get_folder_features(
            str(write_images(tmp_path / str(number), images)),
            model=lambda pixels: extractor._body((pixels - 128) / 128),
            num_workers=0,
            batch_size=16,
            device=torch.device("cpu"),
            mode="clean",
            verbose=False,
        )
        for number, images in enumerate(photos)
    ]
    ours = [extractor.extract(images) for images in photos]
    for found, expected in zip(ours, rows, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Their square root of a singular matrix is slow and inexact: compare in 24 features.
    fid = theirs.fid_from_feats(rows[0][:, :24], rows[1][:, :24])
    distance = FrechetDistance.figures  # the distance itself needs no network
    stats = [stats_of(np.ascontiguousarray(found[:, :24])) for found in ours]
    assert distance(_named("fid"), *stats)["fid"] == pytest.approx(fid, rel=WITHIN)


def _named(name: str) -> Any:
    return type("Named", (), {"name": name})()


@pytest.mark.parametrize("side", [299, 120])
def test_fid_pytorch_equals_pytorch_fid(
    extractors: dict[ResizeMode, Inception],
    inception_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: int,
) -> None:
    theirs = pytest.importorskip("pytorch_fid.fid_score", reason="see .ci/references")
    state = torch.load(inception_weights)
    module = sys.modules["pytorch_fid.inception"]
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
    model = module.InceptionV3([3])
    rng = np.random.default_rng(side)
    sets = [rng.integers(0, high, (10, side, side, 3)).astype(np.uint8) for high in (256, 200)]
    rows = []
    for number, images in enumerate(sets):
        folder = write_images(tmp_path / str(number), images)
        files = sorted(folder.iterdir())
        rows.append(theirs.get_activations(files, model, batch_size=12, num_workers=0))
    ours = [extractors["pytorch"].extract(images) for images in sets]
    for found, expected in zip(ours, rows, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    parts = [np.float64(r[:, :6]) for r in rows]
    moments = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in parts]
    fid = theirs.calculate_frechet_distance(*moments[0], *moments[1])
    stats = [stats_of(np.ascontiguousarray(found[:, :6])) for found in ours]
    assert Fid.figures(_named("fid"), *stats)["fid"] == pytest.approx(fid, rel=WITHIN)


@pytest.mark.parametrize(("num_real", "num_fake", "k"), [(60, 80, 5), (200, 150, 3), (12, 9, 5)])
def test_prdc_equals_the_package(num_real: int, num_fake: int, k: int) -> None:
    theirs = pytest.importorskip("prdc", reason="see .ci/references")
    rng = np.random.default_rng(num_real)
    real = rng.standard_normal((num_real, 6)).astype(np.float32)
    fake = (rng.standard_normal((num_fake, 6)) * 0.8 + 0.3).astype(np.float32)
    expected = theirs.compute_prdc(real, fake, nearest_k=k)
    found = prdc(real, fake, k)
    assert found == pytest.approx({name: float(v) for name, v in expected.items()}, rel=WITHIN)


def test_kid_of_whole_sets_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((20, 8)).astype(np.float32) + s for s in (0, 0.2))
    expected = float(poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double()))
    assert kernel_distance(x, y) == pytest.approx(expected, rel=WITHIN)


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"does not hold the weights of .* found conv.weight"):
        load_extractor("inception", make_context(path))
    state = {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"does not hold the weights of .* Missing key"):
        load_extractor("inception", make_context(path))


def test_timm_models_are_feature_networks(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="see .ci/references")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", pretrained=False).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("model_args")  # the Hub's checkpoints have none
    (tmp_path / "config.json").write_text(json.dumps(settings))
    extractor = load_extractor(str(tmp_path), Context(config=EvaluationConfig(name="references")))
    assert isinstance(extractor, TransformersExtractor)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    pixels = extractor._processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True).numpy()
    np.testing.assert_allclose(extractor.extract(images), expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_readable_by_pytorch_fid(
    extractors: dict[ResizeMode, Inception], photos: Photos, tmp_path: Path
) -> None:
    theirs = pytest.importorskip("pytorch_fid.fid_score", reason="see .ci/references")
    stats = FeatureStats(2048, num_parts=2)
    rows = extractors["pytorch"].extract(photos[0][:4])
    stats.add(np.arange(4), rows)
    stats.save(tmp_path / "stats.npz")
    mean, cov = theirs.compute_statistics_of_path(str(tmp_path / "stats.npz"), None, 1, 2048, "cpu")
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(cov, np.cov(rows.astype(np.float64), rowvar=False), atol=1e-9)
