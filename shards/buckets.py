"""A bucketed set: images of several sizes, an ordinary set of shards for each size.

    FOLDER/buckets.json   64x64/manifest.json ...   48x80/manifest.json ...

    finish_buckets(folder, ["64x64", "48x80"], quarantined={"dog": "not an image"})
    shards = open_buckets("shards/data/demo/train")

Records of one set have one shape, and so has a batch; hence sets and not shards differ in size, and
each can be opened, checked and trained on alone. `buckets.json` is written last and pins each set's
manifest, and through it every byte. Buckets without a record are left out. All must be of the same
encoders and settings, and of int8 text with one scale: nothing but the size may differ.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latent_t2i.shards.bucket_order import BucketOrder
from latent_t2i.shards.reader import RawBatch, ShardSet, open_shards
from latent_t2i.shards.schema import (
    BUCKET_PATTERN,
    BUCKETS_NAME,
    MANIFEST_NAME,
    FormatError,
    Manifest,
    hash_json,
    read_document,
)
from latent_t2i.shards.writer import write_file

BUCKETS_VERSION = 1
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
"""What all buckets agree in: encoders by their hashes, the scale by its file's."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """An ordinary set in the sub-folder `name`."""

    name: str
    width_px: int
    height_px: int
    records: int
    quarantined: int
    """Images of this bucket that were left out; its manifest tells why."""
    sha256: str
    """Of the bytes of its manifest.json."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """All about a finished bucketed set that its manifests do not tell."""

    schema_version: int = BUCKETS_VERSION
    buckets: tuple[Bucket, ...]
    """Narrowest first."""
    num_source: int
    """Images that came in: written, quarantined in a bucket, or in none."""
    num_records: int
    quarantined: dict[str, str]
    """The reason by key of each image that reached no bucket."""

    @property
    def sha256(self) -> str:
        """The hash of the content, and through the manifests' of everything in the folder."""
        return hash_json(asdict(self))

    def dump(self) -> str:
        """The content as it stands in the file: the same content, the same bytes."""
        document = asdict(self) | {"sha256": self.sha256}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the list of a bucketed set.

        Raises FormatError for a missing, unreadable, altered or inconsistent one, and for a schema
        version this code does not know.
        """
        path = folder / BUCKETS_NAME
        document = read_document(path, folder)
        version = document.get("schema_version")
        if version != BUCKETS_VERSION:
            raise FormatError(
                f"{path}: schema_version: expected {BUCKETS_VERSION}, found {version!r}: "
                "written by another release; make the shards again with this one"
            )
        stored = document.pop("sha256", None)
        try:
            parts = tuple(Bucket(**bucket) for bucket in document["buckets"])
            found = cls(**{**document, "buckets": parts})
            computed = found.sha256
            found._check(path)
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{path}: not a list of buckets of version {version}: {error!r}"
            ) from error
        if stored != computed:
            raise FormatError(
                f"{path}: sha256: expected {computed}, found {stored}: "
                "the list was altered after it was written"
            )
        return found

    def _check(self, path: Path) -> None:
        """Holds the numbers to each other, so that what opens is also consistent."""
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
                raise FormatError(f"{path}: bucket {bucket.name!r}: expected once, found again")
        written = sum(bucket.records for bucket in self.buckets)
        left_out = sum(bucket.quarantined for bucket in self.buckets) + len(self.quarantined)
        for name, expected in (("num_records", written), ("num_source", written + left_out)):
            if getattr(self, name) != expected:
                raise FormatError(
                    f"{path}: {name}: expected {expected}, found {getattr(self, name)}"
                )


def finish_buckets(
    folder: Path, names: Sequence[str], *, quarantined: Mapping[str, str]
) -> Buckets:
    """Writes the list of a folder's buckets, last of all, when each one's set is finished.

    Args:
        folder: The folder of the bucketed set.
        names: Of the buckets that have a set, WIDTHxHEIGHT in pixels: the sub-folders, in any
            order; those without a record are not among them.
        quarantined: The reason by key of each image that reached none of these buckets.

    Raises:
        FormatError: A bucket has no finished set, or they differ in more than the size.
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
                quarantined=len(manifest.quarantined),
                sha256=hash_file(folder / name / MANIFEST_NAME),
            )
        )
    found = Buckets(
        buckets=tuple(listed),
        num_source=sum(part.num_source for _, part in parts) + len(quarantined),
        num_records=sum(part.num_records for _, part in parts),
        quarantined=dict(quarantined),
    )
    found._check(path)
    for fault in disagreements(f"{folder}", parts):
        raise FormatError(fault)
    write_file(path, found.dump().encode())
    return found


def parse_size(place: str, name: str) -> tuple[int, int]:
    """Returns the (width, height) in pixels that a bucket is named for. Raises FormatError."""
    found = BUCKET_PATTERN.fullmatch(name)
    if not found:
        raise FormatError(f"{place}: expected buckets named WIDTHxHEIGHT, found {name!r}")
    width, height = found.groups()
    return int(width), int(height)


def hash_file(path: Path) -> str:
    """Returns the sha256 of a small file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disagreements(location: str, parts: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """Yields what keeps some sets, by bucket name, from being one, each naming expected and found.

    The first says what is expected: what all agree in, and how many pixels a cell of latents spans.
    """
    (first_name, first), *_ = parts
    for name, manifest in parts:
        for what in SAME:
            expected, found = (_comparable(getattr(part, what)) for part in (first, manifest))
            if found != expected:
                yield (
                    f"{location}: bucket {name}: {what}: expected {expected} as in "
                    f"{first_name}, found {found}"
                )
    scale = downscale(location, first_name, first)
    for name, manifest in parts:
        expected_shape = tuple(side / scale for side in reversed(parse_size(location, name)))
        if manifest.latent_shape[1:] != expected_shape:
            height, width = manifest.latent_shape[1:]
            yield (
                f"{location}: bucket {name}: expected latents of its size over {scale:g}, as in "
                f"{first_name}, found {width} x {height}"
            )


def downscale(location: str, name: str, manifest: Manifest) -> float:
    """Returns how many pixels a cell of a bucket's latents spans from left to right."""
    width_px, _ = parse_size(location, name)
    return width_px / manifest.latent_shape[2]


def _comparable(value: Any) -> Any:
    """Returns what tells a part of a manifest from another's."""
    if hasattr(value, "file"):
        return value.file.sha256
    return getattr(value, "sha256", value)


def check_bucket(location: str, bucket: Bucket, manifest: Manifest, sha256: str) -> Iterator[str]:
    """Yields how a bucket's set, whose manifest's bytes have this hash, differs from the list."""
    place = f"{location}: bucket {bucket.name}"
    if sha256 != bucket.sha256:
        yield (
            f"{place}: {MANIFEST_NAME}: sha256: expected {bucket.sha256}, found {sha256}: "
            "not the set that the list was written for"
        )
    pairs = {"records": manifest.num_records, "quarantined": len(manifest.quarantined)}
    for name, found in pairs.items():
        if getattr(bucket, name) != found:
            yield f"{place}: {name}: expected {getattr(bucket, name)}, found {found}"


class ImageLocator(NamedTuple):
    """Where a record of a bucketed set is."""

    bucket: int
    records: NDArray[np.int64]
    """By their numbers in the bucket's set."""


class BucketedShards:
    """The records of several sets, numbered from 0 in the order of the buckets."""

    def __init__(self, location: str, buckets: Buckets, sets: Sequence[ShardSet]) -> None:
        """Takes the set of each bucket. Raises FormatError where they are not those listed."""
        self.location = location
        self.buckets = buckets
        self.sets = tuple(sets)
        for bucket, part in zip(buckets.buckets, sets, strict=True):
            sha256 = hash_file(part.folder / MANIFEST_NAME)
            for fault in check_bucket(location, bucket, part.manifest, sha256):
                raise FormatError(fault)
        names = (bucket.name for bucket in buckets.buckets)
        parts = list(zip(names, (part.manifest for part in sets), strict=True))
        for fault in disagreements(location, parts):
            raise FormatError(fault)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in sets])])

    def __len__(self) -> int:
        return self.buckets.num_records

    @property
    def main(self) -> ShardSet:
        """The square bucket's set, else the one with the most records."""
        listed = self.buckets.buckets
        numbers = range(len(listed))
        square = [n for n in numbers if listed[n].width_px == listed[n].height_px]
        return self.sets[max(square or numbers, key=lambda number: listed[number].records)]

    @property
    def manifest(self) -> Manifest:
        """The main set's, for what all agree in; sizes and counts are its own."""
        return self.main.manifest

    @property
    def sha256(self) -> str:
        """The hash of the list, and through it of everything in the set."""
        return self.buckets.sha256

    @property
    def empty_text(self) -> Tensor:
        """The main set's hidden states of the empty prompt.  # (T, D) float16"""
        return self.main.empty_text

    @property
    def text_scale(self) -> Tensor | None:
        """The scale of int8 text, one for all.  # (D,) float32"""
        return self.main.text_scale

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One view of a stored latent, by bucket.  # (2C, h, w) moments, or (C, h, w)"""
        return tuple(part.manifest.latent_shape for part in self.sets)

    def order(self, *, batch_size: int, seed: int, **settings: Any) -> BucketOrder:
        """Returns an order in which to visit the records; `settings` are BucketOrder's."""
        sizes = tuple(tuple(shard.records for shard in part.manifest.shards) for part in self.sets)
        return BucketOrder(sizes=sizes, batch_size=batch_size, seed=seed, **settings)

    def gather(
        self,
        records: NDArray[np.int64],
        caption_u: NDArray[np.float64],
        view_u: NDArray[np.float64],
        out: RawBatch | None = None,
    ) -> RawBatch:
        """As `ShardSet.gather`; raises ValueError for records of several buckets."""
        place = self._locate(records)
        return self.sets[place.bucket].gather(place.records, caption_u, view_u, out)

    def keys(self, records: NDArray[np.int64]) -> list[str]:
        """Returns the keys of some records of one bucket, in that order."""
        place = self._locate(records)
        return self.sets[place.bucket].keys(place.records)

    def _locate(self, records: NDArray[np.int64]) -> ImageLocator:
        records = np.asarray(records, np.int64)
        if records.size and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"{self.location}: a record outside 0..{len(self) - 1} was asked for")
        found = np.unique(np.searchsorted(self._starts, records, side="right") - 1)
        if len(found) != 1:
            raise ValueError(
                f"{self.location}: expected records of one bucket, found {len(found)} buckets'"
            )
        return ImageLocator(int(found[0]), records - self._starts[found[0]])


def holds_buckets(folder: Path) -> bool:
    """Returns whether a local folder is a bucketed set, or was to become one."""
    if (folder / MANIFEST_NAME).exists() or not folder.is_dir():
        return False
    parts = (path for path in folder.iterdir() if BUCKET_PATTERN.fullmatch(path.name))
    return (folder / BUCKETS_NAME).exists() or any(part.is_dir() for part in parts)


def open_buckets(path: str | Path, *, verify: bool = False) -> BucketedShards:
    """Opens a bucketed set in a local folder. Raises FormatError as `open_shards` does."""
    folder = Path(path)
    buckets = Buckets.load(folder)
    sets = [open_shards(folder / bucket.name, verify=verify) for bucket in buckets.buckets]
    return BucketedShards(str(path), buckets, sets)
