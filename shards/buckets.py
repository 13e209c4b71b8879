"""Bucketed sets: images of several sizes, with an ordinary set of shards for each size.

    FOLDER/buckets.json   64x64/manifest.json ...   48x80/manifest.json ...

All records of a set have one shape, so each size is a separate set that can be opened, checked and
trained on alone. `buckets.json` is written last and contains the hash of each set's manifest.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.files import write_file, write_listed
from latent_t2i.shards.quarantine import QUARANTINE_NAME, Quarantined, read_reasons
from latent_t2i.shards.reader import FIELDS, RawBatch, ShardSet, open_shards
from latent_t2i.shards.schema import (
    BUCKET_PATTERN,
    BUCKETS_NAME,
    MANIFEST_NAME,
    Document,
    Fetch,
    FileEntry,
    FormatError,
    Manifest,
    read_stored,
)
from latent_t2i.shards.settings import ReadMode, Verify
from latent_t2i.shards.union import SAME, PlainShards, differences

BUCKETS_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The ordinary set in the sub-folder `name`."""

    name: str
    width_px: int
    height_px: int
    records: int
    quarantined: int
    """Quarantined images of this bucket; its manifest has the reasons."""
    sha256: str
    """Hash of the bytes of its manifest.json."""


@dataclass(frozen=True, kw_only=True)
class Version1:
    """The content of a list of version 1."""

    schema_version: int
    buckets: tuple[Bucket, ...]
    num_source: int
    num_records: int
    quarantined: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Version2:
    """The content of a list of version 2."""

    schema_version: int = BUCKETS_VERSION
    buckets: tuple[Bucket, ...]
    """Narrowest first."""
    quarantine: FileEntry | None  # quarantine.jsonl; None in version 1 only
    num_source: int
    """Images in the source: written, quarantined in a bucket, or in no bucket."""
    num_records: int
    num_quarantined: int
    """Images in no bucket."""


@dataclass(frozen=True, kw_only=True)
class Buckets(Version2, Document):
    """The list of a bucketed set: what the manifests of its sets do not contain."""

    FILE_NAME = BUCKETS_NAME

    folder: Path = field(compare=False)
    version_1: Version1 | None = field(default=None, repr=False)
    """The content of the file, if it is of version 1."""

    @classmethod
    def load(cls, folder: Path, fetch: Fetch | None = None) -> Self:
        """See `Document.load`; no other file is read."""
        path = folder / cls.FILE_NAME
        stored = read_stored(path, {2: Version2, 1: Version1})
        values = {part.name: getattr(stored, part.name) for part in fields(stored)}
        if isinstance(stored, Version1):
            num_quarantined = len(values.pop("quarantined"))
            values |= {"quarantine": None, "num_quarantined": num_quarantined, "version_1": stored}
        elif stored.quarantine is None or stored.quarantine.name != QUARANTINE_NAME:
            raise FormatError(
                f"{path}: quarantine: expected the file {QUARANTINE_NAME}, found "
                f"{stored.quarantine}"
            )
        loaded = cls(**values, folder=folder)
        loaded.check(path)
        return loaded

    def content(self) -> dict[str, Any]:
        """Returns the content of the file without its hash."""
        if self.version_1 is not None:
            return asdict(self.version_1)
        stored = {part.name: getattr(self, part.name) for part in fields(Version2)}
        return asdict(Version2(**stored))

    def read_quarantined(self) -> dict[str, str]:
        """Reads the reason for each image that is in no bucket, by key.

        Raises FormatError if the file is missing, altered or malformed.
        """
        if self.version_1 is not None:
            return dict(self.version_1.quarantined)
        assert self.quarantine is not None
        return read_reasons(self.folder / self.quarantine.name, self.quarantine)

    def check(self, path: Path) -> None:
        """Checks that names, sizes and counts are consistent with each other."""
        if not self.buckets:
            raise FormatError(f"{path}: buckets: expected at least one, found none")
        names = [bucket.name for bucket in self.buckets]
        for bucket in self.buckets:
            size = f"{bucket.width_px}x{bucket.height_px}"
            if bucket.name != size or not BUCKET_PATTERN.fullmatch(size):
                raise FormatError(
                    f"{path}: bucket {bucket.name!r}: expected the name {size!r} for its size"
                )
            if names.count(bucket.name) > 1:
                raise FormatError(f"{path}: bucket {bucket.name!r}: expected once, found twice")
        written = sum(bucket.records for bucket in self.buckets)
        lost = sum(bucket.quarantined for bucket in self.buckets) + self.num_quarantined
        pairs = {
            "num_records": written,
            "num_quarantined": max(self.num_quarantined, 0),
            "num_source": written + lost,
        }
        for name, expected in pairs.items():
            if getattr(self, name) != expected:
                raise FormatError(
                    f"{path}: {name}: expected {expected}, found {getattr(self, name)}"
                )


def finish_buckets(
    folder: Path, names: Sequence[str], *, quarantined: Mapping[str, str]
) -> Buckets:
    """Writes buckets.json, after the set of each bucket is finished.

    Args:
        folder: The folder of the bucketed set.
        names: The sub-folders with sets, WIDTHxHEIGHT in pixels, in any order. Buckets without
            records are not among them.
        quarantined: The reason for each image that is in none of these buckets, by key.

    Raises:
        FormatError: A bucket has no finished set, or the sets differ in more than the size.
    """
    path = folder / BUCKETS_NAME
    sizes = {name: parse_size(f"{path}", name) for name in names}
    listed = []
    parts = []
    for name in sorted(sizes, key=sizes.__getitem__):
        manifest = Manifest.load(folder / name)
        parts.append((name, manifest))
        width_px, height_px = sizes[name]
        listed.append(
            Bucket(
                name=name,
                width_px=width_px,
                height_px=height_px,
                records=manifest.num_records,
                quarantined=manifest.num_quarantined,
                sha256=hash_file(folder / name / MANIFEST_NAME),
            )
        )
    lines = (Quarantined(key=k, reason=v, shard=None).line() for k, v in quarantined.items())
    found = Buckets(
        buckets=tuple(listed),
        quarantine=write_listed(folder / QUARANTINE_NAME, lines),
        num_source=sum(part.num_source for _, part in parts) + len(quarantined),
        num_records=sum(part.num_records for _, part in parts),
        num_quarantined=len(quarantined),
        folder=folder,
    )
    found.check(path)
    for fault in disagreements(f"{folder}", parts):
        raise FormatError(fault)
    write_file(path, found.dump().encode())
    return found


def parse_size(place: str, name: str) -> tuple[int, int]:
    """Returns (width, height) in pixels from a bucket's name. Raises FormatError."""
    found = BUCKET_PATTERN.fullmatch(name)
    if not found:
        raise FormatError(f"{place}: expected a bucket named WIDTHxHEIGHT, found {name!r}")
    width, height = found.groups()
    return int(width), int(height)


def hash_file(path: Path) -> str:
    """Returns the sha256 of a small file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disagreements(location: str, parts: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """Yields each difference that prevents some sets, given by bucket name, from being one.

    The first set is the reference, also for how many pixels a latent cell spans.
    """
    (first_name, first), *_ = parts
    for name, what, expected, found in differences(parts, (*SAME, "fields")):
        yield (
            f"{location}: bucket {name}: {what}: expected {expected} as in {first_name}, "
            f"found {found}"
        )
    scale = downscale(location, first_name, first)
    for name, manifest in parts:
        expected_shape = tuple(side / scale for side in reversed(parse_size(location, name)))
        if manifest.latent_shape[1:] != expected_shape:
            height, width = manifest.latent_shape[1:]
            yield (
                f"{location}: bucket {name}: expected latents of {name} px over {scale:g}, as in "
                f"{first_name}, found {width} x {height}"
            )


def downscale(location: str, name: str, manifest: Manifest) -> float:
    """Returns the number of pixels that a latent cell of a bucket spans, horizontally."""
    width_px, _ = parse_size(location, name)
    return width_px / manifest.latent_shape[2]


def check_bucket(location: str, bucket: Bucket, manifest: Manifest, sha256: str) -> Iterator[str]:
    """Yields each difference between the list and a bucket's manifest (`sha256`: of its bytes)."""
    place = f"{location}: bucket {bucket.name}"
    if sha256 != bucket.sha256:
        yield (
            f"{place}: {MANIFEST_NAME}: sha256: expected {bucket.sha256}, found {sha256}: the list "
            "was written for another set"
        )
    pairs = {"records": manifest.num_records, "quarantined": manifest.num_quarantined}
    for name, found in pairs.items():
        if getattr(bucket, name) != found:
            yield f"{place}: {name}: expected {getattr(bucket, name)}, found {found}"


class BucketedShards:
    """The records of all buckets, numbered from 0 in the order of the buckets."""

    def __init__(self, location: str, buckets: Buckets, parts: Sequence[PlainShards]) -> None:
        self.location = location
        self.buckets = buckets
        self.parts = tuple(parts)
        """One per bucket; a bucket of several joined sets is a union."""
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return self.buckets.num_records

    @property
    def sets(self) -> tuple[ShardSet, ...]:
        """The ordinary sets of all buckets."""
        return tuple(one for part in self.parts for one in part.sets)

    @property
    def main(self) -> PlainShards:
        """The set of the square bucket, else of the bucket with the most records."""
        listed = self.buckets.buckets
        numbers = range(len(listed))
        square = [n for n in numbers if listed[n].width_px == listed[n].height_px]
        return self.parts[max(square or numbers, key=lambda number: listed[number].records)]

    @property
    def manifest(self) -> Manifest:
        """The main set's manifest. Use it only for what all buckets have in common."""
        return self.main.manifest

    @property
    def sha256(self) -> str:
        """Hash of the list, which contains the hashes of all manifests."""
        return self.buckets.sha256

    @property
    def empty_text(self) -> Tensor:
        """Hidden states (T, D) float16 of the empty prompt, from the main set."""
        return self.main.empty_text

    @property
    def text_scale(self) -> Tensor | None:
        """Scale (D,) float32 of int8 text, the same for all buckets."""
        return self.main.text_scale

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one view of a stored latent, by bucket."""
        return tuple(part.manifest.latent_shape for part in self.parts)

    @property
    def shapes(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Shape of an item of each field of a batch, by bucket."""
        return tuple(part.shapes for part in self.parts)

    @property
    def field_scales(self) -> dict[str, Tensor]:
        """Scales of further int8 fields, the same for all buckets."""
        return self.main.field_scales

    def order(self, *, batch_size: int, seed: int, **settings: Any) -> BucketOrder:
        """Returns an order to visit the records in; `settings` are those of BucketOrder."""
        sizes = tuple(part.shard_sizes for part in self.parts)
        return BucketOrder(sizes=sizes, batch_size=batch_size, seed=seed, **settings)

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
    ) -> RawBatch:
        """Like `ShardSet.gather`. Raises ValueError for records of several buckets."""
        part, local = self._locate(records)
        return part.gather(local, caption_u, view_u, out)

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Returns the keys of records of one bucket, in that order."""
        part, local = self._locate(records)
        return part.keys(local)

    def finish_verification(self) -> None:
        """Like `ShardSet.finish_verification`, for all buckets."""
        for part in self.parts:
            part.finish_verification()

    def _locate(self, records: NDArray[np.int64]) -> tuple[PlainShards, NDArray[np.int64]]:
        """Returns the set of some records and their numbers in it."""
        records = np.asarray(records, np.int64)
        if records.size and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"{self.location}: expected records in 0..{len(self) - 1}")
        found = np.unique(np.searchsorted(self._starts, records, side="right") - 1)
        if len(found) != 1:
            raise ValueError(
                f"{self.location}: expected records of one bucket, found {len(found)} buckets"
            )
        return self.parts[found[0]], records - self._starts[found[0]]


def holds_buckets(folder: Path) -> bool:
    """Returns whether a local folder is a bucketed set, finished or not."""
    if (folder / MANIFEST_NAME).exists() or not folder.is_dir():
        return False
    parts = (path for path in folder.iterdir() if BUCKET_PATTERN.fullmatch(path.name))
    return (folder / BUCKETS_NAME).exists() or any(part.is_dir() for part in parts)


def open_buckets(
    path: str | Path,
    *,
    fields: Sequence[str] = FIELDS,
    verify: Verify = "lazy",
    read: ReadMode = "auto",
) -> BucketedShards:
    """Opens a bucketed set in a local folder. Raises FormatError like `open_shards`."""
    folder = Path(path)
    buckets = Buckets.load(folder)
    sets = [
        open_shards(folder / bucket.name, fields=fields, verify=verify, read=read)
        for bucket in buckets.buckets
    ]
    return bucketed(str(path), buckets, sets)


def bucketed(location: str, buckets: Buckets, sets: Sequence[ShardSet]) -> BucketedShards:
    """Returns a bucketed set. Raises FormatError if the sets are not those that `buckets` lists."""
    for bucket, part in zip(buckets.buckets, sets, strict=True):
        sha256 = hash_file(part.folder / MANIFEST_NAME)
        for fault in check_bucket(location, bucket, part.manifest, sha256):
            raise FormatError(fault)
    names = (bucket.name for bucket in buckets.buckets)
    parts = list(zip(names, (part.manifest for part in sets), strict=True))
    for fault in disagreements(location, parts):
        raise FormatError(fault)
    return BucketedShards(location, buckets, sets)
