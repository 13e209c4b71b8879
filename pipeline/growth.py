"""Compares a source with the finished set made of it, and plans the shards that the set lacks.

New records become further shards (`--append`). A shard with a mended or changed image is encoded
again as a whole (`--retry`), because the last bits of a latent depend on its batch. Everything is
written beside the set (shards/extend.py), which changes only when all of it is complete.

An image is compared by its hash only if its file has changed since the shard was encoded, which
takes one look-up per file. The cost: changes of remote images go unnoticed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latent_t2i.pipeline.images import Picture, Preprocessing
from latent_t2i.pipeline.index import NO_SHARD, Index, TokenizedRecord
from latent_t2i.pipeline.plan import (
    ReplacedShard,
    SetPlan,
    ShardPlan,
    plan_replaced,
    plan_shards,
)
from latent_t2i.pipeline.sources.locators import (
    FileLocator,
    LocatorError,
    changed_ns,
    read_image_bytes,
)
from latent_t2i.pipeline.sources.record import RESERVED_FIELDS, Record
from latent_t2i.pipeline.workers import NOT_FINITE, load_record
from latent_t2i.shards.checks import check_size
from latent_t2i.shards.extend import (
    read_finished_quarantine,
    read_finished_scale,
    read_rows,
    remove_staging,
    row_json,
    row_key,
    stage_manifest,
    staging_folder,
)
from latent_t2i.shards.files import write_file
from latent_t2i.shards.parsing import from_json
from latent_t2i.shards.quarantine import Quarantined
from latent_t2i.shards.schema import (
    MANIFEST_NAME,
    PROGRESS_DIR,
    Layout,
    Manifest,
    Part,
    differences,
    read_document,
)
from latent_t2i.shards.shard_table import ShardEntry, shard_number
from latent_t2i.shards.writer import begin_set, keep_text_scale, without_device

MAX_SKEW_NS = 2_000_000_000
"""Allowed difference between the clocks of this machine and of the file server."""
NUM_NAMED = 3
"""Keys that a message names."""
PLAN_NAME = "plan.json"


@dataclass
class Found:
    """Records of one kind: how many, and the first keys."""

    num: int = 0
    keys: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        """Counts a record."""
        self.num += 1
        if len(self.keys) < NUM_NAMED:
            self.keys.append(key)

    def __str__(self) -> str:
        more = ", ..." if self.num > len(self.keys) else ""
        return f"{self.num} ({', '.join(self.keys)}{more})" if self.num else "0"


@dataclass
class Changes:
    """How a source differs from the set made of it."""

    new: Found = field(default_factory=Found)
    gone: Found = field(default_factory=Found)
    """Records of the set that are not in the source, or whose file is missing."""
    changed: Found = field(default_factory=Found)
    """Records with other captions or fields than in the set."""
    edited: Found = field(default_factory=Found)
    """Records with another image than in the set."""
    shards: dict[int, set[int]] = field(default_factory=dict)
    """Positions of the changed and edited records, by the number of their shard."""
    unusable: set[str] = field(default_factory=set)
    """Records of the set that cannot be used any more, for example without a caption."""

    def lines(self) -> list[str]:
        """Returns a phrase for each kind of change."""
        kinds = {
            "are new": self.new,
            "are gone": self.gone,
            "have other captions or fields": self.changed,
            "have another image": self.edited,
        }
        return [f"{found} {what}" for what, found in kinds.items() if found.num]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A finished set, and how the source differs from it."""

    part: SetPlan
    """The plan of the whole source, of which the settings are used."""
    manifest: Manifest
    quarantined: tuple[Quarantined, ...]
    changes: Changes

    @property
    def next_number(self) -> int:
        """The number of the set's next shard."""
        planned = [item.shard for item in self.quarantined if item.shard is not None]
        return max([int(self.manifest.shards.numbers[-1]), *planned]) + 1


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """What a run of `--append` or `--retry` does; it stays the same when the run is resumed."""

    manifest_sha256: str
    source_sha256: str
    flags: str
    """append, retry or both."""
    replaced: dict[str, list[int]]
    """The records that are copied, by the number of a shard that is encoded again."""

    @property
    def inputs(self) -> tuple[str, str, str]:
        """What must be equal for a run to resume another one."""
        return self.manifest_sha256, self.source_sha256, self.flags

    @property
    def options(self) -> str:
        """The flags as on the command line."""
        return " ".join(f"--{flag}" for flag in self.flags.split())


def find_finished(part: SetPlan, *, extend: bool) -> Manifest | None:
    """Returns the manifest of a finished set of the same settings; its source may differ.

    Returns None for an unfinished or bucketed set, one of format version 2, one that is stored
    elsewhere, and one that `begin_set` will refuse. Raises ValueError for a set of version 2, or of
    another kind of device, that is to be extended.
    """
    if part.bucket or not (part.folder / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(part.folder)
    if manifest.version_2 is not None and extend:
        raise ValueError(
            f"{part.folder}: --append and --retry need a set of format version 3, found version 2: "
            "encode the images as another set, with their own --source and --out"
        )
    same_source = replace(part.provenance, source=manifest.source)
    if manifest.version_2 is not None or differences(manifest, without_device(same_source)):
        return None
    if extend and differences(manifest, same_source):
        old, new = (found.preprocessing["device"] for found in (manifest, same_source))
        raise ValueError(
            f"{part.folder}: --append and --retry: expected the kind of device that encoded this "
            f"set, {old!r}, found {new!r}: use such a device, or encode the images as another set, "
            "with their own --source and --out"
        )
    return manifest if (part.folder / manifest.shards[0].name).exists() else None


def may_differ(index: Index, folder: Path, manifest: Manifest) -> bool:
    """Returns whether source and set may differ, as far as this is known without reading shards."""
    if index.sha256 != manifest.source["sha256"]:
        return True
    written_ns = min((folder / entry.name).stat().st_mtime_ns for entry in manifest.shards)
    return index.newest_ns + MAX_SKEW_NS >= written_ns


def compare(
    index: Index,
    part: SetPlan,
    manifest: Manifest,
    *,
    pool: Executor,
    progress: Callable[[int], object],
) -> Growth:
    """Compares each record of a set with the source, and assigns those of the source to shards.

    Records that stay without a shard are new. `progress` receives the number of records of each
    shard.
    """
    changes = Changes()
    for entry in manifest.shards:
        check_size(part.folder, entry)
        layout = manifest.layouts[entry.layout]
        _compare_shard(index, part.folder / entry.name, entry, layout, changes, pool)
        progress(entry.records)
    quarantined = tuple(read_finished_quarantine(part.folder, manifest))
    for item in quarantined:
        index.assign([item.key], NO_SHARD if item.shard is None else item.shard)
    changes.new = Found(*index.unassigned(NUM_NAMED))
    return Growth(part=part, manifest=manifest, quarantined=quarantined, changes=changes)


def _compare_shard(
    index: Index, path: Path, entry: ShardEntry, layout: Layout, changes: Changes, pool: Executor
) -> None:
    rows = read_rows(path, layout, entry.records)
    keys = list(map(row_key, rows))
    number = number_of(entry)
    index.assign(keys, number)
    records = list(index.find(keys))
    written_ns = path.stat().st_mtime_ns
    differs = partial(_find_change, layout=layout, written_ns=written_ns)
    for position, kind in enumerate(pool.map(differs, records, rows)):
        if keys[position] in index.quarantined:
            changes.unusable.add(keys[position])
        if kind is not None:
            getattr(changes, kind).add(keys[position])
        if kind in ("changed", "edited"):
            changes.shards.setdefault(number, set()).add(position)


def number_of(entry: ShardEntry) -> int:
    """Returns the number of a shard."""
    number = shard_number(entry.name)
    assert number is not None
    return number


def _is_missing(record: Record) -> bool:
    return isinstance(record.locator, FileLocator) and changed_ns(record.locator) is None


def _find_change(
    record: Record | None, row: NDArray[np.uint8], *, layout: Layout, written_ns: int
) -> Literal["gone", "changed", "edited"] | None:
    """Returns how a record of the source differs from the one in a shard."""
    if record is None or _is_missing(record):
        return "gone"
    meta = row_json(row, layout)
    own = {name: value for name, value in meta.items() if name not in RESERVED_FIELDS}
    if (meta["captions"], own) != (list(record.captions), dict(record.extra)):
        return "changed"
    is_other = may_be_edited(record, written_ns) and is_edited(record, meta)
    return "edited" if is_other else None


def may_be_edited(record: Record, since_ns: int) -> bool:
    """Returns whether the local file that holds an image has changed since a time."""
    changed = changed_ns(record.locator)
    return changed is not None and changed + MAX_SKEW_NS >= since_ns


def is_edited(record: Record, meta: Mapping[str, Any]) -> bool:
    """Returns whether an image that can be read has other bytes than that of a stored record."""
    try:
        content = read_image_bytes(record.locator)
    except (FileNotFoundError, LocatorError):
        return False
    return hashlib.sha256(content).hexdigest() != meta.get("image_sha256")


def make_plan(
    index: Index, grown: Growth, append: bool, retry: bool, *, pool: Executor
) -> StoredPlan:
    """Decides which shards are encoded again, and which of their records are copied.

    These are the shards with an image that can be read now but could not, or with a changed one.
    """
    replaced: dict[str, list[int]] = {}
    changed = grown.changes.shards
    if retry:
        mended = _find_mended(index, grown, pool)
        entries = {number_of(entry): entry for entry in grown.manifest.shards}
        for number in sorted(mended | changed.keys()):
            kept = _find_kept(index, grown, entries[number], pool) if number in entries else []
            if number in mended or changed[number] - {*kept}:
                replaced[str(number)] = kept
    return StoredPlan(
        manifest_sha256=grown.manifest.sha256,
        source_sha256=index.sha256,
        flags=_flags(append, retry),
        replaced=replaced,
    )


def _flags(append: bool, retry: bool) -> str:
    return " ".join(name for name, is_set in (("append", append), ("retry", retry)) if is_set)


def _find_mended(index: Index, grown: Growth, pool: Executor) -> set[int]:
    """Returns the shards with a quarantined image that can be read now."""
    written_ns = (grown.part.folder / MANIFEST_NAME).stat().st_mtime_ns
    planned = [item for item in grown.quarantined if item.shard is not None]
    layouts = grown.manifest.layouts
    num_captions = {
        number_of(entry): layouts[entry.layout].num_captions for entry in grown.manifest.shards
    }

    def is_mended(item: Quarantined, record: Record | None) -> bool:
        if record is None or item.shard is None:
            return False
        # With another number of captions it does not fit into its shard.
        if num_captions.get(item.shard, len(record.captions)) != len(record.captions):
            return False
        # Images whose values are not finite are readable: they are tried again if edited.
        if NOT_FINITE in item.reason and not may_be_edited(record, written_ns):
            return False
        return isinstance(load_record(record, grown.part.preprocessing), Picture)

    found = pool.map(is_mended, planned, index.find(item.key for item in planned))
    pairs = zip(planned, found, strict=True)
    return {item.shard for item, is_good in pairs if is_good and item.shard is not None}


def _find_kept(index: Index, grown: Growth, entry: ShardEntry, pool: Executor) -> list[int]:
    """Returns the positions of a shard's records that cannot be encoded again."""
    layout = grown.manifest.layouts[entry.layout]
    rows = read_rows(grown.part.folder / entry.name, layout, entry.records)
    is_kept = partial(_is_kept, layout=layout, preprocessing=grown.part.preprocessing)
    found = pool.map(is_kept, index.find(map(row_key, rows)), rows)
    return [position for position, kept in enumerate(found) if kept]


def _is_kept(
    record: Record | None, row: NDArray[np.uint8], *, layout: Layout, preprocessing: Preprocessing
) -> bool:
    """Returns whether a record of a shard cannot be encoded again, so that it is copied."""
    if record is None or len(record.captions) != layout.num_captions:
        return True
    try:
        content = read_image_bytes(record.locator)
    except (FileNotFoundError, LocatorError):
        return True
    if hashlib.sha256(content).hexdigest() == row_json(row, layout).get("image_sha256"):
        return False
    return not isinstance(load_record(record, preprocessing), Picture)


def begin_growth(
    index: Index,
    grown: Growth,
    append: bool,
    retry: bool,
    *,
    latent_shape: tuple[int, int, int, int],
    text_shape: tuple[int, int],
    pool: Executor,
    in_use: bool,
) -> SetPlan | None:
    """Plans the shards to write, and prepares the staging folder. Call it under the set's lock.

    Returns None if there is nothing to do. The plan of an interrupted run with the same flags and
    source is kept. Raises ValueError if another process extends the set with other flags or of
    another source.
    """
    folder = grown.part.folder
    staging = staging_folder(folder)
    stored = read_plan(staging)
    wanted = (grown.manifest.sha256, index.sha256, _flags(append, retry))
    if staging.exists() and (stored is None or stored.inputs != wanted):
        if stored is not None and in_use:
            raise ValueError(
                f"{folder}: another process extends this set with other flags or of another "
                "source: wait until it ends, or stop it"
            )
        remove_staging(folder)
        stored = None
    stored = stored or make_plan(index, grown, append, retry, pool=pool)
    plan: dict[str, Any] = {
        "latent_shape": latent_shape,
        "text_shape": text_shape,
        "provenance": grown.part.provenance,
    }
    shards = [
        plan_replaced(index, number, staging, num_captions=num_captions, old=old, **plan)
        for number, num_captions, old in _find_replaced(index, grown, stored)
    ]
    if not append:
        index.close_unassigned()
    if retry:
        index.assign((item.key for item in grown.quarantined if item.shard is None), None)
    shards += plan_shards(index, "", staging, first_index=grown.next_number, **plan)
    if not shards and not (append and any(new_quarantined(index, grown))):
        return None
    begin_set(staging, grown.part.provenance, in_use=in_use)
    write_file(staging / PROGRESS_DIR / PLAN_NAME, json.dumps(asdict(stored)).encode())
    if scale := read_finished_scale(folder, grown.manifest):
        keep_text_scale(staging, scale)
    return replace(grown.part, folder=staging, shards=tuple(shards))


def _find_replaced(
    index: Index, grown: Growth, plan: StoredPlan
) -> Iterator[tuple[int, int, ReplacedShard | None]]:
    """Yields number, number of captions and old version of the shards that are encoded again."""
    entries = {number_of(entry): entry for entry in grown.manifest.shards}
    for number, kept in ((int(name), kept) for name, kept in plan.replaced.items()):
        if entry := entries.get(number):
            layout = grown.manifest.layouts[entry.layout]
            path = grown.part.folder / entry.name
            rows = read_rows(path, layout, entry.records)[kept]
            index.assign(map(row_key, rows), NO_SHARD)
            yield (
                number,
                layout.num_captions,
                ReplacedShard(
                    path=path, layout=layout, num_records=entry.records, kept=tuple(kept)
                ),
            )
        else:  # none of its images could be read
            keys = (item.key for item in grown.quarantined if item.shard == number)
            yield number, next(len(found.captions) for found in index.find(keys) if found), None


def read_plan(staging: Path) -> StoredPlan | None:
    """Returns the plan of an interrupted or concurrent run; None if there is none."""
    path = staging / PROGRESS_DIR / PLAN_NAME
    return from_json(StoredPlan, read_document(path), str(path)) if path.exists() else None


def remove_outdated(folder: Path) -> None:
    """Deletes an extension of what the set was before, or one that was killed before its plan.

    Call it under the set's lock if no other process uses the set.
    """
    staging = staging_folder(folder)
    if staging.exists() and (folder / MANIFEST_NAME).exists():
        stored = read_plan(staging)
        if stored is None or stored.manifest_sha256 != Manifest.load(folder).sha256:
            remove_staging(folder)


def new_quarantined(index: Index, grown: Growth) -> dict[str, str]:
    """Returns the unusable records of the source that are new, with their reasons."""
    # A repeated key has its record's number in the source, which changes with the records before.
    known = Counter(item.key.partition("#")[:2] for item in grown.quarantined)
    keys = {item.key for item in grown.quarantined} | grown.changes.unusable
    found = {key: reason for key, reason in index.quarantined.items() if key not in keys}
    known.subtract(key.partition("#")[:2] for key in index.quarantined.keys() & keys)
    new = {}
    for key, reason in found.items():
        if "#" in key and known[key.partition("#")[:2]] > 0:
            known[key.partition("#")[:2]] -= 1
        else:
            new[key] = reason
    return new


def require_unchanged(index: Index, grown: Growth) -> None:
    """Raises ValueError if the source differs from the set in a way that was not accepted before.

    A set keeps records that are gone or have changed when it is extended; the listing of the source
    is then that of the set.
    """
    found = grown.changes
    if index.sha256 == grown.manifest.source["sha256"] and not found.edited.num:
        return
    if not (lines := found.lines()):
        return  # the order, or file names
    tries = ""
    if num := len(grown.quarantined):
        tries = f", and tries the {num} quarantined images again"
    raise ValueError(
        f"{grown.part.folder}: the source has changed since this set was made of it: "
        f"{', '.join(lines)}. --append adds the new ones as further shards; --retry encodes the "
        f"shards of changed ones again{tries}; or choose another --out"
    )


def describe(grown: Growth, append: bool, retry: bool) -> list[str]:
    """Returns what happens to the records that differ, a line for each kind."""
    found = grown.changes
    lines = [f"{found.new} new: {'appended' if append else 'left out, without --append'}"]
    lines += [f"{found.gone} no longer in the source: kept as encoded"]
    changed = "encoded again, where possible" if retry else "kept as encoded, without --retry"
    lines += [f"{kind} changed since: {changed}" for kind in (found.changed, found.edited)]
    return [line for line in lines if not line.startswith("0 ")]


def describe_nothing(grown: Growth, append: bool, retry: bool) -> str:
    """Returns that nothing is to do, and what differs nevertheless."""
    kinds = {"no new records": append, "nothing to try again": retry}
    nothing = ", ".join(text for text, is_asked in kinds.items() if is_asked)
    return "\n".join([*describe(grown, append, retry), nothing])


def stage_growth(index: Index, grown: Growth, work: SetPlan, append: bool, retry: bool) -> Manifest:
    """Merges the new shards with the old ones; returns the manifest, which is not written yet."""
    old, folder = grown.manifest, grown.part.folder
    loose = {item.key: item.reason for item in grown.quarantined if item.shard is None}
    if retry:
        usable = {record.key for record in index.find(loose) if record is not None}
        loose = {key: reason for key, reason in loose.items() if key not in usable}
    added = new_quarantined(index, grown) if append else {}
    left_out: dict[int, dict[str, str]] = {}
    for shard in work.shards:
        if shard.owner is not None:
            tried = {record.key for record, _ in records_of(index, shard)}
            left_out[shard.index] = {
                item.key: item.reason
                for item in grown.quarantined
                if item.shard == shard.index and item.key not in tried
            }
    num_new = sum(shard.owner is None for shard in work.shards)
    provenance = grown.part.provenance
    # Without --append, new records are still to come: the set's source is not the present one.
    if not append and (grown.changes.new.num or new_quarantined(index, grown)):
        provenance = replace(provenance, source=old.source)
    parts = list(old.parts)
    if num_new:
        parts = parts or [make_part(old.source, 0, grown.next_number)]
        parts.append(make_part(grown.part.provenance.source, grown.next_number, num_new))
    return stage_manifest(
        folder,
        provenance,
        old,
        num_shards=grown.next_number + num_new,
        quarantined=loose | added,
        left_out=left_out,
        parts=parts,
    )


def make_part(source: Mapping[str, str | int], first_shard: int, num_shards: int) -> Part:
    """Returns a part of a set, made of a source as the provenance describes it."""
    return Part(
        kind=str(source["kind"]),
        num_records=int(source["num_records"]),
        sha256=str(source["sha256"]),
        first_shard=first_shard,
        num_shards=num_shards,
    )


def records_of(index: Index, shard: ShardPlan) -> list[TokenizedRecord]:
    """Returns the records that a shard is planned to hold, in order, without copied ones."""
    return index.records(
        shard.bucket, shard.num_captions, shard.first, shard.last, shard=shard.owner
    )
