"""Several sets of one latent shape as one: their records are numbered one set after the other.

    shards = UnionShards(["a", "b"], [open_shards("shards/a"), open_shards("shards/b")])
    order = shards.order(batch_size=256, seed=0)  # that of one set with all shards

A batch with records of several sets is gathered set by set. The cost: mapped rows are then copied
one by one, instead of by one indexed copy.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.mixed_order import MixedOrder
from latent_t2i.shards.order import Cursor, Order
from latent_t2i.shards.reader import RawBatch, ShardSet
from latent_t2i.shards.schema import FormatError, Manifest

SAME = (
    "vae",
    "text_encoder",
    "tokenizer",
    "latent_kind",
    "latent_channels",
    "num_views",
    "text_dtype",
    "max_tokens",
    "text_width",
    "text_scale",
)
"""Manifest keys that must be equal in sets that are one."""


class UnionShards:
    """The records of several sets, numbered from 0 in the order of the sets."""

    def __init__(self, names: Sequence[str], sets: Sequence[ShardSet]) -> None:
        """Raises FormatError if the sets differ in more than their records."""
        self.names = tuple(names)
        self.sets = tuple(sets)
        require_same([(name, part.manifest) for name, part in zip(names, sets, strict=True)])
        _require_same_fields(names, sets)
        self._starts = np.cumsum([0, *map(len, sets)])
        self._first_shards = np.cumsum([0, *(len(part.manifest.shards) for part in sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def manifest(self) -> Manifest:
        """The first set's manifest. Use it only for what all sets have in common."""
        return self.sets[0].manifest

    @property
    def empty_text(self) -> Tensor:
        """Hidden states (T, D) float16 of the empty prompt, from the first set."""
        return self.sets[0].empty_text

    @property
    def text_scale(self) -> Tensor | None:
        """Scale (D,) float32 of int8 text, the same for all sets."""
        return self.sets[0].text_scale

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one view of a stored latent, the same for all sets."""
        return self.sets[0].latent_shapes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of an item of each field of a batch, the same for all sets."""
        return self.sets[0].shapes

    @property
    def field_scales(self) -> dict[str, Tensor]:
        """Scales of further int8 fields, the same for all sets."""
        return self.sets[0].field_scales

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Number of records of each shard (num_shards,), set by set."""
        return np.concatenate([part.shard_sizes for part in self.sets])

    def order(self, *, batch_size: int, seed: int, **settings: Any) -> Order:
        """Returns the order of one set with all shards; `settings` are those of Order."""
        return Order(sizes=self.shard_sizes, batch_size=batch_size, seed=seed, **settings)

    def mixed_order(self, weights: Sequence[float], **settings: Any) -> MixedOrder:
        """Returns an order with a weight per set; `settings` are those of MixedOrder."""
        sizes = tuple(part.shard_sizes for part in self.sets)
        return MixedOrder(parts=sizes, weights=tuple(weights), **settings)

    def buffer(self, size: int, *, pin_memory: bool = False) -> RawBatch:
        """Returns an uninitialised batch of `size` records, to gather into."""
        return self.sets[0].buffer(size, pin_memory=pin_memory)

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
    ) -> RawBatch:
        """Like `ShardSet.gather`, for records of any of the sets."""
        out = self.buffer(len(records)) if out is None else out
        for number, rows, local in self._by_set(records):
            self.gather_rows(number, local, caption_u, view_u, rows, out)
        return out

    def gather_rows(
        self,
        number: int,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        rows: NDArray[np.int64],
        out: RawBatch,
    ) -> None:
        """Gathers the records (N,) of one set, by its own numbers, into `rows` (N,) of a batch.

        `caption_u` and `view_u` are those of the whole batch.
        """
        everywhere = len(rows) == len(out)
        self.sets[number].gather(
            records, caption_u[rows], view_u[rows], out, None if everywhere else rows
        )

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Returns `KEY of SET` for some records, in that order: keys may repeat between sets."""
        names = np.empty(len(records), object)
        for number, rows, local in self._by_set(records):
            keys = self.sets[number].keys(local)
            names[rows] = [f"{key} of {self.names[number]}" for key in keys]
        return list(names)

    def shards_of(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the index of the shard of each record, counted over all sets."""
        shards = np.empty(len(records), np.int64)
        for number, rows, local in self._by_set(records):
            shards[rows] = self._first_shards[number] + self.sets[number].shards_of(local)
        return shards

    def advance(self, order: Order, cursor: Cursor) -> None:
        """Announces the upcoming cursor in an order of all sets to those that download shards."""
        for part, bounds in zip(self.sets, pairwise(self._first_shards.tolist()), strict=True):
            part.advance(order, cursor, slice(*bounds))

    def finish_verification(self) -> None:
        """Like `ShardSet.finish_verification`, for all sets."""
        for part in self.sets:
            part.finish_verification()

    def _by_set(
        self, records: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yields each set of some records, their rows, and their numbers in it."""
        records = np.asarray(records, np.int64)
        if records.size and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"{', '.join(self.names)}: expected records in 0..{len(self) - 1}")
        numbers = np.searchsorted(self._starts, records, side="right") - 1
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            yield number, rows, records[rows] - self._starts[number]


PlainShards = ShardSet | UnionShards


def require_same(parts: Sequence[tuple[str, Manifest]], *, shapes: bool = True) -> None:
    """Raises FormatError, naming both values, if sets given by name cannot be one.

    `shapes`: their latents must have one shape, too.
    """
    (first_name, first), *_ = parts
    for name, what, expected, found in differences(parts):
        remedy = "; encode them with --text-dtype float16" if what == "text_scale" else ""
        raise FormatError(
            f"shards: {name}: {what}: expected {expected} as in {first_name}, found {found}: "
            f"sets that are trained on as one must agree{remedy}"
        )
    for name, manifest in parts if shapes else ():
        if manifest.latent_shape != first.latent_shape:
            raise FormatError(
                f"shards: {name}: latent_shape: expected {first.latent_shape} as in {first_name}, "
                f"found {manifest.latent_shape}: sets that are trained on as one must agree, or be "
                "bucketed sets"
            )


def _require_same_fields(names: Sequence[str], sets: Sequence[ShardSet]) -> None:
    """Raises FormatError if further fields of a batch differ between sets."""
    found = [
        [spec for spec in _comparable(part.manifest.fields) if spec[0] in part.items]
        for part in sets
    ]
    for name, part, specs in zip(names, sets, found, strict=True):
        for expected, value in ((found[0], specs), (sets[0].shapes, part.shapes)):
            if value != expected:
                raise FormatError(
                    f"shards: {name}: fields: expected {expected} as in {names[0]}, found {value}: "
                    "sets that are trained on as one must agree in the fields of a batch"
                )


def differences(
    parts: Sequence[tuple[str, Manifest]], keys: Sequence[str] = SAME
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields name, key, the first set's value and the other value where sets differ in `keys`.

    Encoders and scales are compared by hash, and further fields without their shapes, which may
    depend on the image's size.
    """
    _, first = parts[0]
    for name, manifest in parts:
        for what in keys:
            expected, found = (_comparable(getattr(part, what)) for part in (first, manifest))
            if found != expected:
                yield name, what, expected, found


def _comparable(value: Any) -> Any:
    """Returns what identifies a value of a manifest: the hash, where it has one."""
    if hasattr(value, "file"):
        return value.file.sha256
    if isinstance(value, tuple):  # of further fields
        return [
            (s.name, s.dtype, s.per, s.made_by.sha256, s.scale and s.scale.sha256) for s in value
        ]
    return getattr(value, "sha256", value)
