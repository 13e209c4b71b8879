"""Feature networks: what they compute, what identifies them, and errors for unusable files."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from latent_t2i.evaluation import features
from latent_t2i.evaluation.config import EvaluationConfig, WeightsConfig
from latent_t2i.evaluation.feature_stats import stats_of
from latent_t2i.evaluation.features import Extractor, load_extractor
from latent_t2i.evaluation.metrics.frechet import Fid, FrechetDistance
from latent_t2i.evaluation.metrics.kid import Kid
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item, MissingWeights
from latent_t2i.evaluation.reference import load_statistics
from latent_t2i.model.encoders import quiet
from latent_t2i.model.paths import find_path
from tests.feature_networks import RandomNetwork, make_context, smooth_images

CLIP = "scenes/encoders/clip"


@pytest.fixture(scope="module")
def clip() -> Extractor:
    return load_extractor(CLIP, Context(config=EvaluationConfig(name="tests")))


def test_clip_features_are_its_image_embeddings(clip: Extractor) -> None:
    images = smooth_images(3, seed=0, side=64)  # CLIP's own size, so that nothing is resized
    with quiet():
        model = CLIPModel.from_pretrained(find_path(CLIP), dtype=torch.float32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        expected = model.visual_projection(pooled).numpy()
    np.testing.assert_allclose(clip.extract(images), expected, rtol=1e-4, atol=1e-5)
    assert clip.dim == expected.shape[1]


def test_identity_names_weights_resize_and_versions(clip: Extractor) -> None:
    identity = clip.identity()
    assert identity["network"] == "clip"
    assert len(identity["weights_sha256"]) == 64
    assert identity["resize"].startswith("PIL, ")
    assert "shortest_edge 64" in identity["resize"]
    assert identity["torch"] == torch.__version__


def test_image_processors_use_pil(clip: Extractor) -> None:
    """torchvision's resize differs, and its presence must not change a figure."""
    assert type(clip._processor).__name__ == "CLIPImageProcessorPil"


def test_features_are_computed_once_per_batch() -> None:
    network = RandomNetwork()
    items = [Item(position=n, key="") for n in range(4)]
    batch = Batch(images=smooth_images(4, seed=0), items=items)
    np.testing.assert_array_equal(network.features(batch), network.features(batch))
    assert network.num_calls == 1


def test_networks_are_loaded_once(clip: Extractor) -> None:
    context = Context(config=EvaluationConfig(name="tests"))
    assert load_extractor(CLIP, context) is load_extractor(CLIP, context)


def test_dinov2_features_are_the_class_token(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        model.save_pretrained(tmp_path)
    size = {"shortest_edge": 28}
    BitImageProcessorPil(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path), Context(config=EvaluationConfig(name="tests")))
    images = smooth_images(2, seed=0)
    found = extractor.extract(images)
    pixels = extractor._processor(images=list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert extractor.dim == 16


def test_a_network_that_is_nowhere() -> None:
    with pytest.raises(MissingWeights, match=r"--weights\.features: no folder 'no/such-model'"):
        load_extractor("no/such-model", Context(config=EvaluationConfig(name="tests")))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"--weights\.features: .* has no model\.safetensors"):
        load_extractor(str(tmp_path), Context(config=EvaluationConfig(name="tests")))


def test_missing_inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    context = Context(config=EvaluationConfig(name="tests"))
    place = tmp_path / "checkpoints" / features.INCEPTION_FILE
    with pytest.raises(MissingWeights) as caught:
        load_extractor("inception", context)
    message = str(caught.value)
    assert str(place) in message
    assert features.INCEPTION_URL in message
    weights = WeightsConfig(inception="nowhere.pth")
    with pytest.raises(MissingWeights, match=r"no file nowhere\.pth"):
        load_extractor("inception", Context(config=EvaluationConfig(name="tests", weights=weights)))


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    config = EvaluationConfig(name="tests", weights=WeightsConfig(inception=str(path)))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'latent-t2i\[metrics\]'"):
        load_extractor("inception", Context(config=config))


def save_stats(path: Path, network: Extractor, changed: dict[str, str]) -> Path:
    stats = stats_of(np.random.default_rng(0).standard_normal((9, network.dim)).astype(np.float32))
    stats.identity = network.identity() | changed
    stats.save(path)
    return path


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    network = RandomNetwork()
    path = save_stats(tmp_path / "same.npz", network, {"torch": "another version"})
    assert load_statistics(path, network).count == 9
    Kid(_with_reference(network, path))
    for name, value in (("resize", "clean"), ("weights_sha256", "f" * 64), ("network", "other")):
        path = save_stats(tmp_path / f"{name}.npz", network, {name: value})
        expected = network.identity()[name]
        with pytest.raises(ValueError, match=f"expected {name} '{expected}', found '{value}'"):
            load_statistics(path, network)
        with pytest.raises(MissingWeights, match=f"expected {name} '{expected}'"):
            Kid(_with_reference(network, path))


def test_statistics_that_do_not_name_their_network(tmp_path: Path) -> None:
    """pytorch-fid's and clean-fid's: Inception's, under a protocol that fixes the resize mode."""
    inception, other = RandomNetwork(), RandomNetwork(CLIP)
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(inception.dim), sigma=np.eye(inception.dim))
    with pytest.raises(ValueError, match="does not name the resize mode that made it"):
        load_statistics(path, inception)
    with pytest.raises(MissingWeights, match="--resize MODE"):
        Fid(_with_reference(inception, path))
    assert load_statistics(path, inception, "coco-mlperf").count == 0
    context = _with_reference(inception, path)
    context.config = replace(context.config, protocol="coco-mlperf")
    Fid(context)
    with pytest.raises(MissingWeights, match="holds mean and covariance only, but kid needs"):
        Kid(context)
    with pytest.raises(MissingWeights, match="does not name its feature network"):
        FrechetDistance(_with_reference(other, path))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=f"expected {inception.dim} features, found 3"):
        load_statistics(path, inception)


def _with_reference(network: Extractor, path: Path) -> Context:
    """Returns the context of an evaluation with `--reference PATH`."""
    context = make_context(network, lambda _: load_statistics(path, network))
    context.config = replace(context.config, reference=str(path))
    return context
