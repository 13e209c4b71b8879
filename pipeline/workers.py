"""Decodes and encodes in parallel, with the results in order and the memory bounded.

Every distinct caption of a shard is encoded once, with the first batch that has it. On a CPU each
core processes whole batches, decoding included; on a GPU all cores decode and two streams encode.
No batch spans two shards, so a shard's bytes are a function of its own records. The cost: a caption
that occurs in two shards is encoded twice.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.pipeline.encode import CAPTIONS_PER_IMAGE, Encoders, encode_captions, encode_views
from latent_t2i.pipeline.images import (
    Picture,
    Preprocessing,
    UnreadableImageError,
    load,
    view_boxes,
)
from latent_t2i.pipeline.index import TokenizedRecord
from latent_t2i.pipeline.plan import ShardPlan
from latent_t2i.pipeline.sources.locators import LocatorError, read_image_bytes
from latent_t2i.pipeline.sources.record import Record, make_meta
from latent_t2i.shards.schema import Example

GPU_STREAMS = 2
JOBS_AHEAD = 2
"""Batches in progress per encoding thread, beyond the one whose result is awaited."""
NOT_FINITE = " is not finite in float"
"""Part of each reason to quarantine a record that is caused by a network, not by its image."""
Quantise = Callable[[NDArray[np.float16]], NDArray[np.int8]]
LoadResult = Picture | UnreadableImageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The records that are encoded together, all of one shard."""

    shard: ShardPlan
    records: Sequence[Record]
    captions: Sequence[Mapping[str, Sequence[int]]]
    """Token ids by caption that no earlier batch has, in batches of the text encoder."""
    last_uses: Sequence[str]
    """Captions that no later batch of the shard needs."""
    preprocessing: Preprocessing
    is_last: bool
    begun_ns: int
    """When the shard's first image began to be read."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A record that cannot be written, and why."""

    key: str
    reason: str


Arrays = Mapping[str, NDArray[Any]]
"""Arrays of one caption or one image by field."""


class EncodedCaption(NamedTuple):
    """A caption's arrays, whether it was truncated, and why it cannot be used."""

    arrays: Arrays
    is_cut: bool
    problem: str | None


class EncodedImage(NamedTuple):
    """A record with its arrays (views, ...), or with the error that its image raised."""

    record: Record
    picture: LoadResult
    arrays: Arrays


Encoded = tuple[dict[str, EncodedCaption], list[EncodedImage]]


class EncoderPool:
    """The threads of a process that decode and encode."""

    def __init__(
        self, encoders: Encoders, *, num_threads: int, quantise: Quantise | None = None
    ) -> None:
        self._encoders = encoders
        self._quantise = quantise
        self._on_gpu = encoders.device.type == "cuda"
        self._num_encoding = GPU_STREAMS if self._on_gpu else num_threads
        self._encoding = ThreadPoolExecutor(self._num_encoding, initializer=self._begin_thread)
        self._decoding = ThreadPoolExecutor(num_threads) if self._on_gpu else None
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in filter(None, (self._decoding, self._encoding)):
            pool.shutdown(cancel_futures=True)

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[Example | Skipped]]]:
        """Yields each batch with the results of its records, in order."""
        captions: dict[str, EncodedCaption] = {}
        for batch, (new_captions, images) in self._encoded(batches):
            captions |= new_captions
            yield batch, [_finish(image, captions) for image in images]
            for caption in batch.last_uses:  # bounds the memory to the captions of open batches
                del captions[caption]

    def _encoded(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        running: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            running.append((batch, self._submit(batch)))
            if len(running) > JOBS_AHEAD * self._num_encoding:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()

    def _submit(self, batch: Batch) -> Future[Encoded]:
        loads: list[Callable[[], LoadResult]]
        loads = [partial(load_record, record, batch.preprocessing) for record in batch.records]
        # On a CPU the encoding thread decodes too, so that no core waits for another.
        if self._decoding is not None:
            loads = [self._decoding.submit(load).result for load in loads]
        return self._encoding.submit(self._encode_batch, batch, loads)

    def _encode_batch(self, batch: Batch, loads: Sequence[Callable[[], LoadResult]]) -> Encoded:
        pictures = [load() for load in loads]
        pixels = [picture.pixels for picture in pictures if isinstance(picture, Picture)]
        with self._stream():
            fields = encode_views(self._encoders, np.stack(pixels, 1)) if pixels else {}
            captions: dict[str, EncodedCaption] = {}
            for group in batch.captions:
                captions |= self._encode_captions(group)
        numbers = itertools.count()
        images = [
            EncodedImage(
                record,
                picture,
                _item(fields, next(numbers)) if isinstance(picture, Picture) else {},
            )
            for record, picture in zip(batch.records, pictures, strict=True)
        ]
        return captions, images

    def _encode_captions(self, group: Mapping[str, Sequence[int]]) -> dict[str, EncodedCaption]:
        found = {}
        fields = encode_captions(self._encoders, group)
        max_tokens = self._encoders.text.max_tokens
        for index, (caption, token_ids) in enumerate(group.items()):
            # Copies, so that the batch's arrays are freed before the last of its captions.
            arrays = {name: items.copy() for name, items in _item(fields, index).items()}
            problem = _find_not_finite(arrays)
            if self._quantise and not problem:
                arrays["text"] = self._quantise(arrays["text"])
            found[caption] = EncodedCaption(arrays, len(token_ids) > max_tokens, problem)
        return found

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)
        if self._on_gpu:
            self._local.stream = torch.cuda.Stream(self._encoders.device)

    def _stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._local.stream) if self._on_gpu else nullcontext()


def load_record(record: Record, preprocessing: Preprocessing) -> LoadResult:
    """Returns a record's picture, or the error that says why there is none."""
    try:
        return load(read_image_bytes(record.locator), preprocessing, key=record.key)
    except (FileNotFoundError, LocatorError) as error:
        return UnreadableImageError(str(error))
    except UnreadableImageError as error:
        return error


def cut_batches(
    shard: ShardPlan,
    records: Sequence[TokenizedRecord],
    preprocessing: Preprocessing,
    batch_size: int,
) -> Iterator[Batch]:
    """Yields a shard's batches, each with the captions to encode for it."""
    token_ids: dict[str, Sequence[int]] = {}  # by distinct caption, in order of first appearance
    last_use: dict[str, int] = {}
    for position, (record, ids) in enumerate(records):
        token_ids |= zip(record.captions, ids, strict=True)
        last_use |= dict.fromkeys(record.captions, position // batch_size)
    remaining, batched = iter(token_ids.items()), set[str]()
    begun_ns = time.time_ns()
    for start in range(0, len(records), batch_size):
        part = [record for record, _ in records[start : start + batch_size]]
        own = dict.fromkeys(caption for record in part for caption in record.captions)
        captions = []
        # Captions of later records fill the last batch, so that all but one are full.
        while not own.keys() <= batched:
            captions.append(dict(islice(remaining, CAPTIONS_PER_IMAGE * batch_size)))
            batched.update(captions[-1])
        yield Batch(
            shard=shard,
            records=part,
            captions=captions,
            last_uses=[caption for caption in own if last_use[caption] == start // batch_size],
            preprocessing=preprocessing,
            is_last=start + batch_size >= len(records),
            begun_ns=begun_ns,
        )


def _finish(image: EncodedImage, captions: Mapping[str, EncodedCaption]) -> Example | Skipped:
    record, picture, arrays = image
    found = [captions[caption] for caption in record.captions]
    if isinstance(picture, UnreadableImageError):
        return Skipped(key=record.key, reason=str(picture))
    problems = (_find_not_finite(arrays), *(caption.problem for caption in found))
    if reason := next(filter(None, problems), None):
        return Skipped(key=record.key, reason=reason)
    of_captions = {name: np.stack([c.arrays[name] for c in found]) for name in found[0].arrays}
    extra = {**arrays, **of_captions}
    if len(picture.crops_px) > 1:
        extra["view_box"] = view_boxes(picture, len(arrays["latent"]))
    truncated = [index for index, caption in enumerate(found) if caption.is_cut]
    return Example(
        key=record.key,
        latent=extra.pop("latent"),
        text=extra.pop("text"),
        tokens=extra.pop("tokens"),
        meta=make_meta(record, truncated=truncated, picture=picture),
        extra=extra,
    )


def _item(fields: Arrays, index: int) -> dict[str, NDArray[Any]]:
    """Returns one item of a batch of each field."""
    return {name: items[index] for name, items in fields.items()}


def _find_not_finite(arrays: Arrays) -> str | None:
    """Returns the reason to quarantine arrays with NaN or infinity; None if there are none."""
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{name}{NOT_FINITE}{8 * values.itemsize}"
    return None
