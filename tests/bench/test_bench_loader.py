"""The loader benchmark: every loader delivers the records written, and the figures add up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.loaders.contenders import ENTRIES, missing
from bench.loaders.contents import BATCH_SIZE, NUM_CAPTIONS, Batch, Content, check, record
from bench.loaders.opening import evict, measure, resident_bytes
from bench.loaders.rounds import ROOT, Result, Runner, Timing, run
from bench.loaders.serve import deliver, start
from bench.loaders.store import main as store

TINY = Content(name="tiny", max_tokens=3, text_dtype="int8", latent_px=2, num_records=512)
PEERS = [name for name, entry in ENTRIES.items() if entry.package]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny content as shards."""
    path = tmp_path_factory.mktemp("bench")
    store(["copy", "map", "stream", "two-sets"], TINY, path)
    return path


@pytest.mark.parametrize("name", ["map", "two-sets", "cache", "stream"])
def test_own_loaders_deliver_the_records(folder: Path, name: str) -> None:
    path = folder / ENTRIES[name].store
    batches, figures = start(name, TINY, path, 0)  # start() checks three batches
    assert figures["first_batch_s"] > 0
    delivered = deliver(batches, 0.0, 2)
    batches.close()
    assert delivered["records"] == 2 * BATCH_SIZE
    assert delivered["anonymous_bytes"] > 1e6


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_deliver_the_records(tmp_path: Path, name: str) -> None:
    if reason := missing([name]):
        pytest.skip(reason[name])
    flags = f"--quick --parts contents --turn 0.01 --contenders {name} --records 256 --rounds 1"
    command = [sys.executable, "bench/loader.py", *flags.split(), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["contents"]["77-float16"]["one_process"][name]["records_per_s"] > 0
    assert not [*tmp_path.iterdir()], "the temporary folder is removed"


def tiny_batch() -> Batch:
    """A valid batch with its records in reverse order."""
    rows = [(record(TINY, 300 - number), number % NUM_CAPTIONS) for number in range(BATCH_SIZE)]
    return Batch(
        latent=torch.stack([torch.tensor(fields["latent"][0]) for fields, _ in rows]),
        text=torch.stack([torch.tensor(fields["text"][caption]) for fields, caption in rows]),
        tokens=torch.stack([torch.tensor(fields["tokens"][caption]) for fields, caption in rows]),
    )


def test_check_finds_wrong_batches() -> None:
    check(TINY, tiny_batch())
    for field in ("latent", "text"):
        wrong = tiny_batch()
        getattr(wrong, field)[32, 0, 0] += 1
        with pytest.raises(ValueError, match="record 268: wrong value"):
            check(TINY, wrong)
    sorted_batch = Batch(*(tensor.flip(0) for tensor in tiny_batch()))
    with pytest.raises(ValueError, match="not shuffled"):
        check(TINY, sorted_batch)
    one_caption = tiny_batch()
    one_caption.tokens[:, 1] = 0
    with pytest.raises(ValueError, match=r"captions \{0\}"):
        check(TINY, one_caption)


@pytest.mark.slow
def test_turns_run_in_subprocesses(folder: Path) -> None:
    runners = [Runner(name="copy"), Runner(name="map", num_threads=2)]
    folders = {"copy": folder, "map": folder / "shards"}
    timing = Timing(rounds=2, turn_s=0.02, warm_up_s=0.0, start_together=True)
    results = run(runners, TINY, folders, timing)
    assert list(results) == ["copy", "map, 2 threads"]
    assert all(len(result.rates) == 2 and min(result.rates) > 0 for result in results.values())


def test_ratios_compare_turns_of_one_round() -> None:
    def result(*records: int) -> Result:
        turns = [{"records": number, "seconds": 2.0} for number in records]
        return Result(start={}, turns=turns)

    fast, slow = result(40, 400, 60), result(10, 100, 60)  # both were faster in the second round
    assert fast.times(slow) == 4
    assert fast.rate == 30


def test_opening_reads_no_shard(folder: Path) -> None:
    paths = sorted((folder / "shards").glob("*.tar"))
    whole = sum(path.stat().st_size for path in paths)
    for path in paths:
        evict(path)
    if resident_bytes(paths):
        pytest.skip("this file system keeps files in memory")
    figures = measure(folder / "shards", paths)
    assert figures["opening_bytes"] == 0 < figures["first_batch_bytes"] <= whole + 4096 * len(paths)


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing(["map", "litdata"]) == {
        "litdata": "litdata is not installed: see docs/benchmarks.md"
    }


def test_gpu_script_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "error: no GPU that torch can use\n")


def test_gpu_script_refuses_unknown_parts() -> None:
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "PARTS": "smoke steps128"}
    done = subprocess.run(
        ["bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: PARTS: found steps128, expected smoke, steps512")
