"""Checks every byte of a set of shards and prints every fault.

    python -m shards.verify shards/data/demo/train --jobs 8
    python -m shards.verify FOLDER FOLDER ...

Checks the manifest's hash and form, the size and sha256 of each file, all tar and array headers and
padding, tokens, JSON, keys and scales, that values are finite, the quarantine, and the sums, totals
and latent statistics in the manifest. For a bucketed set, the list and each set are checked. Of
several sets, notes say which keys and images they share and whether they can be trained on as one;
that is no fault. The exit code is 0 without faults, 1 with faults, and 2 for a missing folder or a
wrong flag.
"""

import argparse
import hashlib
import math
import os
import sys
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from latent_t2i.shards.buckets import (
    Buckets,
    check_bucket,
    disagreements,
    hash_file,
    holds_buckets,
    open_buckets,
)
from latent_t2i.shards.checks import check_hash, check_size, hash_fault
from latent_t2i.shards.duplicates import compare_images, find_duplicates
from latent_t2i.shards.joining import join_sets
from latent_t2i.shards.latent_stats import LatentSums, latent_statistics
from latent_t2i.shards.parsing import load_json, printable, show
from latent_t2i.shards.quarantine import read_quarantine
from latent_t2i.shards.reader import NAME_BYTES, key_of, load_array, open_shards, small_arrays
from latent_t2i.shards.schema import (
    BLOCK_BYTES,
    BUCKETS_NAME,
    KEY_PATTERN,
    MANIFEST_NAME,
    PROGRESS_DIR,
    Field,
    FileEntry,
    FormatError,
    LatentKind,
    Layout,
    Manifest,
    ShardEntry,
    member_of,
    round_up,
)
from latent_t2i.shards.shard_sums import SUMS_NAME, read_sums

READ_BYTES = 1 << 22
"""Amount read, hashed and checked at a time, so that it stays in the CPU's cache."""
MAX_FAULTS = 20
"""Faults of one shard that are listed; of the rest, only the number."""
STATISTICS_TOLERANCE = 1e-4
"""Relative. The terms summed here are float32, the writer's float64."""
CHECKSUM = slice(148, 156)
"""The checksum in a tar header: six octal digits; the sum is taken with spaces in its place."""
EXPONENTS: dict[str, tuple[type[np.generic], int]] = {
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
}
"""Exponent bits, all set in NaN and infinity. Ten times as fast as `np.isfinite`."""


@dataclass
class _Shard:
    """Faults and totals of a shard."""

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
        """Adds a fault of the shard, or of one of its records."""
        self.num_faults += 1
        if self.num_faults <= MAX_FAULTS:
            self.faults.append(f"{self.path}: " + (f"key {key!r}: " if key else "") + fault)


Advance = Callable[[int], object]


def verify(
    folder: Path,
    *,
    jobs: int = 1,
    advance: Advance = lambda num_bytes: None,
    place_of_key: dict[str, Path] | None = None,
) -> Iterator[str]:
    """Yields one line per fault of a set or bucketed set: place, expected, found.

    `jobs` threads check the shards; the order of the faults does not depend on their number.
    `advance` is called, from any thread, with the number of bytes read since its last call.
    `place_of_key` receives the shard of each key.
    """
    place_of_key = {} if place_of_key is None else place_of_key
    if holds_buckets(folder):
        yield from _verify_buckets(folder, place_of_key, jobs, advance)
    else:
        yield from _verify_set(folder, place_of_key, jobs, advance)


def _verify_buckets(
    folder: Path, place_of_key: dict[str, Path], jobs: int, advance: Advance
) -> Iterator[str]:
    path = folder / BUCKETS_NAME
    try:
        listed = Buckets.load(folder)
    except FormatError as error:
        yield str(error)
        return
    names = {bucket.name for bucket in listed.buckets} | {BUCKETS_NAME}
    names |= {listed.quarantine.name} if listed.quarantine else set()
    yield from _check_form(path, listed.dump(), names)
    manifests = []
    for bucket in listed.buckets:
        manifest = yield from _verify_set(folder / bucket.name, place_of_key, jobs, advance)
        if manifest is not None:
            sha256 = hash_file(folder / bucket.name / MANIFEST_NAME)
            yield from check_bucket(str(folder), bucket, manifest, sha256)
            manifests.append((bucket.name, manifest))
    if manifests:
        yield from disagreements(str(folder), manifests)
    if listed.quarantine is not None:
        place = folder / listed.quarantine.name
        yield from _check_quarantine(place, listed.quarantine, listed.num_quarantined, place_of_key)
    elif listed.version_1 is not None:
        yield from _check_absent(path, listed.version_1.quarantined, place_of_key)


def _check_form(path: Path, expected: str, names: set[str]) -> Iterator[str]:
    """Checks a file's exact formatting, and that its folder contains only `names`."""
    if path.read_bytes() != expected.encode():
        yield f"{path}: expected the writer's formatting, found other spacing or order"
    if (path.parent / PROGRESS_DIR).is_dir():
        return  # the set is complete, but stage one is extending it, or was killed
    for stray in sorted({other.name for other in path.parent.iterdir()} - names):
        yield f"{path.parent / stray}: not listed in {path.name}; expected only files that are"


def _verify_set(
    folder: Path, place_of_key: dict[str, Path], jobs: int, advance: Advance
) -> Generator[str, None, Manifest | None]:
    """Yields the faults of one set, adds its keys to `place_of_key`, returns its manifest."""
    try:
        manifest = Manifest.load(folder)
    except FormatError as error:
        yield str(error)
        return None
    path = folder / MANIFEST_NAME
    names = {entry.name for entry in manifest.files} | {MANIFEST_NAME}
    yield from _check_form(path, manifest.dump(), names)
    yield from _check_small(folder, manifest)
    rows = None
    try:
        rows = read_sums(folder, manifest) if manifest.shard_sums else None
    except FormatError as error:
        yield str(error)
    total = _Shard(path, manifest.layouts[0], manifest.latent_kind)
    for number, shard in zip(
        manifest.shards.numbers.tolist(),
        _check_shards(folder, manifest, jobs, advance),
        strict=True,
    ):
        yield from shard.faults
        if shard.num_faults > MAX_FAULTS:
            yield f"{shard.path}: and {shard.num_faults - MAX_FAULTS} more faults"
        yield from _check_keys(shard, place_of_key)
        if rows is not None and not shard.num_faults:
            yield from _check_sums(folder / SUMS_NAME, rows, number, shard)
        total.num_captions += shard.num_captions
        total.num_truncated += shard.num_truncated
        total.sums += shard.sums
    yield from _check_totals(path, manifest, total)
    yield from _check_reasons(folder, manifest, place_of_key)
    return manifest


def _check_reasons(
    folder: Path, manifest: Manifest, place_of_key: dict[str, Path]
) -> Iterator[str]:
    """Checks the quarantined images of one set."""
    if manifest.quarantine is not None:
        path, num = folder / manifest.quarantine.name, manifest.num_quarantined
        yield from _check_quarantine(path, manifest.quarantine, num, place_of_key)
    elif manifest.version_2 is not None:
        path = folder / MANIFEST_NAME
        yield from _check_absent(path, manifest.version_2.quarantined, place_of_key)


def _check_quarantine(
    path: Path, entry: FileEntry, expected: int, place_of_key: Mapping[str, Path]
) -> Iterator[str]:
    """Checks a list of quarantined images: its bytes, their number, and that none has a record."""
    try:
        check_size(path.parent, entry)
        images = list(read_quarantine(path, entry))
        content = path.read_bytes()
    except FormatError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{path}: expected a readable file, found {error.strerror}"
        return
    if content != b"".join(image.line() for image in images):
        yield f"{path}: expected the writer's formatting, found other spacing or order"
    keys = [image.key for image in images]
    if (len(keys), len(set(keys))) != (expected, expected):
        yield f"{path}: expected {expected} different keys, found {len(set(keys))} in {len(keys)}"
    yield from _check_absent(path, dict.fromkeys(keys), place_of_key)


def _check_absent(
    path: Path, keys: Iterable[str], place_of_key: Mapping[str, Path]
) -> Iterator[str]:
    """Checks that quarantined images have no record."""
    for key in keys:
        if key in place_of_key:
            yield (
                f"{path}: key {key!r}: expected no record of a quarantined image, found one in "
                f"{place_of_key[key]}"
            )


def _check_sums(path: Path, rows: NDArray[Any], number: int, shard: _Shard) -> Iterator[str]:
    """Checks the row of a sound shard in shard_sums.npy."""
    if number >= len(rows):
        yield f"{path}: expected a row for each planned shard, found {len(rows)}"
        return
    row, sums = rows[number], shard.sums
    expected = (shard.num_captions, shard.num_truncated, sums.count)
    found = tuple(row[name].item() for name in ("captions", "truncated", "count"))
    if found != expected:
        yield f"{path}: row {number}: expected the counts {expected}, found {found}"
        return
    unit = math.sqrt(sums.count) * np.sqrt(sums.squares)  # at least the sum of magnitudes
    pairs = (("total", sums.total, unit), ("squares", sums.squares, np.array(sums.squares)))
    for name, new, scale in pairs:
        if not (np.abs(row[name] - new) <= STATISTICS_TOLERANCE * scale).all():
            yield f"{path}: row {number}: {name}: expected {new}, found {tuple(row[name].tolist())}"


def _check_small(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Checks the .npy files beside the shards."""
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
        elif name.endswith("_scale") and array.min() <= 0:
            yield f"{path}: expected scales above 0, found {array.min()}"
        elif name == "empty_tokens" and array.min() < 0:
            yield f"{path}: expected ids of at least 0, found {array.min()}"


def _check_shards(
    folder: Path, manifest: Manifest, jobs: int, advance: Advance
) -> Iterator[_Shard]:
    def check(entry: ShardEntry) -> _Shard:
        return _check_shard(folder, entry, manifest, advance)

    if jobs == 1:
        yield from map(check, manifest.shards)
        return
    pending: deque[Future[_Shard]] = deque()  # few, because a set may have a million shards
    with ThreadPoolExecutor(jobs) as pool:  # threads suffice: hashing and numpy release the GIL
        for entry in manifest.shards:
            pending.append(pool.submit(check, entry))
            if len(pending) > 2 * jobs:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def _check_shard(folder: Path, entry: ShardEntry, manifest: Manifest, advance: Advance) -> _Shard:
    layout = manifest.layouts[entry.layout]
    shard = _Shard(folder / entry.name, layout, manifest.latent_kind)
    try:
        check_size(folder, entry)
        sha256 = _read(shard, entry.records, advance)
        if sha256 != entry.sha256:
            shard.num_faults += 1
            shard.faults.insert(0, hash_fault(shard.path, entry, sha256))
    except FormatError as error:
        shard.num_faults += 1
        shard.faults.append(str(error))
    except OSError as error:
        shard.fault(f"expected a readable file, found {error.strerror}")
    return shard


def _read(shard: _Shard, num_records: int, advance: Advance) -> str:
    """Checks all bytes of a shard in one pass and returns their sha256."""
    record_bytes = shard.layout.record_bytes
    buffer = np.empty((max(1, READ_BYTES // record_bytes), record_bytes), np.uint8)
    digest = hashlib.sha256()
    with shard.path.open("rb") as file:
        for first in range(0, num_records, len(buffer)):
            block = buffer[: num_records - first]
            num_bytes = file.readinto(block.data)
            if num_bytes != block.nbytes:
                raise FormatError(f"{shard.path}: the file was truncated while it was read")
            digest.update(block.data)
            _check_block(shard, block)
            advance(num_bytes)
        end = file.read()
    digest.update(end)
    advance(len(end))
    if any(end):
        shard.fault("expected only zeros after the last record, found other bytes")
    return digest.hexdigest()


def _check_block(shard: _Shard, block: NDArray[np.uint8]) -> None:
    """Checks whole records (N, record_bytes)."""
    keys = [key_of(name.tobytes()) for name in block[:, :NAME_BYTES]]
    for key in keys:
        if not KEY_PATTERN.fullmatch(key):
            shard.fault(f"expected a key of the form {KEY_PATTERN.pattern}", key=key)
    for name in shard.layout.fields:
        _check_member(shard, name, keys, block)
    _check_values(shard, keys, block)
    documents = _view(block, shard.layout.fields["json"], np.uint8)
    for key, document in zip(keys, documents, strict=True):
        _check_meta(shard, key, document.tobytes())
    shard.keys += keys


def _check_member(shard: _Shard, name: str, keys: list[str], block: NDArray[np.uint8]) -> None:
    """Checks headers and padding of a member; layout and key determine every byte."""
    part = shard.layout.fields[name]
    start, end = part.offset_bytes - part.header_bytes, part.offset_bytes + part.num_bytes
    members = [f"{key}.{member_of(name)}" for key in keys]
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
            f"field {name}: expected only zeros after the data, found other bytes", key=keys[row]
        )


def _difference(expected: NDArray[np.uint8], found: NDArray[np.uint8], start: int) -> str:
    """Describes where two tar headers differ: in the name, or else the first difference."""
    (places,) = np.nonzero(expected != found)
    if places[0] < NAME_BYTES:
        old, new = (
            header[:NAME_BYTES].tobytes().rstrip(b"\0").decode("ascii", "backslashreplace")
            for header in (expected, found)
        )
        return f"expected member {old!r} at byte {start}, found {new!r}"
    first, last = int(places[0]), int(places[-1])
    old_bytes, new_bytes = (header[first : last + 1].tobytes() for header in (expected, found))
    return f"expected {old_bytes!r} at byte {first} of the tar header, found {new_bytes!r}"


def _tar_headers(names: Sequence[str], num_bytes: int) -> NDArray[np.uint8]:
    """Returns the tar headers (N, 512) of files of one size."""
    headers = np.tile(_tar_header(num_bytes), (len(names), 1))
    encoded = np.array([name.encode("ascii", "replace") for name in names], f"S{NAME_BYTES}")
    headers[:, :NAME_BYTES] = encoded.view(np.uint8).reshape(-1, NAME_BYTES)
    headers[:, CHECKSUM] = ord(" ")  # the sum is taken with spaces here
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
    for name, part in fields.items():
        if part.dtype not in EXPONENTS:
            continue
        dtype, exponent = EXPONENTS[part.dtype]
        for row in _rows((_view(block, part, dtype) & exponent) == exponent):
            finite[row] &= name != "latent"
            shard.fault(
                f"field {name}: expected finite values, found NaN or infinity", key=keys[row]
            )
    for row in _rows(_view(block, fields["tokens"], np.int32) < 0):
        shard.fault("field tokens: expected ids of at least 0, found a negative one", key=keys[row])
    latents = _view(block, fields["latent"], np.float16)[finite]
    if len(latents):  # without records that have NaN, which is a fault already
        stored = latents.reshape(-1, *fields["latent"].shape)
        shard.sums += LatentSums.of(stored, shard.kind, np.float32)


def _check_meta(shard: _Shard, key: str, content: bytes) -> None:
    try:
        meta = load_json(content, "field json")
        captions, truncated = meta["captions"], meta["truncated"]
    except FormatError as error:
        shard.fault(str(error), key=key)
        return
    except (KeyError, TypeError) as error:
        shard.fault(f"field json: expected captions and truncated, found {error!r}", key=key)
        return
    num_captions = shard.layout.num_captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        shard.fault(f"field json: expected a list of captions, found {show(captions)}", key=key)
    elif len(captions) != num_captions:
        shard.fault(f"field json: expected {num_captions} captions, found {len(captions)}", key=key)
    elif not isinstance(truncated, list) or any(n not in range(num_captions) for n in truncated):
        shard.fault(
            f"field json: truncated: expected indices of captions, found {show(truncated)}", key=key
        )
    else:
        shard.num_captions += len(captions)
        shard.num_truncated += len(truncated)


def _check_keys(shard: _Shard, place_of_key: dict[str, Path]) -> Iterator[str]:
    """Checks that a shard's keys are unique in the set."""
    for key in shard.keys:
        place = f"{shard.path}: key {key!r}"
        if key in place_of_key:
            yield f"{place}: expected a unique key, found it in {place_of_key[key]} too"
        place_of_key[key] = shard.path


def _check_totals(path: Path, manifest: Manifest, found: _Shard) -> Iterator[str]:
    """Checks the manifest's totals and statistics against those of all shards."""
    for name in ("num_captions", "num_truncated"):
        expected = getattr(found, name)
        if getattr(manifest, name) != expected:
            yield f"{path}: {name}: expected {expected}, found {getattr(manifest, name)}"
    if not found.sums.count:
        return
    computed, stored = latent_statistics(found.sums), manifest.latent_statistics
    scale = np.abs(computed.mean) + np.array(computed.std)
    units = {"mean": scale, "std": scale, "scaling_factor": computed.scaling_factor}
    for name, unit in units.items():
        new, old = np.array(getattr(computed, name)), np.array(getattr(stored, name))
        place = f"{path}: latent_statistics: {name}"
        if new.shape != old.shape or not (np.abs(new - old) <= STATISTICS_TOLERANCE * unit).all():
            yield f"{place}: expected {new.tolist()}, found {old.tolist()}"


def _view(block: NDArray[np.uint8], part: Field, dtype: type[np.generic]) -> NDArray[Any]:
    """Returns a field of some records, flattened: (N, bytes / size of dtype)."""
    data = block[:, part.offset_bytes : part.offset_bytes + part.num_bytes]
    return data.view(np.dtype(dtype).newbyteorder("<"))


def _rows(wrong: NDArray[np.bool_]) -> list[int]:
    """Returns the indices of records (N, ...) with any fault."""
    return np.flatnonzero(wrong.any(1)).tolist() if wrong.any() else []


def main(prog: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = _parse_arguments(prog)
    folders: list[Path] = arguments.folders
    for folder in folders:
        if not folder.is_dir():
            print(f"error: {folder}: no such folder", file=sys.stderr)
            return 2
    lock = threading.Lock()
    with tqdm(
        total=sum(path.stat().st_size for folder in folders for path in folder.rglob("*.tar")),
        desc="verify",
        unit="B",
        unit_scale=True,
        ncols=80,
        disable=True if arguments.quiet else None,
    ) as bar:

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        lines, num_faults = _verify_all(folders, arguments.jobs, advance, bar.write)
    print("\n".join(lines))
    return 1 if num_faults else 0


def _verify_all(
    folders: Sequence[Path], jobs: int, advance: Advance, write: Callable[[str], object]
) -> tuple[list[str], int]:
    """Writes the faults of all sets; returns lines of results and notes, and the faults' number."""
    results, notes, total = [], list[str](), 0
    set_of_key: dict[str, Path] = {}
    for folder in folders:
        num_faults, place_of_key = 0, dict[str, Path]()
        for fault in verify(folder, jobs=jobs, advance=advance, place_of_key=place_of_key):
            num_faults += 1
            write(printable(f"fault: {fault}"))
        what = f"{num_faults} faults" if num_faults else f"{_count(folder)}, no faults"
        results.append(f"{folder}: {what}")
        total += num_faults
        duplicates = None if num_faults else find_duplicates(folder)
        if duplicates is not None and duplicates.num:
            notes.append(f"{duplicates}")
        if len(folders) > 1:  # else nobody needs a second table of all keys
            notes += _shared_keys(folder, place_of_key, set_of_key)
    if len(folders) > 1 and not total:
        notes += _compare_sets(folders)
    return [*(printable(f"note: {note}") for note in notes), *results], total


def _shared_keys(
    folder: Path, place_of_key: Mapping[str, Path], set_of_key: dict[str, Path]
) -> Iterator[str]:
    """Yields a note for each earlier set that has keys of this one, and adds this one's keys."""
    shared: dict[Path, list[str]] = {}
    for key in place_of_key:
        if set_of_key.setdefault(key, folder) != folder:
            shared.setdefault(set_of_key[key], []).append(key)
    for other, keys in shared.items():
        yield (
            f"{folder}: {len(keys)} keys are in {other} too, such as {keys[0]!r}; trained on as "
            "one, these sets have a record for each"
        )


def _compare_sets(folders: Sequence[Path]) -> Iterator[str]:
    """Yields the reason why some sets cannot be trained on as one, or the images they share."""
    try:
        opened = [
            (open_buckets if holds_buckets(folder) else open_shards)(folder, verify="none")
            for folder in folders
        ]
        join_sets([str(folder) for folder in folders], opened)
        found = compare_images([part for one in opened for part in one.sets])
        if found is not None and found.num:
            yield f"of all sets, {found}"
    except ValueError as error:
        yield f"these sets cannot be trained on as one: {error}"


def _count(folder: Path) -> str:
    """Describes the size of a set without faults."""
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
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folder with manifest.json or buckets.json",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="threads (default: one per CPU)"
    )
    parser.add_argument("--quiet", action="store_true", help="hide the progress bar")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, found {arguments.jobs}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
