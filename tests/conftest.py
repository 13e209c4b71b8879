"""Fixtures for all tests, and settings: no network, no GPU, one thread per process."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

# Set before huggingface_hub is imported, which reads it once. Subprocesses inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
with suppress(ModuleNotFoundError):  # the tests for a GPU do without it
    from hypothesis import settings

    # The same examples in each run, and no limit of time.
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ROOT = Path(__file__).resolve().parent.parent
FORKED = [
    "tests.evaluation.processes",
    "tests.shards.test_shards_faults",
    "tests.stage_one",
    "tests.train.process_groups",
]
"""Modules whose functions run in forked processes."""
COCO_MINI = ROOT.parent / "shared" / "data" / "coco-mini"


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, unless the command names files of tests/gpu only.

    Runs on them are not the same bit by bit, which most tests of training compare.
    """
    if not are_gpu_tests(config.args, config.invocation_params.dir):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def are_gpu_tests(arguments: Sequence[str], folder: Path) -> bool:
    """Returns whether all paths among pytest's arguments are in tests/gpu."""
    paths = [(folder / argument.partition("::")[0]).resolve() for argument in arguments]
    return all(path.is_relative_to(ROOT / "tests" / "gpu") for path in paths)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Resets accelerate, which keeps the precision of an earlier test for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """A context whose processes start with the modules of FORKED imported."""
    # A process has one fork server, whose imports are fixed at its first use.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the server imports from there
        process = context.Process(target=os.getpid)
        process.start()
    process.join()
    assert process.exitcode == 0
    return context


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """A few COCO 2017 photographs with annotations, in COCO's layout."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"no COCO photographs at {COCO_MINI}")
    return COCO_MINI


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, which is the working directory during the test."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
