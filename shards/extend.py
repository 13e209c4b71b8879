"""Extends a finished set: further shards, or new versions of some, that appear all at once.

    staging = staging_folder(folder)       # its shards are written like those of an unfinished set
    stage_manifest(folder, provenance, ...)  # the extended set's tables and manifest
    commit(folder)                           # moves all of it in

Until `commit` a reader sees the old set. If only shards were added, it sees the old set or the new
one at any moment. If shards were replaced, the folder has no manifest while files move, so that no
manifest ever lists files that are not there. `commit` can be repeated after a kill.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.files import sync_folder, write_file
from latent_t2i.shards.parsing import load_json
from latent_t2i.shards.quarantine import QUARANTINE_NAME, Quarantined, read_quarantine
from latent_t2i.shards.reader import NAME_BYTES, key_of, load_array, small_arrays
from latent_t2i.shards.schema import (
    MANIFEST_NAME,
    PROGRESS_DIR,
    Example,
    Layout,
    Manifest,
    Part,
    Provenance,
)
from latent_t2i.shards.shard_sums import SUMS_NAME, read_sums, sums_of
from latent_t2i.shards.shard_table import shard_name
from latent_t2i.shards.writer import (
    STAGING_DIR,
    TABLE_NAME,
    FoundScale,
    ShardReport,
    merge_reports,
    read_report,
    remove_tree,
)

TABLE_PATTERN = re.compile(r"(shards|shard_sums)(-\d+)?\.npy|quarantine(-\d+)?\.jsonl")


def staging_folder(folder: Path) -> Path:
    """Returns where the new files of a set are written."""
    return folder / PROGRESS_DIR / STAGING_DIR


def stage_manifest(
    folder: Path,
    provenance: Provenance,
    manifest: Manifest,
    *,
    num_shards: int,
    quarantined: Mapping[str, str],
    left_out: Mapping[int, Mapping[str, str]],
    parts: Sequence[Part],
) -> Manifest:
    """Writes the tables of an extended set to its staging folder; returns the new manifest.

    Args:
        folder: The folder of the set.
        provenance: That of the set, with its source as it is now.
        manifest: That of the set before.
        num_shards: Number of shards of the extended set. Each has a report in the staging folder or
            is in the set already.
        quarantined: The reason for each image that is in no shard, by key.
        left_out: The same for images of shards that are new versions of older ones, but were not
            tried again, by shard and key.
        parts: The runs that made the set.
    """
    staging = staging_folder(folder)

    def reports() -> Iterator[ShardReport]:
        older = _finished_reports(folder, manifest)
        for number in range(num_shards):
            before, report = next(older, None), read_report(staging, number)
            if report is not None:
                others = dict(left_out.get(number, {}))
                yield replace(report, quarantined=report.quarantined | others)
            elif before is not None:
                yield before
            else:
                raise ValueError(f"{staging}: shard {number} of {num_shards} is not finished")

    names = ("fields", "empty_text", "empty_tokens", "text_scale")
    return merge_reports(
        staging,
        provenance,
        reports(),
        num_shards=num_shards,
        quarantined=quarantined,
        small_files={name: getattr(manifest, name) for name in names},
        parts=parts,
    )


def _finished_reports(folder: Path, manifest: Manifest) -> Iterator[ShardReport]:
    """Yields the reports of a finished set's shards, made from its tables."""
    reasons: dict[int | None, dict[str, str]] = {}
    for item in read_finished_quarantine(folder, manifest):
        reasons.setdefault(item.shard, {})[item.key] = item.reason
    table = manifest.shards
    for number, row in enumerate(read_sums(folder, manifest)):
        name = shard_name(number)
        # A shard without records is not in the table.
        entry = next((table[place] for place in table.find([name])), None)
        yield ShardReport(
            name=name,
            bytes=entry.bytes if entry else 0,
            sha256=entry.sha256 if entry else "",
            layout=manifest.layouts[entry.layout if entry else 0],
            records=entry.records if entry else 0,
            num_truncated=int(row["truncated"]),
            quarantined=reasons.get(number, {}),
            sums=sums_of(row),
            begun_ns=0,
        )


def read_finished_quarantine(folder: Path, manifest: Manifest) -> Iterator[Quarantined]:
    """Yields the quarantined images of a set of version 3."""
    assert manifest.quarantine is not None
    return read_quarantine(folder / manifest.quarantine.name, manifest.quarantine)


def read_finished_scale(folder: Path, manifest: Manifest) -> FoundScale | None:
    """Returns the scale of a finished set's int8 text, bit for bit; None for float16 text."""
    if (scale := manifest.text_scale) is None:
        return None
    values = load_array(folder, *small_arrays(manifest)["text_scale"])
    return FoundScale(values, scale.relative_error, scale.num_captions)


def finish_staging(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of an extended set to the staging folder, which is complete then."""
    manifest.check(staging_folder(folder) / MANIFEST_NAME)
    write_file(staging_folder(folder) / MANIFEST_NAME, manifest.dump().encode())


def commit(folder: Path) -> bool:
    """Moves a complete extension into its set; returns whether there was one.

    Call it under the folder's lock, also at the start of a run, to finish the commit of a killed
    one.
    """
    staging = staging_folder(folder)
    if not (staging / MANIFEST_NAME).exists():
        if (folder / MANIFEST_NAME).exists():  # a process may have been killed before this step
            _remove_old_tables(folder)
        return False
    _move_in(folder, staging)
    _remove_old_tables(folder)
    remove_staging(folder)
    return True


def _move_in(folder: Path, staging: Path) -> None:
    """Moves the tables, the shards with a report, and last the manifest into the set.

    Other files are those of a process on another host, whose lock may not be visible, and which
    was killed or writes the same extension. It may also move the same files at this moment.
    """
    manifest = (staging / MANIFEST_NAME).read_bytes()
    reported = (f"{path.stem}.tar" for path in (staging / PROGRESS_DIR).glob("shard-*.json"))
    tables = (path.name for path in staging.iterdir() if TABLE_PATTERN.fullmatch(path.name))
    new = [name for name in chain(reported, tables) if (staging / name).exists()]
    old = folder / MANIFEST_NAME
    is_replaced = any((folder / name).exists() for name in new)
    if is_replaced and old.exists() and old.read_bytes() != manifest:
        old.unlink(missing_ok=True)
        sync_folder(folder)
    for name in new:
        _move(staging / name, folder / name)
    sync_folder(folder)
    _move(staging / MANIFEST_NAME, old)
    sync_folder(folder)


def _move(source: Path, target: Path) -> None:
    """Renames a file, unless another process has just done so."""
    try:
        source.replace(target)
    except FileNotFoundError:
        if not target.exists():
            raise


def _remove_old_tables(folder: Path) -> None:
    """Deletes the tables of a set before it was extended, which have other names."""
    manifest = Manifest.load(folder)
    if not manifest.parts:
        return
    listed = {entry.name for entry in (manifest.shard_table, *manifest.other_files) if entry}
    for name in (TABLE_NAME, SUMS_NAME, QUARANTINE_NAME):
        stem, _, ending = name.partition(".")
        for path in folder.glob(f"{stem}*.{ending}"):
            if path.name not in listed and TABLE_PATTERN.fullmatch(path.name):
                path.unlink()


def remove_staging(folder: Path) -> None:
    """Deletes an extension that is not complete, or what a complete one has left."""
    remove_tree(staging_folder(folder))


def read_rows(path: Path, layout: Layout, num_records: int) -> NDArray[np.uint8]:
    """Maps the records of a shard.  # (records, record_bytes)"""
    return np.memmap(path, np.uint8, "r", shape=(num_records, layout.record_bytes))


def row_key(row: NDArray[np.uint8]) -> str:
    """Returns a record's key."""
    return key_of(row[:NAME_BYTES].tobytes())


def row_json(row: NDArray[np.uint8], layout: Layout) -> dict[str, Any]:
    """Returns a record's JSON. Raises FormatError if it is none."""
    part = layout.fields["json"]
    content = row[part.offset_bytes :][: part.num_bytes].tobytes()
    document: dict[str, Any] = load_json(content, f"key {row_key(row)!r}: field json")
    return document


def row_example(row: NDArray[np.uint8], layout: Layout) -> Example:
    """Returns a record as it was given to the shard writer."""
    arrays: dict[str, Any] = {}
    for name, part in layout.fields.items():
        content = row[part.offset_bytes :][: part.num_bytes]
        arrays[name] = np.frombuffer(content.tobytes(), part.dtype).reshape(part.shape)
    del arrays["json"]
    base = {name: arrays.pop(name) for name in ("latent", "text", "tokens")}
    return Example(key=row_key(row), meta=row_json(row, layout), **base, extra=arrays)
