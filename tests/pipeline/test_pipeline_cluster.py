"""Stage one on a Ray cluster of two nodes, on this machine's two cores; it survives what may fail.

.ci/cluster runs the slow tests, in an environment with the extra `cluster`.
"""

import itertools
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latent_t2i.pipeline import report, stage
from latent_t2i.pipeline.cluster import (
    Cluster,
    ShardActor,
    Slots,
    Task,
    Written,
    connect,
    count_slots,
    write_missing,
)
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.index import TokenizedRecord
from latent_t2i.pipeline.quantise import Quantiser
from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.pipeline.stage import build
from tests.cluster_faults import load_failing
from tests.coco_folders import CocoFolder, make_coco
from tests.in_process_ray import Call, InProcessRay, PreemptedError, RayError
from tests.stage_one import contents, make_config, run

NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
LIMIT_S = 300.0
"""Far more than any wait takes."""


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """A cluster of two nodes with one core each; this process is connected to it."""
    reason = "needs the extra cluster: pip install 'latent-t2i[cluster]'"
    ray = pytest.importorskip("ray", reason=reason)
    utilities = pytest.importorskip("ray.cluster_utils", reason=reason)
    cluster = utilities.Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return make_coco(tmp_path / "coco", [2] * 12 + [3] * 4)


@pytest.fixture
def config(folder: CocoFolder, tmp_path: Path) -> PipelineConfig:
    """Four shards of four images, in batches of one."""
    return make_config(folder, tmp_path / "out", executor="ray", records_per_shard=4, batch_size=1)


def build_locally(config: PipelineConfig) -> dict[str, bytes]:
    """Builds a set without Ray, in another folder, and returns its files."""
    out = Path(f"{config.out}-local")
    build(replace(config, executor="local", ray_address=None, out=str(out)))
    return contents(out)


@contextmanager
def fault(name: str, folder: Path) -> Iterator[None]:
    """Gives the actors encoders that fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_encoders", partial(load_failing, fault=name, folder=folder))
        yield


def wait_for(folder: Path, pattern: str, num: int) -> None:
    """Waits until a number of files exist; fails after LIMIT_S."""
    deadline_s = time.monotonic() + LIMIT_S
    while len([*folder.glob(pattern)]) < num:
        assert time.monotonic() < deadline_s, f"{folder}: expected {num} files {pattern}"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_bytes_are_those_of_a_local_run(
    nodes: Any, config: PipelineConfig, folder: CocoFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.images / "000000000002.png").write_text("no picture")
    config = replace(config, max_quarantined=0.5, text_dtype="int8", buckets=True)
    expected = build_locally(config)
    local = capsys.readouterr().out
    manifests = build(config)
    assert contents(Path(str(config.out))) == expected
    assert all(manifest.preprocessing["device"] == "cpu" for manifest in manifests.values())
    output = capsys.readouterr().out
    assert "images      16 in = 15 written + 1 quarantined" in output
    assert re.sub("free.*", "", output) == re.sub("free.*", "", local.replace("out-local", "out"))
    assert build(config) == manifests  # nothing to do


@pytest.mark.slow
def test_an_actor_is_killed_in_the_middle_of_a_shard(
    nodes: Any, config: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = build_locally(config)
    with fault("die_once", tmp_path):
        build(config)
    assert (tmp_path / "died").exists()
    assert re.search(r"shard-\d+\.tar: attempt 1 of 3 failed", capsys.readouterr().err)
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_node_is_removed(nodes: Any, config: PipelineConfig, tmp_path: Path) -> None:
    """The other node writes its shards; its actor has no node until the end of the run."""
    expected = build_locally(config)
    (node,) = nodes.worker_nodes
    (tmp_path / "wait").touch()

    def remove() -> None:
        try:
            wait_for(tmp_path, "started-*", 2)  # both actors are in the middle of their shards
            nodes.remove_node(node, allow_graceful=False)
        finally:
            (tmp_path / "wait").unlink()

    try:
        with fault("wait", tmp_path), ThreadPoolExecutor(1) as pool:
            removing = pool.submit(remove)
            build(config)
            removing.result()
    finally:
        nodes.add_node(**NODE)
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_an_encoder_that_always_dies_ends_the_run_with_the_shards_name(
    nodes: Any, config: PipelineConfig, folder: CocoFolder, tmp_path: Path
) -> None:
    Image.new("RGB", (72, 81)).save(folder.images / "000000000006.png")
    message = r"shard-000001\.tar: failed in each of 3 attempts, the last time with its actor died"
    with fault("die", tmp_path), pytest.raises(ValueError, match=message):
        build(config)
    assert not (tmp_path / "out/shard-000001.tar").exists()


@pytest.mark.slow
def test_the_driver_is_killed_and_started_again(
    nodes: Any, config: PipelineConfig, tmp_path: Path, forks: ForkServerContext
) -> None:
    expected = build_locally(config)
    config = replace(config, ray_address=nodes.address)
    assert run(forks, config, kill_at=("add", 2)) == -signal.SIGKILL  # at the second shard's end
    assert len([*tmp_path.glob("out/progress/shard-*.json")]) >= 2
    assert not (tmp_path / "out/manifest.json").exists()
    build(config)
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> InProcessRay:
    """Stands for the module, so that actors are objects of this process."""
    ray = InProcessRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def test_actors_write_the_bytes_of_a_local_run(
    ray: InProcessRay,
    config: PipelineConfig,
    folder: CocoFolder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also after a call whose actor died, and one whose answer was lost."""

    def lose(call: Call) -> None:
        name = f"{call.method} {len(seen)}"
        seen.append(name)
        if name in ("write 5", "write 7"):
            if name == "write 7":
                call.actor.write(*call.arguments)
            raise RayError("lost")

    seen: list[str] = []
    ray.before = lose
    (folder.images / "000000000002.png").write_text("no picture")
    config = replace(config, max_quarantined=0.5, text_dtype="int8")
    expected = build_locally(config)
    capsys.readouterr()
    manifests = build(config)
    assert contents(Path(str(config.out))) == expected
    output = capsys.readouterr()
    assert "images      16 in = 15 written + 1 quarantined" in output.out
    assert output.err.count(" of 3 failed: lost") == 2
    assert build(config) == manifests  # nothing to do


@pytest.mark.parametrize(
    ("error", "message", "num_restarted"),
    [
        (RuntimeError("no memory"), "3 attempts, the last time with RuntimeError: no memory", 2),
        (OSError("no answer"), "3 attempts, the last time with OSError: no answer", 0),
        (RayError("killed"), "3 attempts, the last time with its actor died", 0),
        (ValueError("not finite: use --vae"), "b: not finite: use --vae", 0),
    ],
)
def test_a_task_that_always_fails_ends_the_run_with_its_name(
    ray: InProcessRay, error: Exception, message: str, num_restarted: int
) -> None:
    """It is repeated alone on its actor, and the others are finished."""

    def fail(call: Call) -> None:
        if call.method == "apply" and call.arguments[1] == "b":
            shared.append(len(owner_of(call).running))
            raise error

    def owner_of(call: Call) -> Any:
        return next(m for m in cluster._members if m.handle.actor is call.actor)

    shared: list[int] = []
    ray.before = fail
    cluster = Cluster(ray, lambda device: FAKE_ENCODERS, "cpu", None)
    cluster.find_device()
    tasks = [Task(name, "apply", lambda name=name: (return_name, name)) for name in "abcdefgh"]
    done = []
    with pytest.raises(ValueError, match=message):
        done += [task.name for task, _ in cluster.run(tasks)]
    assert shared[1:] == [1] * (len(shared) - 1)
    assert len(shared) == (1 if isinstance(error, ValueError) else 3)
    assert ray.killed == [False] * num_restarted


def test_preempted_nodes_are_no_attempts(
    ray: InProcessRay, capsys: pytest.CaptureFixture[str]
) -> None:
    def preempt(call: Call) -> None:
        if call.method == "apply" and len(lost) < 5:
            lost.append(call)
            raise PreemptedError("the node was drained")

    lost: list[Call] = []
    ray.before = preempt
    cluster = Cluster(ray, lambda device: FAKE_ENCODERS, "cpu", None)
    assert cluster.apply(return_name, "a") == "a"
    assert len(lost) == 5
    assert capsys.readouterr().err.count("return_name: its node was preempted: the node was") == 5


def return_name(encoders: Any, name: str) -> str:
    return name


FAKE_ENCODERS: Any = SimpleNamespace(device_name="cpu", tf32=False)


def test_an_actor_without_encoders_is_not_used(
    ray: InProcessRay, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(device: torch.device) -> Any:
        if next(calls) < num_failing:
            raise OSError("no such disk")
        return FAKE_ENCODERS

    num_failing, calls = 1, itertools.count()
    cluster = Cluster(ray, load, "cpu", None)
    assert cluster.apply(return_name, "a") == "a"
    assert len(cluster._members) == 1
    assert "cannot load the encoders and is not used: no such disk" in capsys.readouterr().err
    num_failing, calls = 2, itertools.count()
    with pytest.raises(ValueError, match="no actor could load the encoders"):
        Cluster(ray, load, "cpu", None).apply(return_name, "a")


def test_actors_with_different_devices_are_refused(ray: InProcessRay) -> None:
    names = iter(["NVIDIA A100", "NVIDIA H100"])

    def load(device: torch.device) -> Any:
        return SimpleNamespace(device_name=next(names), tf32=True)

    cluster = Cluster(ray, load, "cpu", None)
    with pytest.raises(ValueError, match=r"different devices, .*A100.*H100.*one kind"):
        list(cluster.run([Task(name, "apply", lambda: (return_name, "a")) for name in "abc"]))


def test_the_clipped_values_of_a_process_are_its_largest_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two shards of one actor, the one that ended last may arrive first."""
    counts = [("a", (300, 3)), ("b", (50, 5)), ("a", (100, 2))]
    shards: Any = [
        (None, SimpleNamespace(folder=tmp_path, index=index, num_records=1, num_bytes=1))
        for index in range(len(counts))
    ]
    results = [Written(1, 0, (host, 1), count) for host, count in counts]
    cluster: Any = SimpleNamespace(run=lambda tasks: zip(tasks, results, strict=True))
    monkeypatch.setattr("latent_t2i.pipeline.cluster.find_missing", lambda *args: shards)
    monkeypatch.setattr("latent_t2i.pipeline.cluster.is_done", lambda shard: True)
    quantise = Quantiser(np.ones(4, np.float32))
    index: Any = None
    write_missing(shards, index, cluster, quantise=quantise, make_bar=report.no_bar)
    assert (quantise.num_values, quantise.num_saturated) == (350, 8)


@pytest.mark.parametrize("missing", ["--out", "--source"])
def test_a_path_that_a_node_does_not_see_is_named(tmp_path: Path, missing: str) -> None:
    paths = {"--out": tmp_path / "progress/provenance.json", "--source": tmp_path / "a.png"}
    for flag, path in paths.items():
        path.parent.mkdir(exist_ok=True)
        if flag != missing:
            path.touch()
    record = Record(key="a", locator=FileLocator(str(tmp_path / "a.png")), captions=(), extra={})
    task: Any = SimpleNamespace(
        shard=SimpleNamespace(folder=tmp_path),
        records=[TokenizedRecord(record, [])],
        has_first=True,
    )
    message = rf"{missing}: {paths[missing]} exists on the driver's node, but not on "
    with pytest.raises(ValueError, match=message):
        ShardActor(pytest.fail, 1, "/nowhere").write(task)


def node(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": resources}


def test_actors_are_counted_by_gpus_or_cores() -> None:
    cpus = [node(CPU=8.0), node(CPU=3.0), node()]
    assert count_slots(cpus, "auto", None) == Slots(11, 0, 1)
    assert count_slots(cpus, "auto", 4) == Slots(2, 0, 4)
    gpus = [*cpus, node(CPU=64.0, GPU=8.0), node(CPU=12.0, GPU=2.0)]
    assert count_slots(gpus, "auto", None) == Slots(10, 1, 6)
    assert count_slots(gpus, "cuda", 2) == Slots(10, 1, 2)
    assert count_slots(gpus, "cpu", None) == Slots(87, 0, 1)
    assert count_slots([node(CPU=1.0, GPU=4.0)], "auto", None) == Slots(4, 1, 0)


@pytest.mark.parametrize(
    ("device", "num_threads", "message"),
    [
        ("cuda", None, "--executor ray: the cluster's 1 nodes have no GPU"),
        ("auto", 4, "--executor ray: the cluster's 1 nodes have no node with 4 cores"),
        (
            "cuda:1",
            None,
            "--device: expected auto, cpu or cuda with --executor ray, found",
        ),
    ],
)
def test_a_cluster_without_the_devices_is_refused(
    device: str, num_threads: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        count_slots([node(CPU=2.0)], device, num_threads)


def test_settings_that_exclude_each_other(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--ray-address: 'auto' has no effect without --executor"):
        replace(config, executor="local", ray_address="auto")
    with pytest.raises(ValueError, match="expected a shared folder for --out, found 's3"):
        replace(config, out="s3://b/set")
    with pytest.raises(ValueError, match="--append: not available with --executor ray"):
        replace(config, append=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected one process, found WORLD_SIZE 2: Ray"):
        build(config)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'latent-t2i\[cluster\]'"):
        connect(None, lambda device: pytest.fail(), "cpu", None).__enter__()
