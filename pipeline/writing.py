"""Encodes the unfinished shards and writes them in a background thread.

Encoding does not wait for the disk; `MAX_PENDING_BATCHES` bounds the memory.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from latent_t2i.pipeline import report
from latent_t2i.pipeline.encode import Encoders, single_threaded
from latent_t2i.pipeline.growth import is_edited, may_be_edited, records_of
from latent_t2i.pipeline.images import Picture, Preprocessing
from latent_t2i.pipeline.index import Index
from latent_t2i.pipeline.plan import SetPlan, ShardPlan
from latent_t2i.pipeline.quantise import Quantiser
from latent_t2i.pipeline.sets import is_done
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.pipeline.upload import Mirror
from latent_t2i.pipeline.workers import (
    NOT_FINITE,
    Batch,
    EncoderPool,
    Skipped,
    cut_batches,
    load_record,
)
from latent_t2i.shards.extend import read_rows, row_example, row_json, row_key
from latent_t2i.shards.schema import Example, LatentKind
from latent_t2i.shards.writer import ShardReport, ShardWriter, discard_shard, read_report

MAX_PENDING_BATCHES = 4
"""`put` blocks while more than this many batches are unwritten."""
MAX_FAILURES = 4
"""A run stops if the outputs of its first images, at least this many, are all not finite."""


class OutputCheck:
    """Stops a run whose first outputs are all not finite.

    Otherwise broken weights would be noticed after hours, as too many quarantined images.
    """

    def __init__(self, num_good: int) -> None:
        self.num_good = num_good
        """Images, or finished shards, that show that the networks work."""
        self._failures: list[str] = []

    def add(self, items: Sequence[Example | Skipped]) -> int:
        """Returns how many of a batch's results are quarantined. Raises ValueError to stop."""
        reasons = [item.reason for item in items if isinstance(item, Skipped)]
        self.num_good += len(items) - len(reasons)
        if not self.num_good:
            self._failures += [reason for reason in reasons if NOT_FINITE in reason]
            if len(self._failures) >= MAX_FAILURES:
                raise ValueError(
                    f"{self._failures[0]} for each of the first {len(self._failures)} images: use "
                    "--vae-dtype float32, or another --vae or --text-encoder"
                )
        return len(reasons)


class WriterThread:
    """Writes batches in the order of `put`; a shard gets its name after its last batch.

    Leaving the `with` block waits until everything is written, or, after an error, discards the
    unfinished shard.
    """

    def __init__(self, kind: LatentKind, on_shard: Callable[[ShardPlan], None]) -> None:
        """`on_shard` is called with each finished shard, in the thread."""
        self._kind: LatentKind = kind
        self._on_shard = on_shard
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing")  # one: keeps the order
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
                writer = ShardWriter(
                    shard.folder, shard.index, shard.layout, self._kind, begun_ns=batch.begun_ns
                )
                self._writer = self._open.enter_context(writer)
            for item in items:
                if isinstance(item, Skipped):
                    self._writer.quarantine(item.key, item.reason)
                else:
                    self._writer.write(item)
            if batch.is_last:
                for example in kept_examples(shard):
                    self._writer.write(example)
                self._writer = None
                self._open.close()
                self._on_shard(shard)
                self.num_bytes += shard.num_bytes
                self.num_shards += 1
        except BaseException:
            self._open.__exit__(*sys.exc_info())  # discards the shard
            raise


def write_missing(
    shards: Sequence[tuple[SetPlan, ShardPlan]],
    index: Index,
    encoders: Encoders,
    *,
    quantise: Quantiser | None,
    num_threads: int,
    make_bar: report.Bar,
    mirror: Mirror | None = None,
) -> int:
    """Encodes and writes the shards that are unfinished or have a restored or edited image.

    With a `mirror`, finished shards are put at its URL, in the background. Returns the number of
    images that were encoded. Raises ValueError if the networks' outputs are all not finite.
    """
    missing = find_missing(shards, index, mirror)
    total = sum(shard.num_records - shard.num_kept for _, shard in missing)
    num_encoded = 0
    with (
        single_threaded(),
        EncoderPool(encoders, num_threads=num_threads, quantise=quantise) as pool,
        WriterThread(encoders.vae.kind, mirror.put if mirror else lambda shard: None) as writing,
        make_bar(total, "image", "encode") as bar,
    ):
        meter = report.Meter(bar, total)
        check = OutputCheck(len(shards) - len(missing))
        for batch, items in pool.encode(read_batches(missing, index, encoders.batch_size)):
            num_skipped = check.add(items)
            num_encoded += len(items) - num_skipped
            writing.put(batch, items)
            meter.add(
                len(items),
                num_skipped,
                num_bytes=writing.num_bytes,
                num_shards=writing.num_shards,
            )
    print_saturation(quantise)
    return num_encoded


def find_missing(
    shards: Sequence[tuple[SetPlan, ShardPlan]], index: Index, mirror: Mirror | None = None
) -> list[tuple[SetPlan, ShardPlan]]:
    """Returns the shards that are unfinished or have a restored or edited image."""
    for part, shard in shards:
        discard_if_outdated(index, part, shard, mirror)
    return [(part, shard) for part, shard in shards if not is_done(shard)]


def print_saturation(quantise: Quantiser | None) -> None:
    """Prints which share of the text's values was clipped in int8, if any was."""
    if quantise and quantise.num_saturated:
        print(
            f"text: {quantise.share_saturated:.1e} of the values encoded in this run were outside "
            "the sample's range and were clipped"
        )


def discard_if_outdated(
    index: Index, part: SetPlan, shard: ShardPlan, mirror: Mirror | None
) -> None:
    """Discards a shard of an unfinished set if one of its images was restored or edited since."""
    found = read_report(part.folder, shard.index)
    if found is None:
        return
    records = [record for record, _ in records_of(index, shard)]
    if not any(is_restored(record, found.quarantined, part.preprocessing) for record in records):
        key = find_edited(part.folder, found, records, mirror) if found.records else None
        if key is None:
            return
        print(f"{found.name} is encoded again: the image of {key} has changed since")
    discard_shard(part.folder, found)
    if mirror is not None:
        mirror.discard(shard)


def is_restored(
    record: Record, quarantined: Mapping[str, str], preprocessing: Preprocessing
) -> bool:
    """Returns whether an image can be read now that could not."""
    reason = quarantined.get(record.key)
    # Images whose values are not finite are readable, and would be encoded on every restart.
    if reason is None or NOT_FINITE in reason:
        return False
    return isinstance(load_record(record, preprocessing), Picture)


def find_edited(
    folder: Path, found: ShardReport, records: Sequence[Record], mirror: Mirror | None
) -> str | None:
    """Returns the key of an image that has changed since a shard was encoded."""
    path = folder / found.name
    since_ns = found.begun_ns if mirror else path.stat().st_mtime_ns
    suspects = {record.key: record for record in records if may_be_edited(record, since_ns)}
    if not suspects:
        return None
    with mirror.fetched(path) if mirror else nullcontext():
        for row in read_rows(path, found.layout, found.records):
            record = suspects.get(row_key(row))
            if record is not None and is_edited(record, row_json(row, found.layout)):
                return record.key
    return None


def kept_examples(shard: ShardPlan) -> Iterator[Example]:
    """Yields the records of a replaced shard that are copied."""
    if old := shard.replaces:
        for row in read_rows(old.path, old.layout, old.num_records)[list(old.kept)]:
            yield row_example(row, old.layout)


def read_batches(
    shards: Sequence[tuple[SetPlan, ShardPlan]], index: Index, batch_size: int
) -> Iterator[Batch]:
    """Yields the batches of some shards, reading the records of one shard at a time."""
    for part, shard in shards:
        records = records_of(index, shard)
        yield from cut_batches(shard, records, part.preprocessing, batch_size)
