"""The end of stage one: once all shards are finished, the manifests and the summary.

Several processes may come here at the same time; the lock of the set's folder lets one of them
write, and the others find the set finished.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_t2i.pipeline import report
from latent_t2i.pipeline.encode import Apply, encode_empty_prompt
from latent_t2i.pipeline.index import Index
from latent_t2i.pipeline.plan import SetPlan, ShardPlan
from latent_t2i.pipeline.processes import ProcessInfo, folder_lock
from latent_t2i.pipeline.sets import all_shards, is_done
from latent_t2i.pipeline.upload import Mirror
from latent_t2i.shards.buckets import Buckets, finish_buckets
from latent_t2i.shards.duplicates import find_duplicates
from latent_t2i.shards.schema import BUCKETS_NAME, MANIFEST_NAME, Manifest
from latent_t2i.shards.writer import (
    begin_set,
    finish_set,
    read_report,
    read_text_scale,
    remove_progress,
)


def finish(
    out: Path,
    apply: Apply,
    index: Index,
    sets: Sequence[SetPlan],
    processes: ProcessInfo,
    mirror: Mirror | None,
    *,
    max_quarantined: float,
) -> dict[str, Manifest]:
    """Merges the shard reports into the manifests once all shards exist, and prints the summary.

    Returns the manifests by bucket. Raises ValueError if too many images are quarantined, or if a
    shard of this process is missing.
    """
    with folder_lock(out):
        if mirror:
            mirror.refresh(sets)
        listed = Buckets.load(out) if (out / BUCKETS_NAME).exists() else None
        no_bucket = dict(index.quarantined)
        if listed is not None:  # another process was first, and has deleted empty buckets
            names = {bucket.name for bucket in listed.buckets}
            sets = [part for part in sets if part.bucket in names]
            no_bucket |= listed.read_quarantined()
        if not all_done([shard for _, shard in all_shards(sets)], out, processes):
            return {}
        quarantined = {part.bucket: read_quarantined(part) for part in sets}
        merged = {**no_bucket}
        for reasons in quarantined.values():
            merged |= reasons
        require_enough(index, out, merged, max_quarantined=max_quarantined)
        manifests = {}
        for part in sets:
            # A set has at least one record, so an empty bucket is deleted.
            if part.bucket and len(quarantined[part.bucket]) == part.num_records:
                no_bucket |= quarantined[part.bucket]
                shutil.rmtree(part.folder)
                if mirror:
                    mirror.delete_set(part.folder)
            else:
                manifests[part.bucket] = finish_one(apply, part, index.quarantined)
                if mirror:
                    mirror.put_set(part.folder)
        manifests = dict(sorted(manifests.items()))
        if sets[0].bucket:
            finish_buckets(out, list(manifests), quarantined=no_bucket)
            if mirror:
                mirror.put_buckets()
            remove_progress(out)
    print_summary(index, manifests, merged, out, mirror)
    return manifests


def finish_one(apply: Apply, part: SetPlan, quarantined: Mapping[str, str]) -> Manifest:
    """Writes the manifest of a set, unless it exists."""
    # Checks once more that the shards are of these settings: some file systems do not lock.
    if manifest := begin_set(part.folder, part.provenance, in_use=True):
        if part.bucket:  # the locks are in the folder above
            remove_progress(part.folder)
        return manifest
    empty_text, empty_tokens = apply(encode_empty_prompt)
    is_int8 = part.provenance.text_dtype == "int8"
    return finish_set(
        part.folder,
        part.provenance,
        num_shards=len(part.shards),
        quarantined={} if part.bucket else quarantined,
        empty_text=empty_text,
        empty_tokens=empty_tokens,
        text_scale=read_text_scale(part.folder) if is_int8 else None,
    )


def all_done(shards: Sequence[ShardPlan], out: Path, processes: ProcessInfo) -> bool:
    """Returns whether all shards are finished; if not, says what is missing.

    Raises ValueError if a shard of this process is missing.
    """
    unfinished = [n for n, shard in enumerate(shards) if not is_done(shard)]
    if any(map(processes.owns, unfinished)):
        raise ValueError(
            f"{out}: shards that this process wrote have been deleted or changed since: start "
            "the same command again"
        )
    if unfinished:
        print(
            f"{len(unfinished)} of {len(shards)} shards, of other processes, are unfinished: "
            "the last process to finish writes the manifest; if one has stopped, start it again"
        )
    return not unfinished


def read_quarantined(part: SetPlan) -> dict[str, str]:
    """Returns the images that a set's shards quarantined, with the reasons."""
    if (part.folder / MANIFEST_NAME).exists():
        return Manifest.load(part.folder).read_quarantined()
    reasons: dict[str, str] = {}
    for shard in part.shards:
        found = read_report(part.folder, shard.index)
        reasons |= found.quarantined if found is not None else {}
    return reasons


def require_enough(
    index: Index, out: Path | None, reasons: Mapping[str, str], *, max_quarantined: float
) -> None:
    """Raises ValueError if too many images are quarantined; writes all reasons beside `out`."""
    allowed = int(max_quarantined * index.num_source)
    path = out and out.with_name(f"{out.name}-quarantined.json")
    if len(reasons) <= allowed:
        if path is not None:
            path.unlink(missing_ok=True)  # the reasons of an earlier, refused run
        return
    named = index.by_file_name(reasons)
    text = (
        f"{len(named)} of {index.num_source} images cannot be used, but --max-quarantined "
        f"{max_quarantined:g} allows {allowed}: {'; '.join(report.first_of(named))}"
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(named, indent=1), encoding="utf-8")
        text += f" (all in {path})"
    raise ValueError(text)


def show_set(index: Index, manifest: Manifest, text: str = "") -> dict[str, Manifest]:
    """Prints a finished set's summary, after a text, and returns its manifest."""
    if text:
        print(f"{text}: nothing to do")
    print_summary(index, {"": manifest}, manifest.read_quarantined(), manifest.folder, None)
    return {"": manifest}


def print_summary(
    index: Index,
    manifests: Mapping[str, Manifest],
    quarantined: Mapping[str, str],
    out: Path,
    mirror: Mirror | None,
) -> None:
    """Prints images that occur twice, and the summary; `quarantined` has all reasons by key."""
    duplicates = None if mirror else find_duplicates(out)  # which reads the shards
    if duplicates is not None and duplicates.num:
        for copy, original in duplicates.examples:
            print(f"duplicate   {copy} = {original}")
        print(f"duplicates  {duplicates.count()}")
    shown = mirror.url if mirror else report.show(out)
    print(report.summary(manifests, index.by_file_name(quarantined), shown))
