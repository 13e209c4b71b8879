"""Text that stage one prints: plan, progress bar and summary; 80 columns wide."""

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
"""Number of quarantined images that are listed."""
MIN_ESTIMATE_S = 10.0
"""A shorter remaining time is not printed."""

Bar = Callable[[int | None, str, str], Any]


def bar(total: int | None, unit: str, task: str) -> Any:
    """Returns a progress bar, which stays hidden for tasks shorter than half a second."""
    interval_s = 0.2 if sys.stderr.isatty() else 30.0  # a log needs fewer lines than a terminal
    return tqdm(total=total, unit=unit, desc=task, mininterval=interval_s, ncols=80, delay=0.5)


def no_bar(total: int | None, unit: str, task: str) -> Any:
    """Returns a disabled bar: only the first process shows one."""
    return tqdm(total=total, disable=True)


class Meter:
    """Counts images on a bar and prints, after the first shard, how long the rest will take."""

    def __init__(self, shown: Any, total: int) -> None:
        self._bar = shown
        self._total = total
        self._start_s = time.perf_counter()
        self._num_skipped = 0
        self._has_estimated = False

    def add(self, num: int, num_skipped: int, *, num_bytes: int, num_shards: int) -> None:
        """Adds `num` images, of them `num_skipped` quarantined; bytes and shards are totals."""
        self._num_skipped += num_skipped
        text = f"{format_bytes(num_bytes)}, {self._num_skipped} quarantined"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(num)
        if num_shards and not self._has_estimated and not self._bar.disable:
            self._has_estimated = True
            seconds = time.perf_counter() - self._start_s
            rate = self._bar.n / seconds
            remaining_s = (self._total - self._bar.n) / rate
            if remaining_s > MIN_ESTIMATE_S:
                text = f"first shard after {duration(seconds)}: {rate:.0f} images/s, about "
                self._bar.write(f"{text}{duration(remaining_s)} remaining", file=sys.stderr)


def plan_lines(index: Index, sets: Sequence[SetPlan], out: str, room: str) -> str:
    """Returns the plan: what will be written, where, its size, and the `room` for it."""
    sizes = bytes_by_member(sets)
    num_shards = sum(len(part.shards) for part in sets)
    unusable = {"missing files": len(index.missing), "cannot be used": len(index.quarantined)}
    notes = [f"{num} {what}" for what, num in unusable.items() if num]
    lines = {
        "images": ", ".join([f"{index.num_source} in", *notes]),
        "captions": f"{index.num_captions}, {index.num_cut} of them will be truncated",
        "shards": f"{num_shards} in {out}",
        **({"buckets": _buckets(sets)} if sets[0].bucket else {}),
        "bytes": ", ".join(f"{name} {format_bytes(num)}" for name, num in sizes.items()),
        "total": f"{format_bytes(sum(sizes.values()))}, {room}",
    }
    return _lines(lines)


def growth_lines(work: SetPlan, changes: Sequence[str]) -> str:
    """Returns the plan of an extension: how the source has changed, and what will be written."""
    num_again = sum(shard.owner is not None for shard in work.shards)
    num_bytes = sum(shard.num_bytes for shard in work.shards)
    shards = f"{len(work.shards) - num_again} more, {num_again} again, {format_bytes(num_bytes)}"
    return "\n".join([*changes, _lines({"shards": shards})])


def summary(manifests: Mapping[str, Manifest], quarantined: Mapping[str, str], out: str) -> str:
    """Returns a summary of the finished sets in `out`; its last line accounts for each image.

    `quarantined` are the reasons of all sets, by file name.
    """
    first = next(iter(manifests.values()))
    written = sum(manifest.num_records for manifest in manifests.values())
    num_captions = sum(manifest.num_captions for manifest in manifests.values())
    num_cut = sum(manifest.num_truncated for manifest in manifests.values())
    num_shards = sum(len(manifest.shards) for manifest in manifests.values())
    num_bytes = sum(int(manifest.shards.bytes.sum()) for manifest in manifests.values())
    lines = {
        "shards": f"{num_shards}, {format_bytes(num_bytes)}, in {out}",
        "captions": f"{num_captions}, {num_cut} truncated at {first.max_tokens} tokens",
        "text": _describe_text(first),
        "latents": _describe_latents(manifests),
        "images": f"{written + len(quarantined)} in = {written} written"
        f" + {len(quarantined)} quarantined",
    }
    skipped = [f"quarantined {line}" for line in first_of(quarantined)]
    if skipped:
        how = "run the same command with --retry"
        if "" not in manifests:
            how = "encode them again with another --out"
        skipped.append(f"to retry    restore the images and {how}")
    return "\n".join([*skipped, _lines(lines)])


def first_of(reasons: Mapping[str, str]) -> list[str]:
    """Returns the first quarantined images, each with its reason."""
    lines = [f"{key}: {reason}" for key, reason in list(reasons.items())[:NUM_LISTED]]
    num_more = len(reasons) - len(lines)
    return lines + ([f"and {num_more} more"] if num_more else [])


def show(path: Path) -> str:
    """Returns a path relative to the current directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def duration(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _lines(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _buckets(sets: Iterable[SetPlan]) -> str:
    return ", ".join(f"{part.bucket} {part.num_records}" for part in sets)


def _describe_text(manifest: Manifest) -> str:
    text = f"{manifest.text_dtype} {manifest.max_tokens}x{manifest.text_width}"
    scale = manifest.text_scale
    if scale is None:
        return text
    return f"{text}, relative error {scale.relative_error:.2%} on {scale.num_captions} captions"


def _describe_latents(manifests: Mapping[str, Manifest]) -> str:
    first = next(iter(manifests.values()))
    views = f" of {first.num_views} views" if first.num_views > 1 else ""
    if len(manifests) > 1:
        return f"{first.latent_kind} of {len(manifests)} sizes{views}"
    latent = "x".join(map(str, first.latent_shape))
    factor = first.latent_statistics.scaling_factor
    return f"{first.latent_kind} {latent}{views}, suggested scaling factor {factor:.4f}"
