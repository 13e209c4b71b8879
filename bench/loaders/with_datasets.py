"""Hugging Face datasets: Arrow files with a column per caption, so that one can be read alone.

`Arrays` uses its array types in numpy format, a batch at a time, grouped by caption: 2,300
records/s (77 tokens, float16) and 3,700 (32, int8). These were slower: its torch format (900), all
captions in one Array3D column (1,000 and 2,200), fixed-size lists (1,100), and record by record
(1,500 and 1,900). `Bytes` is tuned by hand: it stores bare bytes and the caller knows shape and
dtype, so a record is a view of the mapped file.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, RandomSampler

from bench.loaders.contents import BATCH_SIZE, ITEMS, NUM_CAPTIONS, Batch, Content, split_record

# Passes over the records in one epoch, so that no turn contains the end of an epoch.
PASSES = 1000
Part = tuple[NDArray[np.int64], list[NDArray[Any]]]


class Arrays:
    """Arrow files of datasets' array types."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes all records in the loader's format."""
        text = datasets.Array2D(shape=content.shapes["text"][1:], dtype=content.text_dtype)
        tokens = datasets.List(datasets.Value("int32"), length=content.max_tokens)
        kinds = {"text": text, "tokens": tokens}
        features = {"latent": datasets.Array4D(shape=content.shapes["latent"], dtype="float16")} | {
            f"{name}{caption}": kinds[name] for name in ITEMS for caption in range(NUM_CAPTIONS)
        }
        _write(folder, content, features, bare=False)

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches forever."""
        yield from _load(_ArrayRows(folder, "numpy"), _merge, num_workers)


class Bytes:
    """Arrow files of bare bytes."""

    def write(self, folder: Path, content: Content) -> None:
        """Writes all records in the loader's format."""
        names = ["latent", *(f"{name}{n}" for name in ITEMS for n in range(NUM_CAPTIONS))]
        binary = datasets.Value("large_binary")
        _write(folder, content, dict.fromkeys(names, binary), bare=True)

    def batches(self, folder: Path, content: Content, num_workers: int) -> Iterator[Batch]:
        """Yields shuffled batches forever."""

        def join(rows: list[list[memoryview]]) -> Batch:
            tensors = []
            for name, parts in zip(content.shapes, zip(*rows, strict=True), strict=True):
                numbers = np.frombuffer(bytearray().join(parts), content.dtypes[name])
                shape = len(rows), *content.shapes[name][1:]
                tensors.append(torch.from_numpy(numbers).reshape(shape))
            return Batch(*tensors)

        pyarrow.set_cpu_count(1)
        yield from _load(_ByteRows(folder, "arrow"), join, num_workers)


def _write(folder: Path, content: Content, features: dict[str, Any], *, bare: bool) -> None:
    temporary = folder.with_name(f"{folder.name}.part")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(
        _samples,
        gen_kwargs={"content": content, "bare": bare},
        features=datasets.Features(features),
        cache_dir=str(temporary),
        writer_batch_size=32,
    )
    dataset.save_to_disk(str(folder), max_shard_size="100MB")
    shutil.rmtree(temporary)


def _samples(content: Content, bare: bool) -> Iterator[dict[str, Any]]:
    for number in range(content.num_records):
        fields = split_record(content, number)
        yield {name: array.tobytes() for name, array in fields.items()} if bare else fields


class _Rows(Dataset[Any]):
    """One view of the data set per caption, with that caption's columns."""

    def __init__(self, folder: Path, format: str) -> None:
        whole = datasets.load_from_disk(str(folder)).with_format(format)
        self._views = [
            whole.select_columns(["latent", f"text{n}", f"tokens{n}"]) for n in range(NUM_CAPTIONS)
        ]

    def __len__(self) -> int:
        return len(self._views[0])


class _ArrayRows(_Rows):
    def __getitems__(self, indices: Sequence[int]) -> list[Part]:
        """Returns a batch in parts, one per caption: positions in the batch, and columns."""
        captions = np.random.default_rng().integers(NUM_CAPTIONS, size=len(indices))
        parts = []
        for caption, view in enumerate(self._views):
            positions = np.flatnonzero(captions == caption)
            columns = view[np.asarray(indices)[positions]]
            names = ("latent", f"text{caption}", f"tokens{caption}")
            latent, text, tokens = (columns[name] for name in names)
            parts.append((positions, [latent[:, 0], text, tokens]))
        return parts


def _merge(parts: list[Part]) -> Batch:
    merged = []
    for number in range(len(Batch._fields)):
        first = parts[0][1][number]
        whole = np.empty((BATCH_SIZE, *first.shape[1:]), first.dtype)
        for positions, columns in parts:
            whole[positions] = columns[number]
        merged.append(torch.from_numpy(whole))
    return Batch(*merged)


class _ByteRows(_Rows):
    def __getitem__(self, index: int) -> list[memoryview]:
        row = self._views[random.randrange(NUM_CAPTIONS)][index]
        return [memoryview(column.chunk(0)[0].as_buffer()) for column in row.columns]


def _load(rows: Any, collate: Any, num_workers: int) -> Iterator[Batch]:
    loader: DataLoader[Batch] = DataLoader(
        rows,
        batch_size=BATCH_SIZE,
        sampler=RandomSampler(rows, num_samples=PASSES * len(rows)),
        collate_fn=collate,
        drop_last=True,
        num_workers=num_workers,
    )
    while True:
        yield from loader
