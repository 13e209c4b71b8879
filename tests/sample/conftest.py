"""A bundle of random weights, and bundles that are loaded once per module."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from latent_t2i.sample import sampler
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose images are noise, in a folder of its own."""
    return make_bundle(tmp_path_factory.mktemp("run") / "bundle")


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """Loads each bundle once for all commands of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "load", functools.cache(sampler.load))
        yield
