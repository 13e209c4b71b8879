"""Shards written in a thread of their own, so that encoding does not wait for the disk."""

import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from latent_t2i.pipeline.plan import Target
from latent_t2i.pipeline.workers import Outcome, Skipped
from latent_t2i.shards.schema import LatentKind
from latent_t2i.shards.writer import ShardWriter

MOST_WAITING = 4
"""Batches; more wait to be encoded, which bounds the memory."""


class WriterThread:
    """Writes outcomes in the order in which they are given; the shard that each is of is its tag.

    A shard has its name once its last outcome is written. Leaving the `with` block waits for all,
    or, after an error, discards the shard that is not finished.
    """

    def __init__(self, kind: LatentKind) -> None:
        self._kind: LatentKind = kind
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._waiting: deque[Future[None]] = deque()
        self._open = ExitStack()
        self._shard: ShardWriter | None = None
        self.num_bytes = 0
        """Of the shards that have their names."""
        self.num_shards = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._wait(0)
        finally:
            for future in self._waiting:
                future.cancel()
            self._pool.shutdown()
            self._open.__exit__(kind, error, trace)

    def put(self, outcome: Outcome) -> None:
        """Has an outcome written, soon. Raises what went wrong with an earlier one."""
        self._waiting.append(self._pool.submit(self._write, outcome))
        self._wait(MOST_WAITING)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _write(self, outcome: Outcome) -> None:
        target: Target = outcome.tag
        try:
            if self._shard is None:
                plan = target.plan
                writer = ShardWriter(target.folder, plan.index, plan.layout, self._kind)
                self._shard = self._open.enter_context(writer)
            for item in outcome.items:
                if isinstance(item, Skipped):
                    self._shard.quarantine(item.key, item.reason)
                else:
                    self._shard.write(item)
            if outcome.is_last:
                self._shard = None
                self._open.close()
                self.num_bytes += target.plan.num_bytes
                self.num_shards += 1
        except BaseException:
            self._open.__exit__(*sys.exc_info())  # discards it
            raise
