"""What every test gets: no network, one thread, a fresh accelerate; for some photographs, forks."""

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

# Before anything imports huggingface_hub, which reads it once; subprocesses inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
FORKED = ["tests.shards.test_shards_faults", "tests.stage_one", "tests.train.process_groups"]
"""Modules whose functions run in processes of their own."""
COCO_MINI = ROOT.parent / "shared" / "data" / "coco-mini"


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Forgets the precision of an earlier test: accelerate keeps one for the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Starts processes that have imported everything already.

    From a server, of which a process can have one: the first to be asked decides what it imports.
    """
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
    """A few COCO 2017 photographs with their annotations, in COCO's layout."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"no COCO photographs at {COCO_MINI}")
    return COCO_MINI


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is the working directory during the test."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
