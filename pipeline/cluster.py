"""Stage one on a Ray cluster: one actor per GPU, or per core of a cluster without GPUs.

    python -m pipeline.run --config coco256 --executor ray --out /shared/coco256

This process, the driver, lists the source, plans the shards and merges their reports. The actors
load the encoders once and write into the output folder, which all nodes share. Ray restarts actors
that die, and the driver repeats their shards, whose bytes do not depend on the attempt. The cost:
the records of a shard travel through Ray, about a megabyte.
"""

import importlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.pipeline import report
from latent_t2i.pipeline.encode import Encoders, fixed_kernels
from latent_t2i.pipeline.growth import records_of
from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index, TokenizedRecord
from latent_t2i.pipeline.plan import SetPlan, ShardPlan
from latent_t2i.pipeline.quantise import Quantiser
from latent_t2i.pipeline.sets import is_done
from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.workers import EncoderPool, cut_batches
from latent_t2i.pipeline.writing import OutputCheck, WriterThread, find_missing, print_saturation
from latent_t2i.shards.remote.transport import is_remote
from latent_t2i.shards.schema import PROGRESS_DIR
from latent_t2i.shards.writer import PROVENANCE_NAME, read_report

TASKS_IN_FLIGHT = 2
"""Per actor: while one shard is flushed to disk and hashed, the other is encoded."""
MAX_ATTEMPTS = 3
"""A run ends if a shard fails this often. A repeated shard is alone on its actor.

A node that dies without notice counts: Ray's error is that of a process that a shard has killed.
"""
VISIBLE_S = 60.0
"""A network file system may take so long to show a file that another node has written."""
NOTICE_S = 60.0
LoadEncoders = Callable[[torch.device], Encoders]


class DeviceInfo(NamedTuple):
    """What the driver's plan needs to know of the actors' device."""

    device_name: str
    tf32: bool


class Slots(NamedTuple):
    """How many actors a cluster can hold, and the resources of each."""

    num_actors: int
    num_gpus: int
    num_cpus: int


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What an actor needs to write a shard."""

    shard: ShardPlan
    preprocessing: Preprocessing
    records: Sequence[TokenizedRecord]
    scale: NDArray[np.float32] | None
    """The scale of int8 text."""
    num_done: int
    """Finished shards of the run: they show that the networks work."""
    has_first: bool
    """Whether the file of the first record exists on the driver's node."""


class Written(NamedTuple):
    """The outcome of a shard."""

    num_records: int
    num_skipped: int
    process: tuple[str, int]
    counts: tuple[int, int]
    """How many values the process has converted to int8, and how many of them it clipped."""


class ShardActor:
    """Runs on a node: loads the encoders once, then writes shards, two at a time."""

    def __init__(self, load: Callable[[], Encoders], num_threads: int, working_folder: str) -> None:
        # Nothing here may fail: Ray repeats a constructor without limit.
        if Path(working_folder).is_dir():
            os.chdir(working_folder)  # relative paths mean the same as for the driver
        self._load = load
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._encoders: Encoders | None = None
        self._pool: EncoderPool | None = None
        self._quantise: Quantiser | None = None
        self._check = OutputCheck(0)
        self._kernels = ExitStack()

    def load(self) -> DeviceInfo:
        """Loads the encoders, unless they are loaded."""
        encoders = self._loaded()
        return DeviceInfo(encoders.device_name, encoders.tf32)

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns `function(encoders, *arguments)`."""
        return function(self._loaded(), *arguments)

    def write(self, task: ShardTask) -> Written:
        """Encodes and writes a shard, unless an earlier attempt has finished it."""
        require_shared(task)
        encoders, pool = self._loaded(), self._encoder_pool(task.scale)
        if done := read_report(task.shard.folder, task.shard.index):
            num_skipped = len(done.quarantined)
        else:
            num_skipped = 0
            self._check.num_good += task.num_done
            batches = cut_batches(task.shard, task.records, task.preprocessing, encoders.batch_size)
            with WriterThread(encoders.vae.kind, lambda shard: None) as writing:
                for batch, items in pool.encode(batches):
                    num_skipped += self._check.add(items)
                    writing.put(batch, items)
        counts = self._quantise and (self._quantise.num_values, self._quantise.num_saturated)
        process = os.uname().nodename, os.getpid()
        return Written(task.shard.num_records, num_skipped, process, counts or (0, 0))

    def _loaded(self) -> Encoders:
        with self._lock:
            if self._encoders is None:
                encoders = self._load()
                self._kernels.enter_context(fixed_kernels(tf32=encoders.tf32))
                self._encoders = encoders
            return self._encoders

    def _encoder_pool(self, scale: NDArray[np.float32] | None) -> EncoderPool:
        """Returns the threads that all shards share, so that a GPU holds no more batches."""
        encoders = self._loaded()
        with self._lock:
            if self._pool is None:
                self._quantise = None if scale is None else Quantiser(scale)
                self._pool = EncoderPool(
                    encoders, num_threads=self._num_threads, quantise=self._quantise
                )
            return self._pool


@dataclass(eq=False)
class Task:
    """A call of an actor's method."""

    name: str
    method: str
    make_arguments: Callable[[], tuple[Any, ...]]
    num_failed: int = 0


@dataclass(eq=False)
class Member:
    """An actor as the driver sees it."""

    handle: Any
    running: list[Task] = field(default_factory=list)
    is_ready: bool = False


class Cluster:
    """The actors of a run. Tasks of actors that die are repeated on any actor."""

    def __init__(self, ray: Any, load: LoadEncoders, device: str, num_threads: int | None) -> None:
        slots = count_slots([node for node in ray.nodes() if node["Alive"]], device, num_threads)
        load_here = partial(
            load, torch.device("cuda", 0) if slots.num_gpus else torch.device("cpu")
        )
        actor_class = ray.remote(ShardActor).options(
            num_gpus=slots.num_gpus,
            num_cpus=slots.num_cpus,
            max_restarts=-1,
            max_concurrency=TASKS_IN_FLIGHT,
        )
        self._ray = ray
        self._loading: dict[Any, Member] = {}
        self._device: DeviceInfo | None = None
        arguments = load_here, num_threads or max(slots.num_cpus, 1), str(Path.cwd())
        self._members = [Member(actor_class.remote(*arguments)) for _ in range(slots.num_actors)]
        for member in self._members:
            self._start_loading(member)

    def close(self) -> None:
        """Ends the actors."""
        for member in self._members:
            self._ray.kill(member.handle)

    def find_device(self) -> DeviceInfo:
        """Waits for the first actor and returns what its device is."""
        while self._device is None:
            self._end_loading(self._wait(self._loading))
        return self._device

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns `function(encoders, *arguments)`, which runs on one of the actors."""
        task = Task(function.__name__, "apply", lambda: (function, *arguments))
        return next(self.run([task]))[1]

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Runs tasks on the actors; yields each with its result, the first to finish first.

        Raises ValueError, with the task's name, if one fails MAX_ATTEMPTS times, or at once for a
        ValueError of its own; and if no actor can load the encoders.
        """
        new, waiting = iter(tasks), deque[Task]()
        running: dict[Any, tuple[Member, Task]] = {}
        while True:
            self._submit(new, waiting, running)
            if not running and not waiting:
                return
            ref = self._wait([*running, *self._loading])
            if ref in self._loading:
                self._end_loading(ref)
                continue
            member, task = running.pop(ref)
            member.running.remove(task)
            try:
                result = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                self._count_failure(member, task, error)
                waiting.appendleft(task)
            else:
                yield task, result

    def _submit(
        self, new: Iterator[Task], waiting: deque[Task], running: dict[Any, tuple[Member, Task]]
    ) -> None:
        """Gives tasks to the actors that have room for them."""
        while True:
            waiting.extend(islice(new, 0 if waiting else 1))
            member = self._find_free(waiting[0]) if waiting else None
            if member is None:
                return
            task = waiting.popleft()
            ref = getattr(member.handle, task.method).remote(*task.make_arguments())
            running[ref] = member, task
            member.running.append(task)

    def _find_free(self, task: Task) -> Member | None:
        """Returns the actor that is to run a task; None if it has to wait.

        A repeated task gets an actor of its own, so that it cannot make others fail with it.
        """
        limit = 1 if task.num_failed else TASKS_IN_FLIGHT
        free = [
            member
            for member in self._members
            if member.is_ready
            and len(member.running) < limit
            and not any(other.num_failed for other in member.running)
        ]
        return min(free, key=lambda member: len(member.running), default=None)

    def _count_failure(self, member: Member, task: Task, error: Any) -> None:
        """Prints why a task failed, and raises ValueError if that is final."""
        is_raised = isinstance(error, self._ray.exceptions.RayTaskError)
        cause = error.cause if is_raised else None
        if isinstance(cause, ValueError):
            raise ValueError(f"{task.name}: {cause}") from error
        if getattr(error, "preempted", False):  # its node was drained, so the shard is not to blame
            print(f"{task.name}: its node was preempted: {error}", file=sys.stderr)
            self._start_loading(member)
            return
        task.num_failed += 1
        print(
            f"{task.name}: attempt {task.num_failed} of {MAX_ATTEMPTS} failed: {error}",
            file=sys.stderr,
        )
        if task.num_failed == MAX_ATTEMPTS:
            found = f"{type(cause).__name__}: {cause}" if is_raised else "its actor died"
            raise ValueError(
                f"{task.name}: failed in each of {MAX_ATTEMPTS} attempts, the last time with "
                f"{found}; the finished shards are kept, and the same command continues"
            ) from error
        if is_raised and not isinstance(cause, OSError):
            # A GPU cannot be used any more after some errors, except by a new process.
            self._ray.kill(member.handle, no_restart=False)
        if not isinstance(cause, OSError):
            self._start_loading(member)

    def _start_loading(self, member: Member) -> None:
        """Loads the encoders on a new or restarted actor; while it has no node, this waits."""
        if member not in self._loading.values():
            load = member.handle.load.options(max_task_retries=MAX_ATTEMPTS - 1)
            self._loading[load.remote()] = member
        member.is_ready = False

    def _end_loading(self, ref: Any) -> None:
        member = self._loading.pop(ref)
        try:
            device = DeviceInfo(*self._ray.get(ref))
        except self._ray.exceptions.RayError as error:
            print(f"an actor cannot load the encoders and is not used: {error}", file=sys.stderr)
            self._members.remove(member)
            self._ray.kill(member.handle)
            if not self._members:
                raise ValueError("--executor ray: no actor could load the encoders") from error
            return
        if self._device not in (None, device):
            raise ValueError(
                f"--executor ray: the actors have different devices, {self._device} and {device}, "
                "but a set is encoded on one kind: use a cluster with one kind of GPU, or "
                "--device cpu"
            )
        self._device, member.is_ready = device, True

    def _wait(self, refs: Iterable[Any]) -> Any:
        """Waits for the first of some calls to end."""
        while True:
            done, _ = self._ray.wait([*refs], num_returns=1, timeout=NOTICE_S)
            if done:
                return done[0]
            if not any(member.is_ready for member in self._members):
                print("waiting for the cluster: no actor is running", file=sys.stderr)


@contextmanager
def connect(
    address: str | None, load: LoadEncoders, device: str, num_threads: int | None
) -> Iterator[Cluster]:
    """Starts the actors on a cluster, temporarily.

    `load` loads the encoders to a device. Raises ValueError without Ray, for an address without a
    cluster, and for a cluster without the devices.
    """
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ValueError(
            "--executor ray needs ray, which is not installed: pip install 'latent-t2i[cluster]'"
        ) from error
    with ExitStack() as stack:
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(address=address)
            except ConnectionError as error:
                raise ValueError(f"--ray-address: no cluster at {address!r}: {error}") from error
            stack.callback(ray.shutdown)
        cluster = Cluster(ray, load, device, num_threads)
        stack.callback(cluster.close)
        yield cluster


def count_slots(nodes: Sequence[Mapping[str, Any]], device: str, num_threads: int | None) -> Slots:
    """Returns one actor per GPU, with its share of the cores, or one per `num_threads` cores.

    Raises ValueError if the cluster has none of these.
    """
    found = [node["Resources"] for node in nodes]
    cores, gpus = ([int(node.get(kind, 0)) for node in found] for kind in ("CPU", "GPU"))
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"--device: expected auto, cpu or cuda with --executor ray, found {device!r}: Ray "
            "chooses the GPUs"
        )
    if device == "cuda" or (device == "auto" and any(gpus)):
        shares = [num // gpus[node] for node, num in enumerate(cores) if gpus[node]]
        slots = Slots(sum(gpus), 1, num_threads or min(shares, default=0))
    else:
        num_cpus = num_threads or 1
        slots = Slots(sum(num // num_cpus for num in cores), 0, num_cpus)
    if not slots.num_actors:
        wanted = "GPU" if slots.num_gpus else f"node with {slots.num_cpus} cores"
        raise ValueError(f"--executor ray: the cluster's {len(nodes)} nodes have no {wanted}")
    return slots


def write_missing(
    shards: Sequence[tuple[SetPlan, ShardPlan]],
    index: Index,
    cluster: Cluster,
    *,
    quantise: Quantiser | None,
    make_bar: report.Bar,
) -> int:
    """Does what `writing.write_missing` does, on the actors."""
    missing = find_missing(shards, index)
    total = sum(shard.num_records for _, shard in missing)
    num_before = len(shards) - len(missing)
    by_name = {str(shard_path(shard)): (part, shard) for part, shard in missing}
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    num_bytes = num_encoded = 0

    def arguments(name: str) -> tuple[ShardTask]:
        return (make_task(*by_name[name], index, quantise, num_before),)

    with make_bar(total, "image", "encode") as bar:
        meter = report.Meter(bar, total)
        tasks = (Task(name, "write", partial(arguments, name)) for name in by_name)
        for num_shards, (task, result) in enumerate(cluster.run(tasks), 1):
            written = Written(*result)
            num_bytes += by_name[task.name][1].num_bytes
            meter.add(
                written.num_records,
                written.num_skipped,
                num_bytes=num_bytes,
                num_shards=num_shards,
            )
            num_encoded += written.num_records - written.num_skipped
            # Results of a process may arrive in another order than its counts grew.
            counts[written.process] = max(counts.get(written.process, (0, 0)), written.counts)
    deadline_s = time.monotonic() + VISIBLE_S
    for _, shard in missing:
        while not is_done(shard) and time.monotonic() < deadline_s:
            time.sleep(0.5)
    if quantise is not None and counts:
        quantise.num_values, quantise.num_saturated = map(sum, zip(*counts.values(), strict=True))
    print_saturation(quantise)
    return num_encoded


def make_task(
    part: SetPlan, shard: ShardPlan, index: Index, quantise: Quantiser | None, num_done: int
) -> ShardTask:
    """Returns a shard's task, with its records."""
    records = records_of(index, shard)
    return ShardTask(
        shard=replace(shard, folder=shard.folder.absolute()),
        preprocessing=part.preprocessing,
        records=records,
        scale=None if quantise is None else quantise.scale,
        num_done=num_done,
        has_first=records[0].record.key not in index.missing,
    )


def shard_path(shard: ShardPlan) -> Path:
    """Returns the path of a shard."""
    return shard.folder / f"shard-{shard.index:06d}.tar"


def require_shared(task: ShardTask) -> None:
    """Raises ValueError if this node does not see the output folder or the local images."""
    locator = task.records[0].record.locator
    image = locator.path if isinstance(locator, FileLocator) else locator.url
    needed = {"--out": task.shard.folder / PROGRESS_DIR / PROVENANCE_NAME}
    if task.has_first and not is_remote(image):
        needed["--source"] = Path(image)
    for flag, path in needed.items():
        if not path.exists():
            raise ValueError(
                f"{flag}: {path} exists on the driver's node, but not on {os.uname().nodename}: "
                "all nodes must see this path, for example on a shared file system"
            )
