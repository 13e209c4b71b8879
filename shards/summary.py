"""Prints what is in a set of shards, in 80 columns, and draws some of it.

    python -m shards.summary shards/data/demo/train
    python -m shards.summary shards/data/demo/train --decode 16 --out sheet.png

Sizes come from the manifest; caption lengths and latents from a sample of records spread evenly
over the set, of which nothing but tokens and latents is read. `--decode` needs the VAE, so its two
helpers import diffusers and Pillow, which the rest of this package does without. Of a bucketed set
a table comes first, then each of its sets, with a sheet of its own. Exit code 2 for a set that
cannot be opened or a VAE that cannot be had.

The module bears the name of a standard one, which is safe since shards/ itself is never on the
import path, but for `python shards/NAME.py`: that is refused below.
"""

import argparse
import hashlib
import logging
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.shards.buckets import BucketedShards, holds_buckets, open_buckets
from latent_t2i.shards.reader import ShardSet, map_shard, open_shards
from latent_t2i.shards.schema import BLOCK_BYTES, MEMBERS, Identity, Manifest
from latent_t2i.shards.verify import LatentSums

ROOT = Path(__file__).resolve().parent.parent
"""Where an encoder's name is looked for after the current directory, as stage one does it."""
COLUMNS = 80
INDENT = 18
BAR = 32
MAX_BINS = 16
MAX_REASONS = 10
AUTOENCODERS = (
    "AutoencoderKL",
    "AsymmetricAutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "VQModel",
)
DECODE_BATCH = 8

CELL_PX = 256
PADDING_PX = 12
FONT_PX = 14
LINE_PX = 18
MAX_LINES = 3
SHEET_COLUMNS = 4
INK, PAPER = (30, 30, 34), (250, 250, 248)


@dataclass(frozen=True)
class Sample:
    """What was read of some records."""

    records: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Tokens of each caption, start and end included."""
    sums: LatentSums
    low: NDArray[Any]  # (C,), the least posterior mean
    high: NDArray[Any]  # (C,), the greatest


def describe(shards: ShardSet, *, num_sample: int, num_captions: int) -> Iterator[str]:
    """Yields the lines that tell of a set."""
    manifest = shards.manifest
    yield str(shards.folder)
    yield from _describe_origin(manifest)
    yield from _describe_content(manifest)
    yield from _describe_bytes(shards)
    sample = read_sample(shards, num_sample)
    yield from _describe_lengths(sample, manifest)
    yield from _describe_latents(sample, manifest)
    if shards.text_scale is not None:
        yield from _describe_scale(manifest, shards.text_scale.numpy())
    yield from _describe_captions(shards, num_captions)
    yield from _describe_reasons("left out", manifest.quarantined)


def spread(num_records: int, num: int) -> NDArray[np.int64]:
    """Returns up to `num` record numbers, spread evenly from the first to the last."""
    return np.unique(np.linspace(0, num_records - 1, min(num, num_records)).astype(np.int64))


def read_sample(shards: ShardSet, num: int) -> Sample:
    """Reads tokens and latents of some records."""
    manifest = shards.manifest
    records = spread(len(shards), num)
    lengths, sums = [], LatentSums()
    low, high = (
        np.full(manifest.latent_channels, np.inf),
        np.full(manifest.latent_channels, -np.inf),
    )
    starts = np.cumsum([0, *(entry.records for entry in manifest.shards)])
    for index, entry in enumerate(manifest.shards):
        rows = records[(records >= starts[index]) & (records < starts[index + 1])] - starts[index]
        if not len(rows):
            continue
        fields = map_shard(shards.folder / entry.name, entry, manifest.layouts[entry.layout])
        lengths.append(count_tokens(fields["tokens"][rows], shards.empty_tokens.numpy()).ravel())
        latents = fields["latent"][rows]  # (N, views, 2C or C, h, w)
        sums.add(latents, manifest.latent_kind)
        means = latents[:, :, : manifest.latent_channels]
        low, high = np.fmin(low, means.min((0, 1, 3, 4))), np.fmax(high, means.max((0, 1, 3, 4)))
    return Sample(records, np.concatenate(lengths), sums, low, high)


def count_tokens(tokens: NDArray[np.int32], empty: NDArray[np.int32]) -> NDArray[np.int64]:
    """Counts tokens (..., T) up to the end token, which the empty prompt's (T,) has second.

    Start and end count; padding, which may be the end token again, does not. A row without an end
    token has T.
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


def _describe_content(manifest: Manifest) -> Iterator[str]:
    yield from _title("content")
    left_out = f", {len(manifest.quarantined):,} left out" if manifest.quarantined else ""
    num_shards = len(manifest.shards)
    yield from _entry("records", f"{manifest.num_records:,} in {num_shards:,} shards{left_out}")
    by_captions: Counter[int] = Counter()
    for entry in manifest.shards:
        by_captions[manifest.layouts[entry.layout].num_captions] += entry.records
    counts = ", ".join(f"{by_captions[num]:,} records of {num}" for num in sorted(by_captions))
    yield from _entry("captions", f"{manifest.num_captions:,}: {counts}")
    share = manifest.num_truncated / manifest.num_captions
    cut = f"{manifest.num_truncated:,} captions ({share:.2%}) at {manifest.max_tokens} tokens"
    yield from _entry("truncated", cut)
    fields = manifest.layouts[0].fields
    shapes = {name: " x ".join(map(str, part.shape[1:])) for name, part in fields.items()}
    views = f"{manifest.num_views} x {shapes['latent']}"
    yield from _entry("latent", f"{fields['latent'].dtype} {views}, {manifest.latent_kind}")
    for name in ("text", "tokens"):
        yield from _entry(name, f"{fields[name].dtype} captions x {shapes[name]}")
    rooms = sorted({layout.fields["json"].num_bytes for layout in manifest.layouts})
    yield from _entry("json", f"padded to {' or '.join(map(str, rooms))} bytes")


def member_bytes(manifest: Manifest) -> dict[str, int]:
    """Returns how many bytes of all shards each field takes, and what is around them."""
    sizes = dict.fromkeys([*MEMBERS, "tar headers", "array headers", "padding"], 0)
    for entry in manifest.shards:
        layout = manifest.layouts[entry.layout]
        for name, part in layout.fields.items():
            sizes[name] += entry.records * part.num_bytes
            sizes["array headers"] += entry.records * part.header_bytes
        sizes["tar headers"] += entry.records * len(MEMBERS) * BLOCK_BYTES
    sizes["padding"] = sum(entry.bytes for entry in manifest.shards) - sum(sizes.values())
    return sizes


def _describe_bytes(shards: ShardSet) -> Iterator[str]:
    manifest = shards.manifest
    sizes = member_bytes(manifest)
    sizes["other files"] = sum(entry.bytes for entry in manifest.small_files)
    sizes["other files"] += len(manifest.dump().encode())
    sizes["all"] = total = sum(sizes.values())
    yield from _title("bytes")
    for name, size in sizes.items():
        per_record = size / manifest.num_records
        yield f"  {name:<{INDENT - 2}}{size:>16,}{size / total:>9.2%}{per_record:>16,.0f} a record"


def _describe_lengths(sample: Sample, manifest: Manifest) -> Iterator[str]:
    yield from _title(
        f"caption lengths in tokens, with start and end ({len(sample.lengths):,} captions of "
        f"{len(sample.records):,} records)"
    )
    width = -(-manifest.max_tokens // MAX_BINS)
    counts = np.bincount((sample.lengths - 1) // width, minlength=-(-manifest.max_tokens // width))
    for number, count in enumerate(counts.tolist()):
        first = number * width + 1
        last = min(first + width - 1, manifest.max_tokens)
        label = f"{first}" if first == last else f"{first} to {last}"
        bar = "#" * round(BAR * count / counts.max())
        line = f"  {label:<{INDENT - 2}}{count:>9,}{count / len(sample.lengths):>9.2%}  {bar}"
        yield line.rstrip()
    lengths = sample.lengths
    yield from _entry("mean", f"{lengths.mean():.1f}, median {np.median(lengths):.0f}")


def _describe_latents(sample: Sample, manifest: Manifest) -> Iterator[str]:
    stored, found = manifest.latent_statistics, sample.sums.statistics()
    yield from _title(f"latents, unscaled (all records | {len(sample.records):,} of them)")
    yield f"  {'channel':<9}{'mean':>11}{'std':>10}  |{'mean':>11}{'std':>10}{'min':>11}{'max':>11}"
    for channel in range(manifest.latent_channels):
        yield (
            f"  {channel:<9}{stored.mean[channel]:>11.4f}{stored.std[channel]:>10.4f}  |"
            f"{found.mean[channel]:>11.4f}{found.std[channel]:>10.4f}"
            f"{sample.low[channel]:>11.3f}{sample.high[channel]:>11.3f}"
        )
    factors = f"{stored.scaling_factor:.5f}; of the sample {found.scaling_factor:.5f}"
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
    """A line `  name   text`, wrapped under the text."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=f"  {name.replace('_', ' '):<{INDENT - 2}}",
        subsequent_indent=" " * INDENT,
    )


def _short(text: str, width: int) -> str:
    """The text on one line, cut to a width."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def draw_sheet(shards: ShardSet, num: int, *, vae: str | None, out: Path) -> str:
    """Decodes a few records, spread over the set, to a sheet with a caption under each picture.

    `vae` is a folder, or None for the one that the manifest names: a folder from the current
    directory or the repository root, or a hub repository. Stored latents are unscaled, so it is
    the posterior's mean itself that is decoded. Returns a line that says what was drawn.

    Raises ValueError for a VAE that cannot be had or is of another number of channels.
    """
    manifest = shards.manifest
    network = _load_vae(manifest, vae)
    same = _fingerprint(network) == manifest.vae.sha256
    records = spread(len(shards), num)
    first = np.zeros(len(records))
    latents = shards.gather(records, first, first).latent[:, : manifest.latent_channels]
    with torch.inference_mode():
        pictures = [network.decode(part.float()).sample for part in latents.split(DECODE_BATCH)]
    pixels = torch.cat(pictures).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    captions = [shards.meta(record)["captions"][0] for record in records.tolist()]
    _save_sheet(pixels.permute(0, 2, 3, 1).numpy(), captions, out)
    warning = "" if same else "; its weights are not those the latents were made with"
    return f"{out}: {len(records)} pictures, decoded with {vae or manifest.vae.name}{warning}"


def _load_vae(manifest: Manifest, given: str | None) -> Any:
    """Loads an autoencoder in float32, from the local disk if it is there."""
    import diffusers

    name = given or manifest.vae.name
    paths = (Path(name).expanduser(), ROOT / name)
    local = next((path for path in paths if path.is_dir()), None)
    for library in ("diffusers", "huggingface_hub"):  # they print lines of their own, then raise
        logging.getLogger(library).setLevel(logging.CRITICAL)
    error = ""
    for only_local in (True,) if local else (True, False):
        revision = None if given else manifest.vae.revision
        where: dict[str, Any] = {"revision": revision, "local_files_only": only_local}
        try:
            with warnings.catch_warnings(action="ignore"):
                config = diffusers.AutoencoderKL.load_config(local or name, **where)
                kind = config.get("_class_name")
                if kind not in AUTOENCODERS:
                    break
                network: Any = getattr(diffusers, kind).from_pretrained(
                    local or name, low_cpu_mem_usage=False, **where
                )
        except (OSError, ValueError) as failure:
            error = " ".join(str(failure).split())
            continue
        channels = network.config.get("vq_embed_dim") or network.config.latent_channels
        if channels != manifest.latent_channels:
            raise ValueError(
                f"--vae: {name!r}: expected {manifest.latent_channels} latent channels, "
                f"found {channels}"
            )
        return network.float().eval()
    if not error:
        expected = ", ".join(AUTOENCODERS)
        raise ValueError(f"--vae: {name!r}: expected one of {expected}, found {kind}")
    raise ValueError(f"--vae: {name!r} cannot be had, give a folder that holds it: {error}")


def _fingerprint(network: torch.nn.Module) -> str:
    """The sha256 of weights as README.md defines it for the manifest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save_sheet(pixels: NDArray[np.uint8], captions: Sequence[str], out: Path) -> None:
    """Draws pictures (N, H, W, 3) in cells of one width, each with its caption under it.

    Small pictures are enlarged by a whole factor, pixel by pixel; large ones reduced.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_PX)
    factor = max(1, CELL_PX // pixels.shape[2])
    images = [Image.fromarray(part) for part in pixels.repeat(factor, 1).repeat(factor, 2)]
    for image in images:
        image.thumbnail((CELL_PX, CELL_PX))
    columns = min(len(images), SHEET_COLUMNS)
    rows = -(-len(images) // columns)
    step_x = CELL_PX + PADDING_PX
    step_y = images[0].height + MAX_LINES * LINE_PX + PADDING_PX
    size = (columns * step_x + PADDING_PX, rows * step_y + PADDING_PX)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = PADDING_PX + number % columns * step_x
        y = PADDING_PX + number // columns * step_y
        sheet.paste(image, (x, y))
        for line_number, line in enumerate(wrap(caption, font.getlength, CELL_PX)):
            place = (x, y + image.height + 4 + line_number * LINE_PX)
            pen.text(place, line, fill=INK, font=font)
    sheet.save(out)


def wrap(text: str, measure: Callable[[str], float], width: float) -> list[str]:
    """Breaks a text into at most three lines that measure no more than `width` each.

    What does not fit ends in an ellipsis; a word too long for a line is cut where it must be.
    """
    lines = [""]
    for word in text.split():
        if measure(joined := f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = joined
            continue
        while measure(word) > width:
            size = next(n for n in range(len(word), 0, -1) if n == 1 or measure(word[:n]) <= width)
            lines.append(word[:size])
            word = word[size:]
        lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and measure(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], f"{last.rstrip()}…"]
    return lines


def describe_buckets(shards: BucketedShards) -> Iterator[str]:
    """Yields the lines that tell of a bucketed set as a whole."""
    listed = shards.buckets
    yield shards.location
    yield from _title("buckets")
    yield from _entry("list", f"version {listed.schema_version}, {listed.sha256[:12]}")
    left_out = listed.num_source - listed.num_records
    more = f", {left_out:,} left out" if left_out else ""
    yield from _entry("records", f"{listed.num_records:,} in {len(listed.buckets)} buckets{more}")
    for bucket, part in zip(listed.buckets, shards.sets, strict=True):
        _, height, width = part.manifest.latent_shape
        yield (
            f"  {bucket.name:<{INDENT - 2}}{bucket.records:>9,}"
            f"{bucket.records / listed.num_records:>9.2%}{bucket.quarantined:>9,} left out"
            f"   latents {width} x {height}"
        )
    yield from _describe_reasons("left out before any bucket", listed.quarantined)


def show(folder: Path, arguments: argparse.Namespace, out: Path) -> Iterator[str]:
    """Yields the lines that the command line asks for of a set, after drawing its sheet."""
    shards = open_shards(folder)
    yield from describe(shards, num_sample=arguments.sample, num_captions=arguments.captions)
    if arguments.decode:
        yield ""
        yield draw_sheet(shards, arguments.decode, vae=arguments.vae, out=out)


def show_buckets(folder: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """Yields what `show` does for each set of a bucketed one, after its table."""
    shards = open_buckets(folder)
    yield from describe_buckets(shards)
    out: Path = arguments.out
    for bucket in shards.buckets.buckets:
        yield ""
        name = f"{out.stem}-{bucket.name}"
        yield from show(folder / bucket.name, arguments, out.with_stem(name))


def main(prog: str | None = None) -> int:
    """Describes a set for the command line; returns the exit code."""
    arguments = _parse_arguments(prog)
    folder: Path = arguments.folder
    try:
        if holds_buckets(folder):
            lines = show_buckets(folder, arguments)
        else:
            lines = show(folder, arguments, arguments.out)
        for line in lines:
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
    parser.add_argument("folder", type=Path, help="folder of the manifest or the buckets")
    for name, default, about in (
        ("--sample", 1000, "records to read caption lengths and latents of"),
        ("--captions", 3, "records to print the captions of"),
        ("--decode", 0, "records to decode to a sheet of pictures"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{about} ({default})")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="the sheet (sheet.png)")
    parser.add_argument("--vae", help="folder of the VAE to decode with (the manifest's)")
    arguments = parser.parse_args()
    for name, least in (("sample", 1), ("captions", 0), ("decode", 0)):
        if (found := getattr(arguments, name)) < least:
            parser.error(f"--{name}: expected at least {least}, found {found}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
