"""Decoding and encoding side by side, with the results in order and the memory bounded.

A shard's records are cut into batches, each with the captions that none before it had, so that
every distinct caption of a shard is encoded once. On a CPU each core takes whole batches, decoding
included, so that no core waits for another; on a GPU all cores decode, and two streams keep the GPU
at work. Results come in order, at most a few batches ahead of use, over the ends of shards too. No
batch crosses from one shard into the next and none depends on the timing: a shard's bytes are a
function of its own records. The price is that a caption of two shards is encoded twice.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from latent_t2i.pipeline.images import Picture, Preprocessing, UnreadableImageError, load
from latent_t2i.pipeline.sources.locators import LocatorError, read_image_bytes
from latent_t2i.pipeline.sources.record import Record, make_meta
from latent_t2i.shards.schema import Example

GPU_STREAMS = 2
JOBS_AHEAD = 2
"""For each thread that encodes."""
Quantise = Callable[[NDArray[np.float16]], NDArray[np.int8]]
Loaded = Picture | UnreadableImageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The records that are to be encoded together, of a shard that `tag` names."""

    tag: Any
    records: Sequence[Record]
    captions: Sequence[Sequence[str]]
    """Those that no batch of the shard had before, in batches of their own."""
    done_with: Sequence[str]
    """Captions that no later batch of the shard needs."""
    how: Preprocessing
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A record that cannot be written, and why."""

    key: str
    reason: str


class Text(NamedTuple):
    """An encoded caption."""

    hidden: NDArray[np.float16] | NDArray[np.int8]  # (T, D)
    tokens: NDArray[np.int32]  # (T,)
    is_cut: bool
    is_finite: bool


class Seen(NamedTuple):
    """A record's encoded picture, or why there is none."""

    record: Record
    picture: Loaded
    latent: NDArray[np.float16] | None  # (views, C', h, w)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What became of a batch's records, in order."""

    tag: Any
    items: list[Example | Skipped]
    is_last: bool


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

    def outcomes(self, batches: Iterable[Batch]) -> Iterator[Outcome]:
        """Yields what becomes of each batch, in order."""
        texts: dict[str, Text] = {}
        for batch, (fresh, seen) in self._results(batches):
            texts |= fresh
            yield Outcome(
                tag=batch.tag, items=[_item(found, texts) for found in seen], is_last=batch.is_last
            )
            for caption in batch.done_with:
                del texts[caption]

    def _results(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, "Encoded"]]:
        running: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            running.append((batch, self._submit(batch)))
            if len(running) > JOBS_AHEAD * self._num_encoding:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()

    def _submit(self, batch: Batch) -> "Future[Encoded]":
        loads: list[Callable[[], Loaded]]
        loads = [partial(load_record, record, batch.how) for record in batch.records]
        if self._decoding is not None:
            loads = [self._decoding.submit(load).result for load in loads]
        return self._encoding.submit(self._encode, batch, loads)

    def _encode(self, batch: Batch, loads: Sequence[Callable[[], Loaded]]) -> "Encoded":
        pictures = [load() for load in loads]
        pixels = [picture.pixels for picture in pictures if isinstance(picture, Picture)]
        with self._stream():
            latents = iter(encode_views(self._encoders, np.stack(pixels)) if pixels else ())
            texts: dict[str, Text] = {}
            for captions in batch.captions:
                texts |= self._encode_captions(captions)
        seen = [
            Seen(record, picture, next(latents) if isinstance(picture, Picture) else None)
            for record, picture in zip(batch.records, pictures, strict=True)
        ]
        return texts, seen

    def _encode_captions(self, captions: Sequence[str]) -> dict[str, Text]:
        texts = {}
        hidden, tokens, is_cut = encode_captions(self._encoders, captions)
        for index, caption in enumerate(captions):  # copies, so that the batch can go earlier
            text = hidden[index]
            is_finite = bool(np.isfinite(text).all())
            stored = self._quantise(text) if self._quantise and is_finite else text.copy()
            texts[caption] = Text(stored, tokens[index].copy(), bool(is_cut[index]), is_finite)
        return texts

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)
        if self._on_gpu:
            self._local.stream = torch.cuda.Stream(self._encoders.device)

    def _stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._local.stream) if self._on_gpu else nullcontext()


Encoded = tuple[dict[str, Text], list[Seen]]


def load_record(record: Record, how: Preprocessing) -> Loaded:
    """Returns a record's picture, or why there is none."""
    try:
        return load(read_image_bytes(record.locator), how, key=record.key)
    except (FileNotFoundError, LocatorError) as error:
        return UnreadableImageError(str(error))
    except UnreadableImageError as error:
        return error


def cut_batches(
    tag: Any, records: Sequence[Record], how: Preprocessing, batch_size: int
) -> Iterator[Batch]:
    """Yields a shard's batches, each with the captions that are to be encoded for it."""
    last_use = {
        caption: number // batch_size
        for number, record in enumerate(records)
        for caption in record.captions
    }
    waiting, asked = iter(last_use), set[str]()  # distinct, in order of first appearance
    parts = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    for number, part in enumerate(parts):
        mine = dict.fromkeys(caption for record in part for caption in record.captions)
        captions = []
        while not mine.keys() <= asked:
            captions.append(list(islice(waiting, CAPTIONS_PER_IMAGE * batch_size)))
            asked.update(captions[-1])
        yield Batch(
            tag=tag,
            records=part,
            captions=captions,
            done_with=[caption for caption in mine if last_use[caption] == number],
            how=how,
            is_last=number == len(parts) - 1,
        )


def _item(seen: Seen, texts: dict[str, Text]) -> Example | Skipped:
    record, picture, latent = seen
    found = [texts[caption] for caption in record.captions]
    if isinstance(picture, UnreadableImageError):
        return Skipped(key=record.key, reason=str(picture))
    if latent is None or not np.isfinite(latent).all():
        return Skipped(key=record.key, reason="latent is not finite in float16")
    if not all(text.is_finite for text in found):
        return Skipped(key=record.key, reason="text is not finite in float16")
    truncated = [index for index, text in enumerate(found) if text.is_cut]
    return Example(
        key=record.key,
        latent=latent,
        text=np.stack([text.hidden for text in found]),
        tokens=np.stack([text.tokens for text in found]),
        meta=make_meta(record, truncated=truncated, picture=picture),
    )
