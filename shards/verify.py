"""Checks a set of shards through and through, and prints every fault.

    python -m shards.verify shards/data/demo/train --jobs 8

Reads every byte once: the manifest's own hash and form, each file's size and sha256, each member's
tar and array header and padding, values that are not finite, tokens, JSON, keys, scales, and the
sums in the manifest, latent statistics too. The shards are shared out among threads, which do run
side by side: hashing and numpy's checks let go of Python's lock. Of a bucketed set its list is
checked and each of its sets. Exit code 0 without a fault, 1 with one, 2 if there is no such folder
or a flag is wrong.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from latent_t2i.shards.buckets import Buckets, check_bucket, disagreements, hash_file, holds_buckets
from latent_t2i.shards.reader import (
    NAME_BYTES,
    check_hash,
    check_size,
    key_of,
    load_array,
    small_arrays,
)
from latent_t2i.shards.schema import (
    BLOCK_BYTES,
    BUCKETS_NAME,
    KEY_PATTERN,
    MANIFEST_NAME,
    MEMBERS,
    Field,
    FormatError,
    LatentKind,
    LatentStatistics,
    Layout,
    Manifest,
    ShardEntry,
    round_up,
)
from latent_t2i.shards.writer import LOG_VARIANCE_RANGE

READ_BYTES = 1 << 22
"""So much of a shard is read, hashed and checked at a time, while it is in the CPU's cache."""
MAX_FAULTS = 20
"""So many faults of one shard are told one by one, then their number."""
STATISTICS_TOLERANCE = 1e-4
"""Relative; the sums here are of float32 terms, the writer's of float64."""
CHECKSUM = slice(148, 156)
"""Where a tar header keeps the sum of its bytes, taken with spaces here: six octal digits."""
EXPONENT = 0x7C00
"""float16's exponent bits: all set in NaN and infinity. Ten times as fast as `np.isfinite`."""


@dataclass
class LatentSums:
    """Sums over sampled latents, from which their statistics follow: E[z²] = mean² + variance."""

    count: int = 0
    total: NDArray[np.float64] | float = 0.0  # (C,)
    squares: NDArray[np.float64] | float = 0.0  # (C,)

    def add(self, latents: NDArray[np.float16], kind: LatentKind) -> None:
        """Adds stored latents (N, views, 2C, h, w) or (N, views, C, h, w)."""
        values = latents.astype(np.float32)
        axes = (0, 1, 3, 4)
        if kind == "moments":
            values, log_variance = np.split(values, 2, axis=2)
            variance = np.exp(np.clip(log_variance, *LOG_VARIANCE_RANGE))
            self.squares = self.squares + variance.sum(axes, dtype=np.float64)
        self.count += values.size // values.shape[2]
        self.total = self.total + values.sum(axes, dtype=np.float64)
        self.squares = self.squares + np.square(values).sum(axes, dtype=np.float64)

    def statistics(self) -> LatentStatistics:
        """Returns the mean and standard deviation per channel, and what follows from them."""
        mean = np.asarray(self.total) / self.count
        second = np.asarray(self.squares) / self.count
        std = np.sqrt(np.maximum(second - mean**2, 0.0))
        overall = math.sqrt(max(float(second.mean() - mean.mean() ** 2), 0.0))
        return LatentStatistics(
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            scaling_factor=1 / overall if overall else 1.0,
        )


@dataclass
class _Shard:
    """A shard under check: what is wrong with it, and what adds up over its records."""

    path: Path
    layout: Layout
    kind: LatentKind
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    num_captions: int = 0
    num_truncated: int = 0
    sums: LatentSums = field(default_factory=LatentSums)

    def fault(self, fault: str, *, key: str | None = None) -> None:
        """Notes a fault of the shard, or of one of its records."""
        self.num_faults += 1
        if self.num_faults <= MAX_FAULTS:
            self.faults.append(f"{self.path}: " + (f"key {key!r}: " if key else "") + fault)


def verify(
    folder: Path, *, jobs: int = 1, advance: Callable[[int], object] = lambda num_bytes: None
) -> Iterator[str]:
    """Yields a line for each fault of a set, with shard, key, field, expected and found.

    The set may be a bucketed one. The shards are checked by `jobs` threads, and their faults come
    in their order all the same. `advance` is called, from any thread, with the number of bytes of
    shards read since last.
    """
    if holds_buckets(folder):
        yield from _verify_buckets(folder, jobs, advance)
    else:
        yield from _verify_set(folder, {}, jobs, advance)


def _verify_buckets(folder: Path, jobs: int, advance: Callable[[int], object]) -> Iterator[str]:
    """Yields the faults of a bucketed set: of its list and each set, and what they disagree in."""
    try:
        listed = Buckets.load(folder)
    except FormatError as error:
        yield str(error)
        return
    path = folder / BUCKETS_NAME
    if path.read_bytes() != listed.dump().encode():
        yield f"{path}: expected the form this code writes, found other spacing or order"
    names = {bucket.name for bucket in listed.buckets} | {BUCKETS_NAME}
    for stray in sorted({path.name for path in folder.iterdir()} - names):
        yield f"{folder / stray}: expected only the list's buckets, found this too"
    place_of_key: dict[str, Path] = {}
    manifests = []
    for bucket in listed.buckets:
        yield from _verify_set(folder / bucket.name, place_of_key, jobs, advance)
        try:
            manifest = Manifest.load(folder / bucket.name)
        except FormatError:  # which is told of just before
            continue
        sha256 = hash_file(folder / bucket.name / MANIFEST_NAME)
        yield from check_bucket(str(folder), bucket, manifest, sha256)
        manifests.append((bucket.name, manifest))
    if manifests:
        yield from disagreements(str(folder), manifests)
    yield from _check_left_out(path, listed.quarantined, place_of_key)


def _check_left_out(
    path: Path, quarantined: Mapping[str, str], place_of_key: Mapping[str, Path]
) -> Iterator[str]:
    for key in quarantined:
        if key in place_of_key:
            yield (
                f"{path}: key {key!r}: expected no record, since it is listed as left out, found "
                f"one in {place_of_key[key]}"
            )


def _verify_set(
    folder: Path,
    place_of_key: dict[str, Path],
    jobs: int,
    advance: Callable[[int], object],
) -> Iterator[str]:
    """Yields the faults of one set, and adds its keys to those met before."""
    try:
        manifest = Manifest.load(folder)
    except FormatError as error:
        yield str(error)
        return
    path = folder / MANIFEST_NAME
    if path.read_bytes() != manifest.dump().encode():
        yield f"{path}: expected the form this code writes, found other spacing or order"
    listed = {entry.name for entry in manifest.files} | {MANIFEST_NAME}
    for stray in sorted({path.name for path in folder.iterdir()} - listed):
        yield f"{folder / stray}: expected only what the manifest lists, found this too"
    yield from _check_small(folder, manifest)
    found = _Shard(path, manifest.layouts[0], manifest.latent_kind)
    for shard in _check_shards(folder, manifest, jobs, advance):
        yield from shard.faults
        if shard.num_faults > MAX_FAULTS:
            yield f"{shard.path}: and {shard.num_faults - MAX_FAULTS} more faults"
        yield from _check_keys(shard, place_of_key, manifest)
        found.num_captions += shard.num_captions
        found.num_truncated += shard.num_truncated
        found.sums.count += shard.sums.count
        found.sums.total = found.sums.total + shard.sums.total
        found.sums.squares = found.sums.squares + shard.sums.squares
    yield from _check_totals(path, manifest, found)


def _check_small(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Checks the arrays beside the shards."""
    for name, (entry, dtype, shape) in small_arrays(manifest).items():
        path = folder / entry.name
        try:
            check_size(folder, entry)
            check_hash(folder, entry)
            array = load_array(folder, entry, dtype, shape)
        except FormatError as error:
            yield str(error)
            continue
        except OSError as error:
            yield f"{path}: expected a readable file, found {error.strerror}"
            continue
        if not np.isfinite(array).all():
            yield f"{path}: expected finite values, found NaN or infinity"
        elif name == "text_scale" and array.min() <= 0:
            yield f"{path}: expected scales above 0, found {array.min()}"
        elif name == "empty_tokens" and array.min() < 0:
            yield f"{path}: expected ids from 0, found {array.min()}"


def _check_shards(
    folder: Path, manifest: Manifest, jobs: int, advance: Callable[[int], object]
) -> Iterator[_Shard]:
    def check(entry: ShardEntry) -> _Shard:
        return _check_shard(folder, entry, manifest, advance)

    if jobs == 1:
        yield from map(check, manifest.shards)
        return
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check, manifest.shards)


def _check_shard(
    folder: Path, entry: ShardEntry, manifest: Manifest, advance: Callable[[int], object]
) -> _Shard:
    layout = manifest.layouts[entry.layout]
    shard = _Shard(folder / entry.name, layout, manifest.latent_kind)
    try:
        check_size(folder, entry)
        sha256 = _read(shard, entry.records, advance)
    except FormatError as error:
        shard.num_faults += 1
        shard.faults.append(str(error))
        return shard
    except OSError as error:
        shard.fault(f"expected a readable file, found {error.strerror}")
        return shard
    if sha256 != entry.sha256:
        shard.num_faults += 1
        shard.faults.insert(
            0,
            f"{shard.path}: sha256: expected {entry.sha256}, found {sha256}: the file changed "
            "after it was written",
        )
    return shard


def _read(shard: _Shard, num_records: int, advance: Callable[[int], object]) -> str:
    """Checks all bytes of a shard in one pass; returns their sha256."""
    record_bytes = shard.layout.record_bytes
    buffer = np.empty((max(1, READ_BYTES // record_bytes), record_bytes), np.uint8)
    digest = hashlib.sha256()
    with shard.path.open("rb") as file:
        for first in range(0, num_records, len(buffer)):
            block = buffer[: num_records - first]
            num_bytes = file.readinto(block.data)
            if num_bytes != block.nbytes:
                raise FormatError(f"{shard.path}: cut short while it was read")
            digest.update(block.data)
            _check_block(shard, block)
            advance(num_bytes)
        end = file.read()
    digest.update(end)
    advance(len(end))
    if any(end):
        shard.fault("expected zeros alone after the last record, found other bytes")
    return digest.hexdigest()


def _check_block(shard: _Shard, block: NDArray[np.uint8]) -> None:
    """Checks some whole records, (N, record_bytes)."""
    keys = [key_of(name.tobytes()) for name in block[:, :NAME_BYTES]]
    for key in keys:
        if not KEY_PATTERN.fullmatch(key):
            shard.fault(f"expected a key of the form {KEY_PATTERN.pattern}", key=key)
    for name in MEMBERS:
        _check_member(shard, name, keys, block)
    _check_values(shard, keys, block)
    content = _view(block, shard.layout.fields["json"], np.uint8)
    for key, document in zip(keys, content, strict=True):
        _check_meta(shard, key, document.tobytes())
    shard.keys += keys


def _check_member(shard: _Shard, name: str, keys: list[str], block: NDArray[np.uint8]) -> None:
    """Checks what is around a member's data, which the layout and the key decide to the byte."""
    part = shard.layout.fields[name]
    start, end = part.offset_bytes - part.header_bytes, part.offset_bytes + part.num_bytes
    members = [f"{key}.{MEMBERS[name]}" for key in keys]
    found = block[:, start - BLOCK_BYTES : start]
    expected = _tar_headers(members, part.header_bytes + part.num_bytes)
    for row in _rows(found != expected):
        difference = _difference(expected[row], found[row], start - BLOCK_BYTES)
        shard.fault(f"field {name}: {difference}", key=keys[row])
    found = block[:, start : part.offset_bytes]
    for row in _rows(found != np.frombuffer(part.header, np.uint8)):
        shard.fault(
            f"field {name}: expected array header {part.header!r}, found {found[row].tobytes()!r}",
            key=keys[row],
        )
    for row in _rows(block[:, end : round_up(end, BLOCK_BYTES)] != 0):
        shard.fault(
            f"field {name}: expected zeros alone after the data, found other bytes", key=keys[row]
        )


def _difference(expected: NDArray[np.uint8], found: NDArray[np.uint8], start: int) -> str:
    """Says where two tar headers differ: in the name, or else where first."""
    (places,) = np.nonzero(expected != found)
    if places[0] < NAME_BYTES:
        old, new = (_name(header[:NAME_BYTES]) for header in (expected, found))
        return f"expected member {old!r} at byte {start}, found {new!r}"
    first, last = int(places[0]), int(places[-1])
    old_bytes, new_bytes = (header[first : last + 1].tobytes() for header in (expected, found))
    return f"expected {old_bytes!r} at byte {first} of the tar header, found {new_bytes!r}"


def _name(content: NDArray[np.uint8]) -> str:
    return content.tobytes().rstrip(b"\0").decode("ascii", "backslashreplace")


def _tar_headers(names: Sequence[str], num_bytes: int) -> NDArray[np.uint8]:
    """Returns the headers of files of one size, as the format fixes them.  # (N, 512)"""
    headers = np.tile(_tar_header(num_bytes), (len(names), 1))
    encoded = np.array([name.encode("ascii", "replace") for name in names], f"S{NAME_BYTES}")
    headers[:, :NAME_BYTES] = encoded.view(np.uint8).reshape(-1, NAME_BYTES)
    headers[:, CHECKSUM] = ord(" ")
    sums = headers.sum(1, dtype=np.int64)
    octal = ord("0") + (sums[:, None] >> np.arange(15, -1, -3) & 7)  # (N, 6)
    headers[:, CHECKSUM.start : CHECKSUM.start + 6] = octal
    headers[:, CHECKSUM.start + 6] = 0
    return headers


@lru_cache
def _tar_header(num_bytes: int) -> NDArray[np.uint8]:
    info = tarfile.TarInfo()
    info.size, info.mode = num_bytes, 0o444
    info.uname = info.gname = "bigdata"
    return np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)


def _check_values(shard: _Shard, keys: list[str], block: NDArray[np.uint8]) -> None:
    fields = shard.layout.fields
    finite = np.ones(len(block), np.bool_)
    for name in ("latent", "text"):
        if fields[name].dtype != "float16":
            continue
        bits = _view(block, fields[name], np.uint16)
        for row in _rows((bits & EXPONENT) == EXPONENT):
            finite[row] &= name != "latent"
            shard.fault(
                f"field {name}: expected finite values, found NaN or infinity", key=keys[row]
            )
    for row in _rows(_view(block, fields["tokens"], np.int32) < 0):
        shard.fault("field tokens: expected ids from 0, found a negative one", key=keys[row])
    latents = _view(block, fields["latent"], np.float16)[finite]
    shard.sums.add(latents.reshape(-1, *fields["latent"].shape), shard.kind)


def _check_meta(shard: _Shard, key: str, content: bytes) -> None:
    try:
        meta: Any = json.loads(content)
        captions, truncated = meta["captions"], meta["truncated"]
    except (ValueError, KeyError, TypeError) as error:
        shard.fault(f"field json: expected captions and truncated, found {error!r}", key=key)
        return
    num_captions = shard.layout.num_captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        shard.fault(f"field json: expected a list of captions, found {captions!r}", key=key)
    elif len(captions) != num_captions:
        shard.fault(f"field json: expected {num_captions} captions, found {len(captions)}", key=key)
    elif not isinstance(truncated, list) or any(n not in range(num_captions) for n in truncated):
        shard.fault(
            f"field json: truncated: expected numbers of captions, found {truncated!r}", key=key
        )
    else:
        shard.num_captions += len(captions)
        shard.num_truncated += len(truncated)


def _check_keys(shard: _Shard, place_of_key: dict[str, Path], manifest: Manifest) -> Iterator[str]:
    """Holds a shard's keys to each other and to those met in earlier shards."""
    for key in shard.keys:
        place = f"{shard.path}: key {key!r}"
        if key in place_of_key:
            yield f"{place}: expected once, found in {place_of_key[key]} too"
        if key in manifest.quarantined:
            yield f"{place}: expected no record, since the manifest says that it was left out"
        place_of_key[key] = shard.path


def _check_totals(path: Path, manifest: Manifest, found: _Shard) -> Iterator[str]:
    """Holds the manifest's sums to what was found in all shards."""
    for name in ("num_captions", "num_truncated"):
        expected = getattr(found, name)
        if getattr(manifest, name) != expected:
            yield f"{path}: {name}: expected {expected}, found {getattr(manifest, name)}"
    if not found.sums.count:
        return
    computed, stored = found.sums.statistics(), manifest.latent_statistics
    scale = np.abs(computed.mean) + np.array(computed.std)
    for name, unit in (
        ("mean", scale),
        ("std", scale),
        ("scaling_factor", computed.scaling_factor),
    ):
        new, old = np.array(getattr(computed, name)), np.array(getattr(stored, name))
        place = f"{path}: latent_statistics: {name}"
        if new.shape != old.shape or not (np.abs(new - old) <= STATISTICS_TOLERANCE * unit).all():
            yield f"{place}: expected {new.tolist()}, found {old.tolist()}"


def _view(block: NDArray[np.uint8], part: Field, dtype: type[np.generic]) -> NDArray[Any]:
    """A field of some records, flat: (N, bytes / size of dtype)."""
    data = block[:, part.offset_bytes : part.offset_bytes + part.num_bytes]
    return data.view(np.dtype(dtype).newbyteorder("<"))


def _rows(wrong: NDArray[np.bool_]) -> list[int]:
    """The records, of (N, ...), with anything wrong."""
    return np.flatnonzero(wrong.any(1)).tolist() if wrong.any() else []


def main(prog: str | None = None) -> int:
    """Runs the check for the command line; returns the exit code."""
    arguments = _parse_arguments(prog)
    folder: Path = arguments.folder
    if not folder.is_dir():
        print(f"error: {folder}: no such folder", file=sys.stderr)
        return 2
    num_faults = 0
    lock = threading.Lock()
    with tqdm(
        total=sum(path.stat().st_size for path in folder.rglob("*.tar")),
        desc="verify",
        unit="B",
        unit_scale=True,
        ncols=80,
        disable=True if arguments.quiet else None,
    ) as bar:

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        for fault in verify(folder, jobs=arguments.jobs, advance=advance):
            num_faults += 1
            bar.write(f"fault: {fault}")
    if num_faults:
        print(f"{folder}: {num_faults} faults")
        return 1
    print(f"{folder}: {_count(folder)}, no fault")
    return 0


def _count(folder: Path) -> str:
    """Says how much there is in a sound set."""
    if holds_buckets(folder):
        listed = Buckets.load(folder)
        return f"{listed.num_records} records in {len(listed.buckets)} buckets"
    manifest = Manifest.load(folder)
    return f"{manifest.num_records} records in {len(manifest.shards)} shards"


def _parse_arguments(prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m shards.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder that holds the manifest or the buckets")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="threads (default: as many as CPUs)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, found {arguments.jobs}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
