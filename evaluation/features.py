"""Feature networks: images to the vectors whose distributions FID and its relatives compare.

    extractor = load_extractor("inception", context)
    extractor.features(batch)  # (B, D)

Three kinds: `inception`, torch-fidelity's port of the network of all published FID figures; CLIP
and other transformers models with an image processor (DINOv2, SigLIP, ViT); timm models, which
transformers wraps. Image processors always use their PIL backend: torchvision's resize differs, and
whether it is installed must not change a figure.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latent_t2i.evaluation.config import EvaluationConfig, ProtocolName, ResizeMode
from latent_t2i.evaluation.feature_stats import Header, read_header
from latent_t2i.evaluation.metrics.metric import Batch, Context, FeatureMetric, MissingWeights
from latent_t2i.evaluation.networks import find_network, load_image_processor
from latent_t2i.evaluation.resize import prepare
from latent_t2i.model.encoders import fingerprint, load_network
from latent_t2i.model.paths import find_path, hash_file

FLAG = "--weights.features"
INCEPTION = "inception"
INCEPTION_DIM = 2048
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
MODEL_FILES = ("config.json", "model.safetensors*", "model-*-of-*.safetensors",
               "preprocessor_config.json")  # fmt: skip
WHAT_MATTERS = ("network", "weights_sha256", "resize")
"""The entries of an identity that must be equal for statistics to be compared; the others are the
versions of packages."""


class Extractor(abc.ABC):
    """A feature network with its preprocessing."""

    dim: int
    """D, the number of features of an image."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.device = device

    def features(self, batch: Batch) -> NDArray[np.float32]:
        """Returns the features (B, D) of a batch; computed once per batch."""
        return batch.cached(("features", self), lambda: self.extract(batch.images))

    @torch.inference_mode()
    def extract(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the features (B, D) of images (B, H, W, 3)."""
        # TF32 would change a figure's third digit.
        cudnn = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(torch.device(self.device).type, enabled=False), cudnn:
            found: NDArray[np.float32] = self._forward(images).float().cpu().numpy()
        return found.reshape(len(images), -1)

    @abc.abstractmethod
    def _forward(self, images: NDArray[np.uint8]) -> Tensor: ...

    @abc.abstractmethod
    def identity(self) -> dict[str, str]:
        """Returns the network's kind, its weights' sha256, how it resizes, and versions."""


def load_extractor(name: str, context: Context) -> Extractor:
    """Returns the feature network of a name, which is loaded once per evaluation.

    `inception`, or the folder or Hub name of a transformers or timm model. Raises MissingWeights,
    with instructions, if files are unavailable, and ValueError for those of another network.
    """
    config = context.config

    def make() -> Extractor:
        if name == INCEPTION:
            return Inception(config.weights.inception, config.resize, context.device)
        return TransformersExtractor(name, context.device)

    key = ("extractor", name, config.weights.inception, config.resize)
    return context.load(key, make)


class Inception(Extractor):
    """torch-fidelity's Inception v3, the TensorFlow network of 2015 with its 1008 logits."""

    dim = INCEPTION_DIM

    def __init__(self, weights: str | None, mode: ResizeMode, device: str) -> None:
        super().__init__(INCEPTION, device)
        path = find_inception(weights)
        self._mode = mode
        self._sha256 = hash_file(path)
        network = _load_inception(path)
        # The layers in their order, without the network's own resize, which is `legacy` only.
        *layers, last = network.children()
        self._body = nn.Sequential(*layers, nn.Flatten()).to(device)
        self._last: Any = last.to(device)

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
        found: Tensor = self._body(prepare(images, self._mode).to(self.device))
        return found

    @torch.inference_mode()
    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Returns the logits (B, 1008) without bias, as the Inception Score uses them."""
        features = torch.from_numpy(self.features(batch)).to(self.device)
        found: NDArray[np.float32] = (features @ self._last.weight.T).cpu().numpy()
        return found

    def identity(self) -> dict[str, str]:
        return {
            "network": "inception-v3-2015 (torch-fidelity)",
            "weights_sha256": self._sha256,
            "resize": f"{self._mode}, 299 px",
        } | _versions("torch", "torch-fidelity", *(["pillow"] if self._mode == "clean" else []))


class TransformersExtractor(Extractor):
    """A transformers model: CLIP's projected embedding, or the pooled output of other networks."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        folder = find_network(name, MODEL_FILES, flag=FLAG)
        self._processor = load_image_processor(folder, flag=FLAG)
        self._model = _load_transformers(folder).to(device)
        self._sha256 = fingerprint(self._model)
        self.dim = self.extract(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]

    def _forward(self, images: NDArray[np.uint8]) -> Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device)
        if hasattr(self._model, "get_image_features"):
            output = self._model.get_image_features(pixel_values=pixels)
        else:
            output = self._model(pixel_values=pixels)
        pooled = output.pooler_output
        found: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return found

    def identity(self) -> dict[str, str]:
        settings = _plain_settings(self._processor)
        return {
            "network": str(self._model.config.model_type),
            "weights_sha256": self._sha256,
            "resize": settings,
        } | _versions("torch", "transformers", "pillow")


def mismatch(header: Header, extractor: Extractor, protocol: ProtocolName) -> str | None:
    """Returns why statistics cannot be compared with an extractor's; None if they can.

    Statistics of other tools do not name what made them. They are accepted only as Inception's and
    under a protocol that fixes the resize mode.
    """
    identity = extractor.identity()
    for name in WHAT_MATTERS if header.identity else ():
        if header.identity.get(name) != identity[name]:
            found = header.identity.get(name, "nothing")
            return f"expected {name} {identity[name]!r}, found {found!r}"
    if not header.identity and extractor.name != INCEPTION:
        return (
            "it does not name its feature network, so Inception is assumed, but the metric uses "
            f"{extractor.name}"
        )
    if header.dim != extractor.dim:
        return f"expected {extractor.dim} features, found {header.dim}"
    if not header.identity and protocol == "own":
        return (
            "it does not name the resize mode that made it, and figures of different modes differ "
            "by several points: name it with python -m evaluation.reference FILE.npz --resize MODE "
            "(that of pytorch-fid is pytorch), and give the file that it writes"
        )
    return None


def require_fit(config: EvaluationConfig, metric: FeatureMetric) -> None:
    """Raises MissingWeights if the reference is a file of statistics that a metric cannot use."""
    path = None if config.reference is None else find_path(config.reference)
    if path is None or not path.is_file():
        return
    header = read_header(path)
    reason = mismatch(header, metric.network, config.protocol)
    if reason is None and metric.uses_rows and not header.has_rows:
        reason = f"it holds mean and covariance only, but {metric.name} needs features of images"
    if reason is not None:
        raise MissingWeights(
            f"--reference: {path}: {reason}; make statistics of the real images with "
            "evaluation.reference"
        )


def find_inception(weights: str | None) -> Path:
    """Returns the path of Inception's weights; raises MissingWeights if there are none."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = cached if weights is None else find_path(weights)
    if path is None or not path.is_file():
        raise MissingWeights(
            f"--weights.inception: no file {weights or cached}; expected torch-fidelity's weights: "
            f"download {INCEPTION_URL} and put the file there, or give its path"
        )
    return path


def _load_inception(path: Path) -> nn.Module:
    network = _import_inception()
    expected = (
        f"--weights.inception: {path} does not hold the weights of torch-fidelity's Inception"
    )
    try:
        # torch-fidelity reads any pickle, which can run code. This call allows tensors only.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{expected}: {reason}; expected the file of {INCEPTION_URL}") from error
    if not isinstance(state, Mapping) or "Conv2d_1a_3x3.conv.weight" not in state:
        found = ", ".join(map(str, state))[:80] if isinstance(state, Mapping) else type(state)
        raise ValueError(f"{expected}: found {found}; expected the file of {INCEPTION_URL}")
    try:
        return network(INCEPTION, [str(INCEPTION_DIM)], feature_extractor_weights_path=str(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{expected}: {reason}; expected the file of {INCEPTION_URL}") from error


def _import_inception() -> Any:
    """Returns torch-fidelity's class; raises ModuleNotFoundError that says what to install."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {error.name} is not installed; install it: pip install "
            "'latent-t2i[metrics]'",
            name=error.name,
        ) from error
    except RuntimeError as error:  # of torchvision
        raise MissingWeights(f"torch-fidelity cannot be imported: {error}") from error
    return FeatureExtractorInceptionV3


def _load_transformers(folder: Path) -> Any:
    """Returns a transformers model; raises ValueError if it does not load."""
    from transformers import AutoModel

    try:
        return load_network(AutoModel, folder, "a feature network", flag=FLAG)
    except TypeError as error:  # of a configuration that fits no constructor
        raise ValueError(f"{FLAG}: {folder} does not load: {error}") from error


def _plain_settings(processor: Any) -> str:
    """Returns an image processor's settings in one line."""
    settings = processor.to_dict()
    skip = ("image_processor_type", "processor_class", "data_format", "return_tensors")
    chosen = sorted((k, v) for k, v in settings.items() if v is not None and k not in skip)
    return "PIL, " + ", ".join(f"{key} {_plain(value)}" for key, value in chosen)


def _plain(value: Any) -> str:
    items = value.items() if isinstance(value, Mapping) else None
    if items is not None:
        return "/".join(f"{key} {item}" for key, item in items if item is not None)
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}
