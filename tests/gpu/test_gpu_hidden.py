"""The suite for CPUs sees no GPU, and the tests in this folder do if they are run alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def are_gpu_tests(request: pytest.FixtureRequest) -> Callable[[list[str], Path], bool]:
    """The function of tests/conftest.py, which cannot be imported by its name."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(p.are_gpu_tests for p in plugins if hasattr(p, "are_gpu_tests"))


def test_gpus_are_hidden_unless_only_gpu_tests_run(
    are_gpu_tests: Callable[[list[str], Path], bool], request: pytest.FixtureRequest
) -> None:
    here = request.config.invocation_params.dir
    if are_gpu_tests(request.config.args, here):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") != "" or not torch.cuda.is_available()
    else:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tests/gpu"], True),
        (["tests/gpu/test_gpu_train.py::test_x", str(ROOT / "tests" / "gpu")], True),
        (["tests"], False),
        (["tests/gpu", "tests/train"], False),
        (["tests/train/test_train_loop.py::test_x"], False),
        (["."], False),
    ],
)
def test_gpu_tests_are_recognised_by_their_paths(
    are_gpu_tests: Callable[[list[str], Path], bool], arguments: list[str], expected: bool
) -> None:
    assert are_gpu_tests(arguments, ROOT) == expected
