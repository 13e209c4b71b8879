"""Prints what a set of shards contains, in 80 columns.

    python -m shards.summary shards/data/demo/train
    python -m shards.summary FOLDER FOLDER ...

Sizes come from the manifest. Caption lengths and latent statistics come from the tokens and latents
of a sample of records, spread evenly over the set. For a bucketed set a table of the buckets comes
first, then the summary of each; for several folders, a table of their records. The exit code is 2
if a set cannot be opened.
"""

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latent_t2i.shards.buckets import BucketedShards, Buckets, holds_buckets, open_buckets
from latent_t2i.shards.duplicates import compare_images
from latent_t2i.shards.latent_stats import LatentSums, latent_statistics
from latent_t2i.shards.parsing import printable
from latent_t2i.shards.reader import ShardSet, map_shard, open_shards
from latent_t2i.shards.schema import BLOCK_BYTES, MEMBERS, FieldSpec, Identity, Manifest

COLUMNS = 80
INDENT = 18
BAR_WIDTH = 32
MAX_BINS = 16
MAX_REASONS = 10


@dataclass(frozen=True)
class Sample:
    """Caption lengths and latent statistics of some records."""

    records: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Tokens of each caption, including the start and end tokens."""
    sums: LatentSums
    low: NDArray[Any]  # (C,) smallest posterior mean
    high: NDArray[Any]  # (C,) largest posterior mean


def describe(shards: ShardSet, *, num_sample: int, num_captions: int) -> Iterator[str]:
    """Yields the lines that describe a set."""
    manifest = shards.manifest
    yield str(shards.folder)
    yield from _describe_origin(manifest)
    yield from _describe_content(shards)
    yield from _describe_bytes(shards)
    sample = read_sample(shards, num_sample)
    yield from _describe_lengths(sample, manifest)
    yield from _describe_latents(sample, manifest)
    if shards.text_scale is not None:
        yield from _describe_scale(manifest, shards.text_scale.numpy())
    yield from _describe_captions(shards, num_captions)
    if manifest.num_quarantined:
        yield from _describe_reasons("quarantined", manifest.read_quarantined())


def spread(num_records: int, num: int) -> NDArray[np.int64]:
    """Returns up to `num` record numbers, spread evenly from the first to the last."""
    return np.unique(np.linspace(0, num_records - 1, min(num, num_records)).astype(np.int64))


def read_sample(shards: ShardSet, num: int) -> Sample:
    """Reads the tokens and latents of up to `num` records."""
    manifest = shards.manifest
    records = spread(len(shards), num)
    lengths, sums, means = [], LatentSums(), []
    starts = np.concatenate([[0], np.cumsum(manifest.shards.records)])
    shard_of = shards.shards_of(records)
    for index in np.unique(shard_of).tolist():
        entry, rows = manifest.shards[index], records[shard_of == index] - starts[index]
        fields = map_shard(shards.folder / entry.name, entry, manifest.layouts[entry.layout])
        lengths.append(count_tokens(fields["tokens"][rows], shards.empty_tokens.numpy()).ravel())
        latents = fields["latent"][rows]  # (N, views, 2C or C, h, w)
        sums += LatentSums.of(latents, manifest.latent_kind, np.float32)
        means.append(latents[:, :, : manifest.latent_channels])
    low = np.min([part.min((0, 1, 3, 4)) for part in means], axis=0)
    high = np.max([part.max((0, 1, 3, 4)) for part in means], axis=0)
    return Sample(records, np.concatenate(lengths), sums, low, high)


def count_tokens(tokens: NDArray[np.int32], empty: NDArray[np.int32]) -> NDArray[np.int64]:
    """Counts tokens (..., T) up to and including the first end token; T where there is none.

    `empty` (T,) are the tokens of the empty prompt: its second token is the end token. Padding is
    not counted, even if the padding token is the end token.
    """
    if len(empty) < 2:
        return np.full(tokens.shape[:-1], tokens.shape[-1])
    ends = tokens == empty[1]
    lengths: NDArray[np.int64] = np.where(ends.any(-1), ends.argmax(-1) + 1, tokens.shape[-1])
    return lengths


def _describe_origin(manifest: Manifest) -> Iterator[str]:
    yield from _title("origin")
    yield from _entry("manifest", f"version {manifest.schema_version}, {manifest.sha256[:12]}")
    for name in ("vae", "text_encoder", "tokenizer"):
        yield from _entry(name, _identity(getattr(manifest, name)))
    for name in ("preprocessing", "source"):
        yield from _entry(name, _settings(getattr(manifest, name)))


def _identity(identity: Identity) -> str:
    revision = f" at {identity.revision}" if identity.revision else ""
    return f"{identity.name}{revision} ({identity.sha256[:12]})"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value[:12] if key == 'sha256' else value}" for key, value in settings.items()
    )


def _describe_content(shards: ShardSet) -> Iterator[str]:
    manifest = shards.manifest
    yield from _title("content")
    num_quarantined, num_shards = manifest.num_quarantined, len(manifest.shards)
    quarantined = f", {num_quarantined:,} quarantined" if num_quarantined else ""
    yield from _entry("records", f"{manifest.num_records:,} in {num_shards:,} shards{quarantined}")
    by_captions: Counter[int] = Counter()
    for layout, num in zip(manifest.layouts, records_by_layout(manifest), strict=True):
        by_captions[layout.num_captions] += num
    counts = ", ".join(f"{by_captions[num]:,} records of {num}" for num in sorted(by_captions))
    yield from _entry("captions", f"{manifest.num_captions:,}: {counts}")
    share = manifest.num_truncated / manifest.num_captions
    cut = f"{manifest.num_truncated:,} captions ({share:.2%}) at {manifest.max_tokens} tokens"
    yield from _entry("truncated", cut)
    duplicates = compare_images([shards])
    known = "the records have no hashes of their images" if duplicates is None else duplicates
    yield from _entry("duplicates", str(known))
    fields = manifest.layouts[0].fields
    shapes = {name: " x ".join(map(str, part.shape[1:])) for name, part in fields.items()}
    views = f"{manifest.num_views} x {shapes['latent']}"
    yield from _entry("latent", f"{fields['latent'].dtype} {views}, {manifest.latent_kind}")
    for name in ("text", "tokens"):
        yield from _entry(name, f"{fields[name].dtype} captions x {shapes[name]}")
    for spec in manifest.fields:
        yield from _entry(spec.name, _describe_field(spec))
    json_bytes = sorted({layout.fields["json"].num_bytes for layout in manifest.layouts})
    yield from _entry("json", f"padded to {' or '.join(map(str, json_bytes))} bytes")


def _describe_field(spec: FieldSpec) -> str:
    shape = " x ".join(map(str, spec.shape))
    scaled = f", scaled by {spec.scale.name}" if spec.scale else ""
    return f"{spec.dtype} {shape} per {spec.per}{scaled}, made by {_identity(spec.made_by)}"


def records_by_layout(manifest: Manifest) -> list[int]:
    """Returns the number of records of each layout."""
    found = np.zeros(len(manifest.layouts), np.int64)
    np.add.at(found, manifest.shards.layouts, manifest.shards.records)
    return found.tolist()


def member_bytes(manifest: Manifest) -> dict[str, int]:
    """Returns the bytes of each field over all shards, and of headers and padding."""
    names = [*MEMBERS, *(spec.name for spec in manifest.fields)]
    sizes = dict.fromkeys([*names, "tar headers", "array headers", "padding"], 0)
    for layout, num in zip(manifest.layouts, records_by_layout(manifest), strict=True):
        for name, part in layout.fields.items():
            sizes[name] += num * part.num_bytes
            sizes["array headers"] += num * part.header_bytes
        sizes["tar headers"] += num * len(layout.fields) * BLOCK_BYTES
    sizes["padding"] = int(manifest.shards.bytes.sum()) - sum(sizes.values())
    return sizes


def _describe_bytes(shards: ShardSet) -> Iterator[str]:
    manifest = shards.manifest
    sizes = member_bytes(manifest)
    listed = (*manifest.small_files, *manifest.other_files)
    sizes["other files"] = sum(entry.bytes for entry in listed)
    sizes["other files"] += len(manifest.dump().encode())
    sizes["total"] = total = sum(sizes.values())
    yield from _title("bytes")
    for name, size in sizes.items():
        share, per_record = size / total, size / manifest.num_records
        yield f"  {name:<{INDENT - 2}}{size:>16,}{share:>9.2%}{per_record:>13,.0f} per record"


def _describe_lengths(sample: Sample, manifest: Manifest) -> Iterator[str]:
    yield from _title(
        f"caption lengths in tokens, including start and end ({len(sample.lengths):,} captions of "
        f"{len(sample.records):,} records)"
    )
    width = -(-manifest.max_tokens // MAX_BINS)
    counts = np.bincount((sample.lengths - 1) // width, minlength=-(-manifest.max_tokens // width))
    for number, count in enumerate(counts.tolist()):
        first = number * width + 1
        last = min(first + width - 1, manifest.max_tokens)
        label = f"{first}" if first == last else f"{first} to {last}"
        bar = "#" * round(BAR_WIDTH * count / counts.max())
        line = f"  {label:<{INDENT - 2}}{count:>9,}{count / len(sample.lengths):>9.2%}  {bar}"
        yield line.rstrip()
    lengths = sample.lengths
    yield from _entry("mean", f"{lengths.mean():.1f}, median {np.median(lengths):.0f}")


def _describe_latents(sample: Sample, manifest: Manifest) -> Iterator[str]:
    stored, found = manifest.latent_statistics, latent_statistics(sample.sums)
    yield from _title(f"latents, unscaled (all records | sample of {len(sample.records):,})")
    yield f"  {'channel':<9}{'mean':>11}{'std':>10}  |{'mean':>11}{'std':>10}{'min':>11}{'max':>11}"
    for channel in range(manifest.latent_channels):
        yield (
            f"  {channel:<9}{stored.mean[channel]:>11.4f}{stored.std[channel]:>10.4f}  |"
            f"{found.mean[channel]:>11.4f}{found.std[channel]:>10.4f}"
            f"{sample.low[channel]:>11.3f}{sample.high[channel]:>11.3f}"
        )
    factors = f"{stored.scaling_factor:.5f}; sample: {found.scaling_factor:.5f}"
    yield from _entry("scaling factor", factors)


def _describe_scale(manifest: Manifest, scale: NDArray[np.float32]) -> Iterator[str]:
    assert manifest.text_scale is not None
    measured = manifest.text_scale
    yield from _title("int8 text")
    over = f"over {measured.num_captions:,} captions"
    yield from _entry("relative error", f"{measured.relative_error:.4%} {over}")
    low, middle, high = np.quantile(scale, [0, 0.5, 1])
    values = f"{len(scale)} channels, {low:.5f} to {high:.5f}, median {middle:.5f}"
    yield from _entry("scales", values)


def _describe_captions(shards: ShardSet, num: int) -> Iterator[str]:
    if not num:
        return
    yield from _title("captions")
    records = spread(len(shards), num)
    for key, record in zip(shards.keys(records), records.tolist(), strict=True):
        yield f"  {_short(key, COLUMNS - 2)}"
        for caption in shards.meta(record)["captions"]:
            yield f"    {_short(caption, COLUMNS - 4)}"


def _describe_reasons(title: str, quarantined: Mapping[str, str]) -> Iterator[str]:
    if not quarantined:
        return
    yield from _title(f"{title}: {len(quarantined):,} images")
    reasons = Counter(quarantined.values()).most_common()
    for reason, count in reasons[:MAX_REASONS]:
        yield f"  {count:>7,}  {_short(reason, COLUMNS - 11)}"
    if len(reasons) > MAX_REASONS:
        yield f"  and {len(reasons) - MAX_REASONS:,} more reasons"


def _title(text: str) -> list[str]:
    return ["", *textwrap.wrap(text, COLUMNS)]


def _entry(name: str, text: str) -> list[str]:
    """Returns the lines of `  name   text`, wrapped under the text."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=f"  {name.replace('_', ' '):<{INDENT - 2}}",
        subsequent_indent=" " * INDENT,
    )


def _short(text: str, width: int) -> str:
    """Returns the text on one line, truncated to `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def describe_buckets(shards: BucketedShards) -> Iterator[str]:
    """Yields the lines that describe a bucketed set as a whole."""
    listed = shards.buckets
    yield shards.location
    yield from _title("buckets")
    yield from _entry("list", f"version {listed.schema_version}, {listed.sha256[:12]}")
    num_quarantined = listed.num_source - listed.num_records
    more = f", {num_quarantined:,} quarantined" if num_quarantined else ""
    yield from _entry("records", f"{listed.num_records:,} in {len(listed.buckets)} buckets{more}")
    for bucket, part in zip(listed.buckets, shards.sets, strict=True):
        _, height, width = part.manifest.latent_shape
        yield (
            f"  {bucket.name:<{INDENT - 2}}{bucket.records:>9,}"
            f"{bucket.records / listed.num_records:>9.2%}{bucket.quarantined:>9,} quarantined"
            f"   latents {width} x {height}"
        )
    yield from _describe_reasons("quarantined before bucketing", listed.read_quarantined())


def summarise(folder: Path, *, num_sample: int, num_captions: int) -> Iterator[str]:
    """Yields the lines that describe a folder: a set, or a bucketed set and each of its sets."""
    return map(printable, _summarise(folder, num_sample, num_captions))


def _summarise(folder: Path, num_sample: int, num_captions: int) -> Iterator[str]:
    folders = [folder]
    if holds_buckets(folder):
        shards = open_buckets(folder, verify="none")
        yield from describe_buckets(shards)
        yield ""
        folders = [folder / bucket.name for bucket in shards.buckets.buckets]
    for number, part in enumerate(folders):
        yield from [""] if number else []
        yield from describe(
            open_shards(part, verify="none"), num_sample=num_sample, num_captions=num_captions
        )


def summarise_all(folders: Sequence[Path], *, num_sample: int, num_captions: int) -> Iterator[str]:
    """Yields the lines that describe one or several folders."""
    if len(folders) > 1:
        sizes = {folder: count_records(folder) for folder in folders}
        total = sum(sizes.values())
        yield f"{len(folders)} sets, {total:,} records"
        for folder, num in sizes.items():
            yield printable(f"  {num:>{INDENT - 2},}{num / total:>9.2%}  {folder}")
        yield ""
    for number, folder in enumerate(folders):
        yield from [""] if number else []
        yield from summarise(folder, num_sample=num_sample, num_captions=num_captions)


def count_records(folder: Path) -> int:
    """Returns the number of records of a set or bucketed set."""
    kind = Buckets if holds_buckets(folder) else Manifest
    return kind.load(folder).num_records


def main(prog: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = _parse_arguments(prog)
    settings = {"num_sample": arguments.sample, "num_captions": arguments.captions}
    try:
        for line in summarise_all(arguments.folders, **settings):
            print(line)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse_arguments(prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m shards.summary",
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
    for name, default, about in (
        ("--sample", 1000, "records to read caption lengths and latents from"),
        ("--captions", 3, "records to print the captions of"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{about} (default: {default})")
    arguments = parser.parse_args()
    for name, least in (("sample", 1), ("captions", 0)):
        if (found := getattr(arguments, name)) < least:
            parser.error(f"--{name}: expected at least {least}, found {found}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
