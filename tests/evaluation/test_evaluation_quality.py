"""Image quality metrics: known values, and the direction in which each moves."""

import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from latent_t2i.evaluation.feature_stats import FeatureStats, frechet_distance, stats_of
from latent_t2i.evaluation.features import Inception
from latent_t2i.evaluation.metrics import kid
from latent_t2i.evaluation.metrics.cmmd import Cmmd, gaussian_distance
from latent_t2i.evaluation.metrics.frechet import Fid, FrechetDistance, fid_infinity
from latent_t2i.evaluation.metrics.inception_score import NUM_CLASSES, InceptionScore
from latent_t2i.evaluation.metrics.kid import Kid, kernel_distance
from latent_t2i.evaluation.metrics.metric import Batch, Context, FeatureMetric, Item
from latent_t2i.evaluation.metrics.mind import Mind, monge_distance
from latent_t2i.evaluation.metrics.prdc import Prdc, prdc
from latent_t2i.evaluation.processes import Group
from tests.feature_networks import (
    Images,
    RandomNetwork,
    feed,
    make_batches,
    make_context,
    smooth_images,
)

Rows = NDArray[np.float32]
SET_METRICS: list[type[FeatureMetric]] = [Fid, FrechetDistance, Kid, Cmmd, Mind, Prdc]
FEATURES = "scenes/encoders/clip"


def normal(num: int, dim: int = 8, seed: int = 0, shift: float = 0) -> Rows:
    rows = np.random.default_rng(seed).standard_normal((num, dim)) + shift
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def network() -> RandomNetwork:
    return RandomNetwork()


def fid_to(images: Images, reference: FeatureStats, network: RandomNetwork) -> float:
    metric = Fid(make_context(network, lambda _: reference))
    feed(metric, images)
    return metric.compute()["fid"]


def each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def blur(images: Images, level: int) -> Images:
    return each(images, lambda image: image.filter(ImageFilter.GaussianBlur(level / 3)))


def noise(images: Images, level: int) -> Images:
    added = np.random.default_rng(0).normal(0, 8 * level, images.shape)
    return (images + added).clip(0, 255).astype(np.uint8)


def jpeg(images: Images, level: int) -> Images:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality={1: 80, 2: 40, 3: 10}[level])
        return Image.open(file)

    return each(images, change)


def crop(images: Images, level: int) -> Images:
    cut = 3 * level
    box = (cut, cut, images.shape[2] - cut, images.shape[1] - cut)
    return each(images, lambda image: image.crop(box).resize(image.size))


@pytest.mark.parametrize("worsen", [blur, noise, jpeg, crop])
def test_fid_rises_as_images_get_worse(
    worsen: Callable[[Images, int], Images], network: RandomNetwork
) -> None:
    images = smooth_images(40, seed=0)
    reference = stats_of(network.extract(images))
    assert fid_to(images, reference, network) == pytest.approx(0, abs=1e-6)
    found = [fid_to(worsen(images, level), reference, network) for level in (1, 2, 3)]
    assert 0 < found[0] < found[1] < found[2]


def test_fid_does_not_depend_on_the_batch_size(network: RandomNetwork) -> None:
    images, reference = smooth_images(50, seed=0), stats_of(normal(50, network.dim))
    found = []
    for batch_size in (1, 7, 50):
        metric = Fid(make_context(network, lambda _: reference))
        feed(metric, images, batch_size)
        found.append(metric.compute()["fid"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("cls", SET_METRICS)
def test_set_metrics_share_statistics_and_say_what_they_used(
    cls: type[FeatureMetric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kid, "NUM_SUBSETS", 3)
    network = RandomNetwork("inception" if cls.extractor_name is Fid.extractor_name else FEATURES)
    reference = FeatureStats(network.dim, num_parts=2)
    reference.add(np.arange(60), network.extract(smooth_images(60, seed=1)))
    context = make_context(network, {network.name: reference}.__getitem__, num_seed_sets=3)
    network.num_calls = 0
    metric, other = cls(context), cls(context)
    for batch in make_batches(smooth_images(48, seed=0)):
        metric.update(batch)
        other.update(batch)
    metric.gather(Group())
    other.gather(Group())
    assert metric.stats is other.stats
    assert (network.num_calls, metric.stats.count) == (3, 48)
    figures = metric.compute()
    assert all(math.isfinite(value) for value in figures.values())
    spread = metric.spread(3)
    assert spread.keys() == figures.keys()
    for summary in spread.values():
        assert len(summary["values"]) == 3
        assert summary["mean"] == pytest.approx(np.mean(summary["values"]))
        assert summary["std"] > 0 or len(set(summary["values"])) == 1
    assert metric.identity() == network.identity()
    assert metric.details()
    assert "real" in cls.rows


@pytest.mark.parametrize("cls", SET_METRICS)
def test_equal_images_have_finite_figures(
    cls: type[FeatureMetric], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that draws one picture only, with more images than features."""
    monkeypatch.setattr(kid, "NUM_SUBSETS", 3)
    network = RandomNetwork("inception" if cls.extractor_name is Fid.extractor_name else FEATURES)
    reference = stats_of(network.extract(smooth_images(60, seed=1)))
    metric = cls(make_context(network, lambda _: reference))
    feed(metric, np.repeat(smooth_images(1, seed=0), 48, axis=0))
    metric.gather(Group())
    assert all(math.isfinite(value) for value in metric.compute().values())
    json.dumps(metric.details(), allow_nan=False)


def test_too_few_images_have_no_spread() -> None:
    network = RandomNetwork()
    reference = stats_of(normal(9, network.dim))
    metric = Fid(make_context(network, lambda _: reference, num_seed_sets=3))
    feed(metric, smooth_images(5, seed=0))
    assert metric.spread(3) == {}
    assert metric.compute()["fid"] > 0


def test_fid_infinity_is_closer_to_the_truth() -> None:
    reference = stats_of(normal(20_000, seed=1))
    draws = [stats_of(normal(60, seed=seed, shift=0.2)) for seed in range(2, 22)]
    truth = 8 * 0.2**2
    fid = np.mean([frechet_distance(stats, reference) for stats in draws])
    extrapolated = np.mean([fid_infinity(stats, reference) or np.nan for stats in draws])
    assert abs(extrapolated - truth) < abs(fid - truth) / 2
    assert fid_infinity(stats_of(normal(15)), reference) is None  # too few for 8 features


def test_kid_is_unbiased() -> None:
    draws = [kernel_distance(normal(12, seed=n), normal(12, seed=1000 + n)) for n in range(300)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error
    kernels = [(rows @ rows.T / 8 + 1) ** 3 for rows in (normal(12, seed=n) for n in range(300))]
    biased = np.mean([np.trace(k) / 144 - (k.sum() - np.trace(k)) / (11 * 144) for k in kernels])
    assert biased > 30 * error  # what the diagonals would add, twice


def test_kid_uses_subsets_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "SUBSET_SIZE", 20)
    network = RandomNetwork()
    reference = stats_of(normal(50, network.dim))
    metric = Kid(make_context(network, lambda _: reference))
    feed(metric, smooth_images(40, seed=0))
    assert metric.details()["num_subsets"] == kid.NUM_SUBSETS
    assert metric.details()["subset_size"] == 20
    assert metric.compute() == metric.compute()


def test_kid_of_one_image() -> None:
    with pytest.raises(ValueError, match="kid: found 1 and 9 images, expected at least 2 of each"):
        kernel_distance(normal(1), normal(9))


def test_cmmd_equals_the_definition() -> None:
    x, y = normal(7), normal(9, seed=1, shift=0.5)

    def kernel(a: Rows, b: Rows) -> float:
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        return math.exp(-np.square(a - b).sum() / 200)

    def mean(first: Rows, second: Rows) -> float:
        return float(np.mean([[kernel(a, b) for b in second] for a in first]))

    assert gaussian_distance(x, y) == pytest.approx(
        1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-5
    )
    within = [
        np.mean([kernel(a, b) for n, a in enumerate(rows) for m, b in enumerate(rows) if n != m])
        for rows in (x, y)
    ]
    assert gaussian_distance(x, y, unbiased=True) == pytest.approx(
        1000 * (sum(within) - 2 * mean(x, y)), rel=1e-5
    )


def test_cmmd_of_equal_sets_is_zero_and_of_zeros_an_error() -> None:
    rows = normal(30)
    assert gaussian_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="an image's embedding is zero"):
        gaussian_distance(rows, np.zeros((4, 8), np.float32))
    with pytest.raises(ValueError, match="cmmd: found 30 and 1 images"):
        gaussian_distance(rows, normal(1))


def test_mind_has_known_values() -> None:
    rows = normal(40)
    assert monge_distance(rows, rows[::-1]) == 0
    # A shift v moves every projection by u . v, whose mean square is |v|^2 / D.
    shift = np.arange(8, dtype=np.float32)
    expected = 3 * float(np.square(shift).sum())
    assert monge_distance(rows, rows + shift) == pytest.approx(expected, rel=0.15)
    # Widths 1 and 2 in one dimension: the mean square of sorted differences is |x|^2.
    line = normal(30, dim=1)
    assert monge_distance(line, 2 * line) == pytest.approx(3 * np.square(line).mean(), rel=1e-5)


def test_mind_of_sets_of_different_size() -> None:
    found = monge_distance(normal(400, seed=1), normal(100))
    assert 0 < found < monge_distance(normal(400, seed=1, shift=1), normal(100))
    with pytest.raises(ValueError, match="mind: expected two sets of features"):
        monge_distance(normal(4), normal(4, dim=3))


def test_precision_and_recall_are_known_by_construction() -> None:
    two = np.concatenate([normal(40, seed=0), normal(40, seed=1, shift=50)])
    one = normal(60, seed=2)
    found = prdc(two, one)
    assert found["precision"] > 0.8
    assert 0.3 < found["recall"] <= 0.5
    assert 0.3 < found["coverage"] <= 0.5
    half = np.concatenate([normal(40, seed=3), normal(40, seed=4, shift=-90)])
    assert 0.4 < prdc(two, half)["precision"] <= 0.5
    far = prdc(two, normal(60, shift=500))
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    same = prdc(two, two)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_prdc_of_few_images() -> None:
    found = prdc(normal(3), normal(9, seed=1))
    assert 0 <= found["coverage"] <= 1
    with pytest.raises(ValueError, match="prdc: found 1 images and 9 of the reference"):
        prdc(normal(9), normal(1))


class KnownLogits(Inception):
    """Logits that the images' first pixels choose."""

    def __init__(self) -> None:
        self.name = "inception"

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        classes = batch.images[:, 0, 0, 0].astype(int)
        return (200 * np.eye(NUM_CLASSES)[classes]).astype(np.float32)

    def identity(self) -> dict[str, str]:
        return {"network": "known"}


def score_of(classes: list[int], batch_size: int = 7, num_processes: int = 1) -> dict[str, Any]:
    images = np.zeros((len(classes), 4, 4, 3), np.uint8) + np.array(classes, np.uint8).reshape(
        -1, 1, 1, 1
    )
    metric = InceptionScore(make_context(KnownLogits()))
    feed(metric, images, batch_size)
    metric.gather(Group())
    return metric.compute() | metric.details()


def test_inception_score_is_the_number_of_classes() -> None:
    assert score_of([3] * 40)["inception_score"] == pytest.approx(1)
    classes = [n // 10 % 4 for n in range(80)]  # each part has every class equally often
    found = score_of(classes)
    assert found["inception_score"] == pytest.approx(4)
    assert found["num_parts"] == 10
    assert found["std_of_parts"] == pytest.approx(0, abs=1e-9)


def test_inception_score_of_few_or_no_images() -> None:
    assert score_of([1, 2, 3])["num_parts"] == 3
    with pytest.raises(ValueError, match="inception_score: found no images"):
        InceptionScore(make_context(KnownLogits())).compute()


def test_inception_score_adds_processes() -> None:
    context = make_context(KnownLogits())
    images = smooth_images(40, seed=0)
    whole, halves = InceptionScore(context), [InceptionScore(context) for _ in range(2)]
    feed(whole, images)
    for number, image in enumerate(images):
        item = Item(position=number, key="")
        halves[number % 2].update(Batch(images=image[None], items=[item]))

    class Both(Group):
        def gather(self, value: Any) -> list[Any]:
            return [value, (halves[1]._counts, halves[1]._classes, halves[1]._entropies)]

    halves[0].gather(Both())
    assert halves[0].compute() == pytest.approx(whole.compute())


def test_the_reference_is_needed() -> None:
    for cls in SET_METRICS:
        assert "reference" in cls.needs
    assert "reference" not in InceptionScore.needs
    assert Context.__dataclass_fields__["reference"].default is None
