"""What stage one tells people: the plan before, a bar meanwhile, the sum at the end; 80 columns."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_t2i.model.paths import format_bytes
from latent_t2i.pipeline.index import Index
from latent_t2i.pipeline.plan import SetPlan, bytes_by_member
from latent_t2i.shards.schema import Manifest

NUM_LISTED = 10
"""How many of the images left out are named."""
SOON_S = 10.0
"""Less is not worth a line."""


def bar(total: int | None, unit: str, task: str) -> Any:
    """Returns a progress bar, which does not show for what is done at once."""
    interval_s = 0.2 if sys.stderr.isatty() else 30.0  # a log needs fewer lines than a terminal
    return tqdm(total=total, unit=unit, desc=task, mininterval=interval_s, ncols=80, delay=0.5)


def no_bar(total: int | None, unit: str, task: str) -> Any:
    """Returns a bar that shows nothing: another process's does."""
    return tqdm(total=total, disable=True)


Bar = Callable[[int | None, str, str], Any]


class Meter:
    """Counts images on a bar, and tells once, after the first shard, how long the rest takes."""

    def __init__(self, shown: Any, total: int) -> None:
        self._bar = shown
        self._total = total
        self._began = time.perf_counter()
        self._num_skipped = 0
        self._is_told = False

    def add(self, num: int, num_skipped: int, *, num_bytes: int, num_shards: int) -> None:
        """Counts images done, some of them left out; bytes and shards are those written so far."""
        self._num_skipped += num_skipped
        text = f"{format_bytes(num_bytes)}, {self._num_skipped} left out"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(num)
        if num_shards and not self._is_told and not self._bar.disable:
            self._is_told = True
            seconds = time.perf_counter() - self._began
            rate = self._bar.n / seconds
            left_s = (self._total - self._bar.n) / rate
            if left_s > SOON_S:
                told = f"first shard after {duration(seconds)}: {rate:.0f} images/s, about "
                self._bar.write(f"{told}{duration(left_s)} to go", file=sys.stderr)


def plan_lines(index: Index, sets: Sequence[SetPlan], out: Path, free_bytes: int) -> str:
    """Says what will be written, before anything is encoded."""
    sizes = bytes_by_member(sets)
    shards = [shard for part in sets for shard in part.shards]
    waiting = len(index.quarantined)
    lines = {
        "images": f"{index.num_source} in" + (f", {waiting} cannot be used" if waiting else ""),
        "captions": f"{index.num_captions}, {index.num_cut} of them will be cut",
        "shards": f"{len(shards)} in {show(out)}",
        **({"buckets": _buckets(sets)} if sets[0].bucket else {}),
        "bytes": ", ".join(f"{name} {format_bytes(num)}" for name, num in sizes.items()),
        "in all": f"{format_bytes(sum(sizes.values()))}, free there {format_bytes(free_bytes)}",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def summary(manifests: Mapping[str, Manifest], lost: Mapping[str, str], out: Path) -> str:
    """Says what there is, in lines; the last accounts for each image.

    `manifests` are those of the buckets, or that of the one set; `lost` are the images that reached
    no bucket.
    """
    some = next(iter(manifests.values()))
    quarantined = dict(lost)
    for manifest in manifests.values():
        quarantined |= manifest.quarantined
    written = sum(manifest.num_records for manifest in manifests.values())
    num_captions = sum(manifest.num_captions for manifest in manifests.values())
    cut = sum(manifest.num_truncated for manifest in manifests.values())
    shards = [shard for manifest in manifests.values() for shard in manifest.shards]
    lines = {
        "shards": f"{len(shards)}, {format_bytes(sum(shard.bytes for shard in shards))}, "
        f"in {show(out)}",
        "captions": f"{num_captions}, {cut} cut at {some.max_tokens} tokens",
        "text": _describe_text(some),
        "latents": _describe_latents(manifests),
        "images": f"{written + len(quarantined)} in = {written} written"
        f" + {len(quarantined)} quarantined",
    }
    skipped = [f"left out    {line}" for line in first_of(quarantined)]
    return "\n".join([*skipped, *(f"{name:<12}{text}" for name, text in lines.items())])


def first_of(skipped: Mapping[str, str]) -> list[str]:
    """Returns the first images left out, each with its reason."""
    lines = [f"{key}: {reason}" for key, reason in list(skipped.items())[:NUM_LISTED]]
    more = len(skipped) - len(lines)
    return lines + ([f"and {more} more"] if more else [])


def show(path: Path) -> str:
    """Returns a path as short as it can be told from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def duration(seconds: float) -> str:
    """Returns a time as people read it."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _buckets(sets: Iterable[SetPlan]) -> str:
    return ", ".join(f"{part.bucket} {part.num_records}" for part in sets)


def _describe_text(manifest: Manifest) -> str:
    text = f"{manifest.text_dtype} {manifest.max_tokens}x{manifest.text_width}"
    scale = manifest.text_scale
    if scale is None:
        return text
    return f"{text}, relative error {scale.relative_error:.2%} on {scale.num_captions} captions"


def _describe_latents(manifests: Mapping[str, Manifest]) -> str:
    some = next(iter(manifests.values()))
    views = " of 2 views" if some.num_views == 2 else ""
    if len(manifests) > 1:
        return f"{some.latent_kind} of {len(manifests)} sizes{views}"
    latent = "x".join(map(str, some.latent_shape))
    factor = some.latent_statistics.scaling_factor
    return f"{some.latent_kind} {latent}{views}, suggested scaling factor {factor:.4f}"
