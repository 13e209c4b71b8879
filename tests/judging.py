"""Rows of images judged by a metric: at once, in batches, and by two processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import Any, TypeVar

from latent_t2i.evaluation.metrics.metric import Batch, Metric
from latent_t2i.evaluation.processes import Group

M = TypeVar("M", bound=Metric)


def split(batch: Batch, size: int) -> list[Batch]:
    """Returns a batch as smaller ones."""
    starts = range(0, len(batch.items), size)
    return [
        Batch(images=batch.images[i : i + size], items=batch.items[i : i + size]) for i in starts
    ]


def rotate_captions(batch: Batch) -> Batch:
    """Returns the images with the captions of the next image."""
    others = [*batch.items[1:], batch.items[0]]
    pairs = zip(batch.items, others, strict=True)
    return batch.with_items([replace(item, captions=o.captions) for item, o in pairs])


def judge(metric: M, *batches: Batch, group: Group | None = None) -> M:
    """Returns the metric after a row of these batches."""
    for batch in batches:
        metric.update(batch)
    metric.gather(group or Group())
    return metric


def judge_by_two(make: Callable[[], M], batches: Sequence[Batch]) -> M:
    """Returns the metric of the first of two processes that share the batches."""
    meeting = Barrier(2)
    values: list[Any] = [None, None]
    groups = [Threads(rank=rank, world_size=2, meeting=meeting, values=values) for rank in (0, 1)]
    metrics = [make(), make()]
    with ThreadPoolExecutor(2) as threads:
        first, second = (
            threads.submit(judge, metrics[rank], *batches[rank::2], group=groups[rank])
            for rank in (0, 1)
        )
    second.result()
    return first.result()


@dataclass(frozen=True, kw_only=True)
class Threads(Group):
    """A group whose processes are threads of this one."""

    meeting: Barrier
    values: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait(60)
        found = list(self.values)
        self.meeting.wait(60)
        return found
