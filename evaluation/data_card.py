"""The report's data card: what the training shards contain."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.remote.transport import is_remote
from latent_t2i.shards.schema import Identity
from latent_t2i.shards.summary import read_sample

NUM_SAMPLE = 1000
MAX_BARS = 12
MAX_REASONS = 10


def locations_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the training sets that a run's settings name; older runs have one, as text."""
    named = config.get("shards") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def data_card(locations: Sequence[str]) -> dict[str, Any]:
    """Returns what sets of shards contain, or `missing`: the reason why that is unknown.

    Caption lengths are of a sample of records, in tokens with the start and end tokens.
    """
    if not locations:
        return {"missing": "no training shards are known for this run"}
    for location in locations:
        if is_remote(location):
            return {"missing": f"the training shards are remote: {location}"}
        if not Path(location).is_dir():
            return {"missing": f"the training shards are not on this machine: {location}"}
    try:
        sets, reasons = [], Counter[str]()
        for location in locations:
            found, of_set = _open(Path(location))
            sets += found
            reasons += of_set
        return _describe(", ".join(locations), sets, reasons)
    except (ValueError, OSError) as error:
        return {"missing": f"the training shards cannot be read: {error}"}


def _open(folder: Path) -> tuple[list[ShardSet], Counter[str]]:
    """Returns the sets of a folder and the reasons of quarantined images, by number of images."""
    if not holds_buckets(folder):
        sets, reasons = [open_shards(folder, verify="none")], Counter[str]()
    else:
        bucketed = open_buckets(folder, verify="none")
        sets, reasons = list(bucketed.sets), Counter(bucketed.buckets.read_quarantined().values())
    for part in sets:
        reasons.update(part.manifest.read_quarantined().values())
    return sets, reasons


def _describe(location: str, sets: list[ShardSet], reasons: Counter[str]) -> dict[str, Any]:
    manifests = [part.manifest for part in sets]
    first = manifests[0]
    num_records = sum(manifest.num_records for manifest in manifests)
    num_captions = sum(manifest.num_captions for manifest in manifests)
    num_truncated = sum(manifest.num_truncated for manifest in manifests)
    num_bytes = sum(int(manifest.shards.bytes.sum()) for manifest in manifests)
    num_shards = sum(len(manifest.shards) for manifest in manifests)
    rows = {
        "shards": location,
        "records": f"{num_records:,} in {num_shards:,} shards, {num_bytes / 1e6:,.1f} MB",
        "captions": f"{num_captions:,}, of which {num_truncated:,} are truncated at "
        f"{first.max_tokens} tokens",
        "views": f"{first.num_views} per image",
        "latents": ", ".join(
            dict.fromkeys(" x ".join(map(str, manifest.latent_shape)) for manifest in manifests)
        ),
        "autoencoder": _identity(first.vae),
        "text encoder": _identity(first.text_encoder),
        "preprocessing": _settings(first.preprocessing),
        "source": _settings(first.source),
        "quarantined": f"{sum(reasons.values()):,} images",
    }
    lengths = np.concatenate([_lengths(part, len(sets)) for part in sets])
    return {
        "rows": rows,
        "reasons": reasons.most_common(MAX_REASONS),
        "num_more_reasons": max(0, len(reasons) - MAX_REASONS),
        "lengths": _histogram(lengths),
        "mean_length": float(lengths.mean()),
        "num_sampled": len(lengths),
    }


def _lengths(shards: ShardSet, num_sets: int) -> np.ndarray:
    return read_sample(shards, max(1, NUM_SAMPLE // num_sets)).lengths


def _identity(identity: Identity) -> str:
    return f"{identity.name} ({identity.sha256[:12]})"


def _settings(settings: Any) -> str:
    return ", ".join(
        f"{key} {str(value)[:12] if key == 'sha256' else value}" for key, value in settings.items()
    )


def _histogram(lengths: np.ndarray) -> list[tuple[str, int]]:
    """Returns the number of captions for each range of lengths."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // MAX_BARS)
    counts = np.bincount((lengths - low) // width).tolist()
    starts = [low + width * number for number in range(len(counts))]
    names = [str(s) if width == 1 else f"{s} to {min(s + width - 1, high)}" for s in starts]
    return list(zip(names, counts, strict=True))
