"""Writes shards in a thread of their own, so that encoding does not wait for the disk."""

import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from latent_t2i.pipeline.workers import Batch, Skipped
from latent_t2i.shards.schema import Example, LatentKind
from latent_t2i.shards.writer import ShardWriter

MAX_PENDING_BATCHES = 4
"""`put` blocks while more than this many batches are unwritten, which bounds the memory."""


class WriterThread:
    """Writes batches in the order of `put`; a shard gets its name after its last batch.

    Leaving the `with` block waits until everything is written, or, after an error, discards the
    unfinished shard.
    """

    def __init__(self, kind: LatentKind) -> None:
        self._kind: LatentKind = kind
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._pending: deque[Future[None]] = deque()
        self._open = ExitStack()
        self._writer: ShardWriter | None = None
        self.num_bytes = 0
        """Size of the finished shards."""
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
                self._wait(max_pending=0)
        finally:
            for future in self._pending:
                future.cancel()
            self._pool.shutdown()
            self._open.__exit__(kind, error, trace)

    def put(self, batch: Batch, items: Sequence[Example | Skipped]) -> None:
        """Schedules the results of a batch for writing. Raises the error of an earlier one."""
        self._pending.append(self._pool.submit(self._write, batch, items))
        self._wait(MAX_PENDING_BATCHES)

    def _wait(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            self._pending.popleft().result()

    def _write(self, batch: Batch, items: Sequence[Example | Skipped]) -> None:
        shard = batch.shard
        try:
            if self._writer is None:
                writer = ShardWriter(shard.folder, shard.index, shard.layout, self._kind)
                self._writer = self._open.enter_context(writer)
            for item in items:
                if isinstance(item, Skipped):
                    self._writer.quarantine(item.key, item.reason)
                else:
                    self._writer.write(item)
            if batch.is_last:
                self._writer = None
                self._open.close()
                self.num_bytes += shard.num_bytes
                self.num_shards += 1
        except BaseException:
            self._open.__exit__(*sys.exc_info())  # discards the shard
            raise
