"""Helpers for tests: small sets of shards filled with random numbers, edits, comparisons."""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from numpy.typing import NDArray

from latent_t2i.shards.buckets import Buckets, finish_buckets
from latent_t2i.shards.loader import Loader, batches
from latent_t2i.shards.reader import RawBatch
from latent_t2i.shards.schema import (
    Example,
    FieldSpec,
    Identity,
    LatentKind,
    Layout,
    Manifest,
    Provenance,
    TextDtype,
    encode_meta,
    hash_json,
    make_layout,
    round_up,
)
from latent_t2i.shards.shard_table import shard_number
from latent_t2i.shards.writer import FoundScale, ShardWriter, begin_set, finish_set, keep_text_scale

CHANNELS = 4
SIDE = 8
DOWNSCALE = 8
"""Pixels per latent cell, for the names of buckets."""
MAX_TOKENS = 7
TEXT_WIDTH = 32


def make_identity(part: str) -> Identity:
    """Returns an identity whose hash is the first letter of `part`, 64 times."""
    return Identity(name=f"some/{part}", revision=None, sha256=part[0] * 64)


def make_provenance(kind: LatentKind = "moments", **changes: Any) -> Provenance:
    """Returns the provenance of a set of random numbers."""
    values: dict[str, Any] = {
        "vae": make_identity("vae"),
        "text_encoder": make_identity("text_encoder"),
        "tokenizer": make_identity("tokenizer"),
        "latent_kind": kind,
        "text_dtype": "float16",
        "max_tokens": MAX_TOKENS,
        "preprocessing": {"image_size_px": 64, "views": 1},
        "source": {"kind": "random", "sha256": "0" * 64},
        "records_per_shard": 4,
        "max_shard_bytes": 10**9,
    }
    return Provenance(**(values | changes))


def make_examples(
    num: int,
    *,
    num_captions: int = 3,
    views: int = 1,
    kind: LatentKind = "moments",
    text_dtype: TextDtype = "float16",
    seed: int = 0,
    size: tuple[int, int] = (SIDE, SIDE),
    fields: Sequence[FieldSpec] = (),
) -> list[Example]:
    """Returns examples of random numbers; keys differ by seed and number of captions."""
    rng = np.random.default_rng([seed, num_captions])
    channels = 2 * CHANNELS if kind == "moments" else CHANNELS
    spread = 40 if text_dtype == "int8" else 1
    return [
        Example(
            key=f"{seed:02d}-{num_captions}-{index:06d}",
            latent=rng.normal(size=(views, channels, *size)).astype(np.float16),
            text=(spread * rng.normal(size=(num_captions, MAX_TOKENS, TEXT_WIDTH)))
            .clip(-127, 127)
            .astype(text_dtype),
            tokens=rng.integers(0, 99, (num_captions, MAX_TOKENS)).astype(np.int32),
            meta={"captions": [f"caption {n} of {index}" for n in range(num_captions)]}
            | {"truncated": [0] if index % 2 else []},
            extra={
                spec.name: rng.integers(
                    0, 99, spec.stored_shape(num_views=views, num_captions=num_captions)
                ).astype(spec.dtype)
                for spec in fields
            },
        )
        for index in range(num)
    ]


def make_fields() -> tuple[FieldSpec, ...]:
    """Returns a further field of each kind; the first name is as long as the format allows."""
    made_by = make_identity("features")
    return (
        FieldSpec(name="a_" + 13 * "n", dtype="float32", shape=(3, 2), per="view", made_by=made_by),
        FieldSpec(name="pooled", dtype="float16", shape=(5,), per="caption", made_by=made_by),
        FieldSpec(name="clip", dtype="int8", shape=(2, 6), per="record", made_by=made_by),
        FieldSpec(name="view_box", dtype="int32", shape=(6,), per="view", made_by=made_by),
        FieldSpec(name="mask", dtype="uint8", shape=(1, 4, 4), per="record", made_by=made_by),
    )


def layout_of(examples: Sequence[Example], fields: Sequence[FieldSpec] = ()) -> Layout:
    """Returns the layout of examples that have the same shapes."""
    first = examples[0]
    json_bytes = max(len(encode_meta(example.meta)) for example in examples)
    captions, tokens, width = first.text.shape
    return make_layout(
        latent=first.latent.shape,
        text=(captions, tokens, width),
        json_bytes=round_up(json_bytes, 512),
        text_dtype="int8" if first.text.dtype == np.int8 else "float16",
        extra=fields,
    )


def make_scale(width: int = TEXT_WIDTH) -> FoundScale:
    """Returns a scale for int8 text with a different value per channel."""
    scale = np.linspace(0.01, 0.1, width, dtype=np.float32)
    return FoundScale(scale=scale, relative_error=0.01, num_captions=9)


def write_set(
    folder: Path,
    shards: Sequence[Sequence[Example]],
    provenance: Provenance | None = None,
    *,
    quarantined: Mapping[str, str] | None = None,
    field_scales: Mapping[str, NDArray[np.float32]] | None = None,
) -> Manifest:
    """Writes a set with one shard per sequence of examples."""
    first = shards[0][0]
    provenance = provenance or make_provenance(text_dtype=first.text.dtype.name)
    found = make_scale(first.text.shape[2]) if provenance.text_dtype == "int8" else None
    begin_set(folder, provenance)
    if found:
        keep_text_scale(folder, found)
    for index, examples in enumerate(shards):
        layout = layout_of(examples, provenance.fields)
        with ShardWriter(folder, index, layout, provenance.latent_kind) as shard:
            for example in examples:
                shard.write(example)
    return finish_set(
        folder,
        provenance,
        num_shards=len(shards),
        quarantined=quarantined or {},
        empty_text=np.full(first.text.shape[1:], 0.5, np.float16),
        empty_tokens=np.arange(len(first.tokens[0]), dtype=np.int32),
        text_scale=found,
        field_scales=field_scales,
    )


def write_records_of_version_2(folder: Path, **changes: Any) -> Manifest:
    """Writes the records of tests/shards/data/v2/float16 in the present version."""
    examples = {"views": 2, "size": (4, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "TEXT_WIDTH", 8)
        patch.setattr(sys.modules[__name__], "MAX_TOKENS", 5)
        shards = [
            make_examples(2, num_captions=2, seed=0, **examples),
            make_examples(1, num_captions=3, seed=1, **examples),
        ]
    provenance = make_provenance(max_tokens=5, **changes)
    return write_set(folder, shards, provenance, quarantined={"lost": "OSError: truncated"})


def write_buckets(
    folder: Path,
    sizes: Mapping[str, Sequence[int]],
    provenance: Provenance | None = None,
    *,
    quarantined: Mapping[str, str] | None = None,
    **settings: Any,
) -> Buckets:
    """Writes a bucketed set; `sizes` has the number of records of each shard, by bucket.

    `settings` are those of `make_examples`. All keys are unique.
    """
    for number, (name, records) in enumerate(sizes.items()):
        width, height = (int(side) // DOWNSCALE for side in name.split("x"))
        shards = [
            make_examples(num, seed=10 * number + shard, size=(height, width), **settings)
            for shard, num in enumerate(records)
        ]
        write_set(folder / name, shards, provenance)
    return finish_buckets(folder, list(sizes), quarantined=quarantined or {})


def read_stock(folder: Path) -> list[dict[str, Any]]:
    """Returns all samples of a set as a stock WebDataset pipeline reads them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it does not close its files
        return list(webdataset.WebDataset(urls, shardshuffle=False).decode())


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edits a manifest or buckets.json and stores the matching hash, like a faulty writer."""
    document = json.loads(path.read_text())
    change(document)
    document.pop("sha256", None)
    document["sha256"] = hash_json(document)
    path.chmod(0o644)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def edit_table(folder: Path, change: Callable[[NDArray[Any]], object]) -> None:
    """Edits the rows of shards.npy and stores the matching hashes, like a faulty writer."""
    rows = np.load(folder / "shards.npy")
    changed = change(rows)
    np.save(folder / "shards.npy", rows if changed is None else changed)
    update_hash(folder, "shards.npy")


def update_hash(folder: Path, name: str) -> None:
    """Stores size and hash of a changed file in the manifest, and in the list of a bucketed set."""
    content = (folder / name).read_bytes()
    digest = hashlib.sha256(content)
    if name.endswith(".tar"):

        def change_row(rows: NDArray[Any]) -> None:
            rows["sha256"][rows["number"] == shard_number(name)] = digest.digest()

        edit_table(folder, change_row)
        return

    def change(document: dict[str, Any]) -> None:
        names = ("shard_table", "quarantine", "shard_sums", "empty_text", "empty_tokens")
        entries = [document[name] for name in names]
        entries += [(document["text_scale"] or {}).get("file")]
        entries += [spec["scale"] for spec in document["fields"]]
        for entry in filter(None, entries):
            if entry["name"] == name:
                entry.update(bytes=len(content), sha256=digest.hexdigest())

    def change_list(document: dict[str, Any]) -> None:
        for bucket in document["buckets"]:
            if bucket["name"] == folder.name:
                bucket["sha256"] = hashlib.sha256(manifest.read_bytes()).hexdigest()

    manifest, listed = folder / "manifest.json", folder.parent / "buckets.json"
    edit_json(manifest, change)
    if listed.exists():
        edit_json(listed, change_list)


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs a module's command; returns the exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    code: int = module.main()
    return code


def collect(loader: Loader, start: int, stop: int) -> list[RawBatch]:
    """Returns copies of a loader's batches of some steps."""
    return [batch.map(torch.clone) for batch in batches(loader, start=start, stop=stop)]


def assert_batches_equal(found: Sequence[RawBatch], expected: Sequence[RawBatch]) -> None:
    """Compares batches bit by bit."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.gathered.keys() == other.gathered.keys()
        for name, tensor in one.gathered.items():
            assert torch.equal(tensor, other.gathered[name]), name


def concatenate(parts: Sequence[RawBatch]) -> RawBatch:
    """Returns the batches of several ranks as one."""
    found = [part.gathered for part in parts]
    joined = {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}
    return RawBatch(latent=joined.pop("latent"), text=joined.pop("text"), extra=joined)
