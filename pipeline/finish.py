"""The end of stage one: when all shards are there, whoever comes last adds them up."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from latent_t2i.pipeline import report
from latent_t2i.pipeline.config import PipelineConfig
from latent_t2i.pipeline.encode import Encoders, encode_captions
from latent_t2i.pipeline.index import Index
from latent_t2i.pipeline.plan import SetPlan
from latent_t2i.pipeline.processes import folder_lock
from latent_t2i.pipeline.provenance import make_provenance
from latent_t2i.pipeline.sets import all_targets, is_done
from latent_t2i.shards.buckets import finish_buckets
from latent_t2i.shards.schema import MANIFEST_NAME, Manifest
from latent_t2i.shards.writer import finish_set, read_report, read_text_scale


def finish(
    config: PipelineConfig, encoders: Encoders, index: Index, sets: Sequence[SetPlan], out: Path
) -> dict[str, Manifest]:
    """Writes the manifests and says what there is; nothing while shards are missing.

    Returns the manifests by bucket. Raises ValueError if too many images had to be left out.
    """
    with folder_lock(sets[0].folder):
        targets = all_targets(sets)
        left = sum(not is_done(target) for target in targets)
        if left:
            print(
                f"{left} of {len(targets)} shards are other processes' and not finished yet: the "
                "last of them writes the manifest; if one was stopped, give its command again"
            )
            return {}
        skipped = {part.bucket: reasons(part) for part in sets}
        lost = dict(index.quarantined)
        require_enough(merged([lost, *skipped.values()]), index, config, out)
        manifests = {}
        for part in reversed(sets):  # the first last: the lock goes with what it has in progress
            if part.bucket and len(skipped[part.bucket]) == part.num_records:
                lost |= skipped[part.bucket]  # a bucket without a record is none
                shutil.rmtree(part.folder)
            else:
                manifests[part.bucket] = finish_one(config, encoders, index, part)
        manifests = dict(sorted(manifests.items()))
        if sets[0].bucket:
            finish_buckets(out, list(manifests), quarantined=lost)
    print(report.summary(manifests, lost if sets[0].bucket else {}, out))
    return manifests


def finish_one(config: PipelineConfig, encoders: Encoders, index: Index, part: SetPlan) -> Manifest:
    """Writes the manifest of a set, unless it is there."""
    if (part.folder / MANIFEST_NAME).exists():
        return Manifest.load(part.folder)
    text, tokens, _ = encode_captions(encoders, [""])
    return finish_set(
        part.folder,
        make_provenance(config, encoders, index, part),
        num_shards=len(part.shards),
        quarantined={} if part.bucket else index.quarantined,
        empty_text=text[0],
        empty_tokens=tokens[0],
        text_scale=read_text_scale(part.folder) if config.text_dtype == "int8" else None,
    )


def reasons(part: SetPlan) -> dict[str, str]:
    """Returns what the shards of a set left out, and why."""
    if (part.folder / MANIFEST_NAME).exists():
        return Manifest.load(part.folder).quarantined
    reports = [read_report(part.folder, shard.index) for shard in part.shards]
    return merged(found.quarantined for found in reports if found is not None)


def merged(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Returns all reasons in one."""
    return {key: reason for part in parts for key, reason in part.items()}


def require_enough(
    skipped: Mapping[str, str], index: Index, config: PipelineConfig, out: Path
) -> None:
    """Raises ValueError if too many images are left out; all reasons are then in a file."""
    allowed = config.max_quarantined * index.num_source
    if len(skipped) <= allowed:
        return
    path = out.with_name(f"{out.name}-quarantined.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(skipped, indent=1), encoding="utf-8")
    raise ValueError(
        f"{len(skipped)} of {index.num_source} images have to be left out, --max-quarantined "
        f"{config.max_quarantined:g} allows {int(allowed)}: "
        f"{'; '.join(report.first_of(skipped))} (all in {path})"
    )
