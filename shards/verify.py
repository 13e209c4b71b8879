"""Checks a set of shards through and through, and prints every fault.

    python -m shards.verify shards/data/demo/train

Reads every byte: the manifest's own hash and form, each file's size and sha256, each tar member's
name and place, array headers, values that are not finite, tokens, JSON, duplicate keys, and the
sums in the manifest. Exit code 0 without a fault, 1 with one, 2 if there is no such folder.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.reader import check_hash, check_record, check_size, map_shard
from shards.schema import MANIFEST_NAME, MEMBERS, FormatError, Layout, Manifest, ShardEntry


@dataclass
class _Found:
    """What adds up over the shards."""

    place_of_key: dict[str, str] = field(default_factory=dict)
    num_captions: int = 0
    num_truncated: int = 0


def verify(folder: Path) -> Iterator[str]:
    """Yields a line for each fault of a set, with shard, key, field, expected and found."""
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
    yield from _verify_empty_prompt(folder, manifest)
    found = _Found()
    for entry in manifest.shards:
        yield from _verify_shard(folder, entry, manifest.layouts[entry.layout], found)
    for name in ("num_captions", "num_truncated"):
        expected = getattr(found, name)
        if getattr(manifest, name) != expected:
            yield f"{path}: {name}: expected {expected}, found {getattr(manifest, name)}"


def _verify_empty_prompt(folder: Path, manifest: Manifest) -> Iterator[str]:
    fields = manifest.layouts[0].fields
    for name, entry in (("text", manifest.empty_text), ("tokens", manifest.empty_tokens)):
        try:
            check_size(folder, entry)
            check_hash(folder, entry)
            array = np.load(folder / entry.name, allow_pickle=False)
        except ValueError as error:
            yield str(error)
            continue
        shape = fields[name].shape[1:]
        if array.shape != shape or not np.isfinite(array).all():
            yield f"{folder / entry.name}: expected finite {shape}, found {array.shape}"


def _verify_shard(folder: Path, entry: ShardEntry, layout: Layout, found: _Found) -> Iterator[str]:
    path = folder / entry.name
    try:
        check_size(folder, entry)
    except FormatError as error:
        yield str(error)
        return
    try:
        check_hash(folder, entry)
    except FormatError as error:
        yield str(error)  # and goes on: what follows may name the record
    yield from _verify_members(path, entry, layout)
    try:
        yield from _verify_records(path, entry, layout, found)
    except FormatError as error:
        yield str(error)


def _verify_records(path: Path, entry: ShardEntry, layout: Layout, found: _Found) -> Iterator[str]:
    fields = map_shard(path, entry, layout)
    for record in range(entry.records):
        key = check_record(path, fields["record"][record], layout)
        place = f"{path}: key {key!r}"
        if key in found.place_of_key:
            yield f"{place}: expected once, found in {found.place_of_key[key]} too"
        found.place_of_key[key] = str(path)
        for name in ("latent", "text"):
            if not np.isfinite(fields[name][record]).all():
                yield f"{place}: field {name}: expected finite values, found NaN or infinity"
        if (fields["tokens"][record] < 0).any():
            yield f"{place}: field tokens: expected ids from 0, found a negative one"
        yield from _verify_meta(place, fields["json"][record], layout, found)


def _verify_members(path: Path, entry: ShardEntry, layout: Layout) -> Iterator[str]:
    """Walks the tar as any other reader would and compares where members lie."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        yield f"{path}: expected a tar, found {error}"
        return
    if len(members) != entry.records * len(MEMBERS):
        yield f"{path}: expected {entry.records * len(MEMBERS)} members, found {len(members)}"
        return
    starts = [part.offset_bytes - part.header_bytes for part in layout.fields.values()]
    for number, member in enumerate(members):
        record, position = divmod(number, len(MEMBERS))
        expected = record * layout.record_bytes + starts[position]
        if member.offset_data != expected:
            yield f"{path}: {member.name}: expected at byte {expected}, found {member.offset_data}"


def _verify_meta(
    place: str, content: NDArray[np.uint8], layout: Layout, found: _Found
) -> Iterator[str]:
    try:
        meta: Any = json.loads(content.tobytes())
        captions, truncated = list(meta["captions"]), list(meta["truncated"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"{place}: field json: expected captions and truncated, found {error!r}"
        return
    if len(captions) != layout.num_captions:
        yield (
            f"{place}: field json: expected {layout.num_captions} captions, found {len(captions)}"
        )
    found.num_captions += len(captions)
    found.num_truncated += len(truncated)


def main() -> int:
    """Runs the check for the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that holds the manifest")
    folder: Path = parser.parse_args().folder
    if not folder.is_dir():
        print(f"error: {folder}: no such folder", file=sys.stderr)
        return 2
    num_faults = 0
    for fault in verify(folder):
        num_faults += 1
        print(f"fault: {fault}")
    if num_faults:
        print(f"{folder}: {num_faults} faults")
        return 1
    manifest = Manifest.load(folder)
    print(f"{folder}: {manifest.num_records} records in {len(manifest.shards)} shards, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
