"""Statistics of real images, computed once and used in every evaluation.

    python -m evaluation.reference data/coco/val2014 --size 256 --resize pytorch
    python -m evaluation.reference data/coco/val2014 --kind coco \\
        --captions data/coco/annotations/captions_val2014.json --size 256
    python -m evaluation.reference 'data/laion/{00000..00009}.tar' --kind webdataset --size 512
    python -m evaluation.reference val2014_30k_stats.npz --resize pytorch

Reads a folder of images, a source of stage one, or statistics of pytorch-fid or clean-fid, which do
not say what made them: with this command you say it. The file's name has a hash of the images'
bytes and of all settings, so a second call finds it, and changed images give another file. It names
the feature network, its weights' sha256 and the resize mode; evaluations with others refuse it.
Positions are those of the sorted files or of the source, and images are cropped around their centre
before they are resized.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from tqdm import tqdm

from latent_t2i.evaluation.config import (
    EvaluationConfig,
    ProtocolName,
    ReferenceConfig,
    ResizeMode,
    WeightsConfig,
)
from latent_t2i.evaluation.feature_stats import FeatureStats, Header
from latent_t2i.evaluation.features import (
    INCEPTION,
    WHAT_MATTERS,
    Extractor,
    load_extractor,
    mismatch,
)
from latent_t2i.evaluation.images import CROP, Size, batches_of, list_images, read_image
from latent_t2i.evaluation.metrics.metric import Batch, Context, Item
from latent_t2i.model.paths import find_path, hash_file, output_root
from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.sources.locators import locator_to_json, read_image_bytes
from latent_t2i.pipeline.sources.open import open_source
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.sample.sampler import choose_device

KINDS = get_args(get_type_hints(ReferenceConfig)["kind"])
NUM_HALVES = 2
"""The parts of a reference: one half against the other is the best that a model can reach."""
KEY_DIGITS = 12
KEY = "cache_key"


def load_statistics(
    path: Path, extractor: Extractor, protocol: ProtocolName = "own"
) -> FeatureStats:
    """Reads statistics for a feature network; raises ValueError if they are of another.

    Under a published `protocol`, they may be another tool's, which names no network.
    """
    stats = FeatureStats.load(path)
    has_rows = bool(len(stats.features))
    header = Header(identity=stats.identity, dim=stats.dim, has_rows=has_rows)
    reason = mismatch(header, extractor, protocol)
    if reason is not None:
        raise ValueError(
            f"--reference: {path}: {reason}; make statistics of the real images with "
            "evaluation.reference"
        )
    return stats


def make_reference(config: ReferenceConfig) -> Path:
    """Computes the statistics, unless their file exists; returns its path."""
    extractor = _extractor(config)
    images = _open(config)
    identity = extractor.identity()
    settings = {name: identity[name] for name in WHAT_MATTERS} | images.record()
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    out = _output(config, images.name, key)
    if out.exists():
        _require_key(out, key)
        print(f"{out}: found, nothing to do")
        return out
    stats = images.statistics(extractor, config.batch_size)
    stats.identity = {**identity, **images.record(), KEY: key}
    out.parent.mkdir(parents=True, exist_ok=True)
    stats.save(out)
    print(f"{out}: {stats.count or 'unknown number of'} images, {stats.dim} features")
    return out


@dataclass(frozen=True, kw_only=True)
class _Files:
    """A folder of images."""

    name: str
    paths: Sequence[Path]
    folder: Path
    size: Size | None

    def record(self) -> dict[str, str]:
        files = [f"{p.relative_to(self.folder).as_posix()} {hash_file(p)}" for p in self.paths]
        return _record(self.name, files, len(self.paths), self.size)

    def statistics(self, extractor: Extractor, batch_size: int) -> FeatureStats:
        items = [Item(position=n, key=str(path)) for n, path in enumerate(self.paths)]
        batches = batches_of(
            self.paths, items, batch_size=batch_size, size=self.size, flag="IMAGES"
        )
        return _accumulate(extractor, batches, len(self.paths))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A source of stage one; its unusable images are left out and counted."""

    name: str
    records: Sequence[Record]
    num_unusable: int
    size: Size | None

    def record(self) -> dict[str, str]:
        hashes = {path: hash_file(Path(path)) for path in self._local_files()}
        places = [json.dumps([r.key, *locator_to_json(r.locator)]) for r in self.records]
        files = [*places, *(f"{path} {digest}" for path, digest in hashes.items())]
        left_out = {"images_left_out": str(self.num_unusable)}
        return _record(self.name, files, len(self.records), self.size) | left_out

    def _local_files(self) -> list[str]:
        """Returns the files that the images are in; a URL is identified by its text only."""
        places = (v for r in self.records for v in locator_to_json(r.locator))
        names = dict.fromkeys(str(v) for v in places if isinstance(v, str))
        return sorted(name for name in names if Path(name).is_file())

    def statistics(self, extractor: Extractor, batch_size: int) -> FeatureStats:
        return _accumulate(extractor, self._batches(batch_size), len(self.records))

    def _batches(self, batch_size: int) -> Iterator[Batch]:
        first: tuple[int, ...] | None = None
        numbered = iter(enumerate(self.records))
        while chunk := list(islice(numbered, batch_size)):
            images = []
            for _, record in chunk:
                content = read_image_bytes(record.locator)
                images.append(read_image(Path(record.key), self.size, content))
                first = first or images[0].shape
                if images[-1].shape != first:
                    raise ValueError(
                        f"IMAGES: {record.key} has {images[-1].shape[1]} x {images[-1].shape[0]} "
                        f"pixels and the first image {first[1]} x {first[0]}; expected one size: "
                        "give --size to crop and resize all images to it"
                    )
            items = [Item(position=number, key=record.key) for number, record in chunk]
            yield Batch(images=np.stack(images), items=items)


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Another tool's statistics."""

    name: str
    path: Path

    def record(self) -> dict[str, str]:
        return {"images": self.name, "images_sha256": hash_file(self.path)}

    def statistics(self, extractor: Extractor, batch_size: int) -> FeatureStats:
        stats = FeatureStats.load(self.path)
        if stats.identity:
            raise ValueError(
                f"IMAGES: {self.path} was made by evaluation.reference: give it to --reference as "
                "it is"
            )
        if stats.dim != extractor.dim:
            raise ValueError(
                f"IMAGES: {self.path} has {stats.dim} features, but {extractor.name} has "
                f"{extractor.dim}: give the --extractor that made it"
            )
        return stats


def _accumulate(extractor: Extractor, batches: Iterator[Batch], num: int) -> FeatureStats:
    stats = FeatureStats(extractor.dim, num_parts=NUM_HALVES)
    with tqdm(total=num, desc="reference", unit="image", disable=None, leave=False) as bar:
        for batch in batches:
            stats.update(batch, extractor)
            bar.update(len(batch.items))
    return stats


def _record(name: str, files: Sequence[str], num: int, size: Size | None) -> dict[str, str]:
    return {
        "images": name,
        "images_count": str(num),
        "images_sha256": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        "images_size": "as they are" if size is None else f"{size[0]} x {size[1]}, {CROP}",
    }


def _extractor(config: ReferenceConfig) -> Extractor:
    settings = EvaluationConfig(
        name="reference",
        resize=config.resize,
        weights=WeightsConfig(inception=config.inception, features=config.extractor),
    )
    return load_extractor(
        config.extractor, Context(config=settings, device=choose_device(config.device))
    )


def _open(config: ReferenceConfig) -> _Files | _Source | _Statistics:
    size = None if config.size is None else (config.size, config.size)
    path = find_path(config.images)
    if config.kind == "statistics" or (path is not None and path.suffix == ".npz"):
        if path is None or not path.is_file():
            raise ValueError(f"IMAGES: no file {config.images!r}; expected a .npz of statistics")
        return _Statistics(name=path.name, path=path)
    if config.kind == "images":
        if path is None:
            raise ValueError(
                f"IMAGES: no folder {config.images!r} in the current directory or the project"
            )
        paths = list_images(path, "IMAGES")[: config.num_images]
        return _Files(name=path.name, paths=paths, folder=path, size=size)
    source = SourceConfig(
        kind=config.kind, images=config.images, captions=config.captions,
        num_images=config.num_images,
    )  # fmt: skip
    records = list(open_source(source))
    usable = [record for record in records if record.problem is None]
    if len(usable) < len(records):
        print(
            f"left out {len(records) - len(usable)} of {len(records)} images, such as "
            + next(f"{r.key}: {r.problem}" for r in records if r.problem is not None)
        )
    return _Source(
        name=f"{config.kind} {Path(config.images).name}",
        records=usable,
        num_unusable=len(records) - len(usable),
        size=size,
    )


def _output(config: ReferenceConfig, name: str, key: str) -> Path:
    if config.out is not None:
        out = Path(config.out)
        if out.suffix != ".npz":
            raise ValueError(f"--out: expected a file that ends in .npz, found {config.out!r}")
        return out
    plain = "".join(c if c.isalnum() else "-" for c in Path(name).stem).strip("-")
    return output_root() / "data" / "reference" / f"{plain}-{key}.npz"


def _require_key(path: Path, key: str) -> None:
    found = FeatureStats.load(path).identity.get(KEY)
    if found != key:
        raise ValueError(
            f"--out: {path} holds statistics of other images or settings ({KEY} {found}, expected "
            f"{key}); delete it, or give another --out"
        )


def main(prog: str | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments: dict[str, Any] = vars(_parser(prog).parse_args())
    try:
        make_reference(ReferenceConfig(**arguments))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m evaluation.reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", help="folder, file or pattern")
    add(
        "--kind",
        choices=KINDS,
        default="images",
        help="images: all images of a folder; statistics: a .npz; others: as for stage one",
    )
    add("--captions", default="", help="coco: the captions file, which lists the images")
    add(
        "--extractor",
        default=INCEPTION,
        help="inception, or the folder or name of a transformers or timm model",
    )
    add("--inception", help="torch-fidelity's weights; default: the torch hub cache")
    add("--resize", choices=get_args(ResizeMode), default="legacy", help="inception: resize mode")
    add("--size", type=int, help="side in pixels to which images are cropped and resized")
    add("--num-images", type=int, help="only the first images")
    add("--batch-size", type=int, default=32)
    add("--device", default="auto")
    add("--out", help="the .npz file; default: data/reference/NAME-HASH.npz")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
