"""Opens a source of captioned images: one module per kind, all of which yield records.

Records are yielded one by one, so a source may be larger than memory. Their order is the order of
the shards. A fault of one image becomes its record's `problem`; a fault of a whole file is a
SourceError. docs/extending.md describes how to add a source.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from braceexpand import braceexpand

from latent_t2i.model.paths import ROOT, find_path
from latent_t2i.pipeline.config import SourceConfig
from latent_t2i.pipeline.sources import coco, folder, img2dataset, parquet
from latent_t2i.pipeline.sources.locators import import_parquet, with_retries, without_query
from latent_t2i.pipeline.sources.record import Record, SourceError, in_split
from latent_t2i.scenes.dataset import write_coco
from latent_t2i.shards.remote.transport import find_filesystem, is_remote

FLAG = "--source.images"


class SceneSettings(NamedTuple):
    """What a source of kind `scenes` needs beside its `SourceConfig`."""

    folder: Path
    """Where the scenes are drawn, unless they are there already."""
    split: str
    image_size_px: int
    seed: int


def open_source(
    source: SourceConfig, split: str = "train", scenes: SceneSettings | None = None
) -> Iterator[Record]:
    """Returns the split's records, or the first `num_images` of them, in the source's order.

    `scenes` is needed for the kind `scenes` only; they are drawn first, unless they exist. Raises
    SourceError with the flag for a missing file or folder; the iterator also for broken files.
    """
    if source.kind == "scenes":
        assert scenes is not None
        return _scenes(source, scenes)
    found = _records(source)
    if source.val_fraction:
        if split not in ("train", "val"):
            raise SourceError(
                f"--split: expected train or val with --source.val-fraction, found {split!r}"
            )
        found = (r for r in found if in_split(r.key, split, source.val_fraction))
    return _require_any(islice(found, source.num_images), source)


def _records(source: SourceConfig) -> Iterator[Record]:
    if source.kind == "coco":
        return _coco(source)
    if source.kind == "folder":
        return folder.records(
            folder.FolderOptions(
                root=_find_folder(source.images),
                caption_column=source.caption_column,
                caption_per=source.caption_per,
                caption_extension=source.caption_extension,
            )
        )
    if source.kind == "webdataset":
        return img2dataset.records(
            with_short_names(find_files(source.images, ".tar")),
            img2dataset.TarOptions(
                caption_column=source.caption_column,
                caption_extension=source.caption_extension,
                members=source.tar_members,
            ),
        )
    import_parquet()  # raises if it is not installed
    return parquet.records(
        with_short_names(find_files(source.images, ".parquet")),
        image_column=source.image_column,
        caption_column=source.caption_column,
    )


def _require_any(records: Iterator[Record], source: SourceConfig) -> Iterator[Record]:
    """Yields the records. Raises SourceError if there are none."""
    first = next(records, None)
    if first is None:
        place, expected = {
            "coco": (source.captions, 'entries in its list "images"'),
            "folder": (source.images, "files with an image's extension, such as .jpg or .png"),
            "webdataset": (source.images, "tars with members such as KEY.jpg and KEY.txt"),
            "parquet": (source.images, "parquet files with rows"),
        }[source.kind]
        flag = "--source.captions" if source.kind == "coco" else FLAG
        part = f" with --source.val-fraction {source.val_fraction}" if source.val_fraction else ""
        raise SourceError(f"{flag}: {place}: found no images{part}, expected {expected}")
    yield first
    yield from records


def find_files(location: str, suffix: str) -> list[str]:
    """Returns the paths or URLs of the files in a folder, or those that a pattern or braces match.

    They are sorted, except that braces keep their order. Raises SourceError if there are none, one
    is missing, or one is compressed.
    """
    try:
        parts = [location] if find_path(location) else list(braceexpand(location, escape=False))
    except ValueError:
        raise SourceError(f"{FLAG}: {location!r} has a brace without its counterpart") from None
    found = []
    for part in parts:
        files = _find_remote(part, suffix) if is_remote(part) else _find_local(part, suffix)
        if not files:
            raise SourceError(
                f"{FLAG}: no {suffix} file in {part!r}; subfolders need a pattern, '**/*{suffix}'"
            )
        found += files
    for file in found:
        if without_query(file).endswith(img2dataset.COMPRESSED):
            raise SourceError(f"{FLAG}: {without_query(file)} is compressed: decompress it first")
    return found


def with_short_names(files: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs each file with its path below the common folder, without suffix."""
    paths = [PurePosixPath(without_query(file)) for file in files]
    depth = len(os.path.commonprefix([path.parts[:-1] for path in paths]))  # noqa: RUF071 - parts
    return [
        (file, "/".join(path.with_suffix("").parts[depth:]))
        for file, path in zip(files, paths, strict=True)
    ]


def _scenes(source: SourceConfig, scenes: SceneSettings) -> Iterator[Record]:
    assert source.num_images is not None
    drawn = write_coco(
        scenes.folder,
        source.world,
        scenes.split,
        source.num_images,
        scenes.image_size_px,
        scenes.seed,
    )
    return coco.records(drawn.images, drawn.captions, drawn.instances)


def _coco(source: SourceConfig) -> Iterator[Record]:
    images = _find_folder(source.images)
    captions = _find("--source.captions", source.captions)
    instances = _find("--source.instances", source.instances) if source.instances else None
    return coco.records(images, captions, instances)


def _find_folder(name: str) -> Path:
    path = _find(FLAG, name)
    if not path.is_dir():
        raise SourceError(f"{FLAG}: {path} is a file, expected a folder of images")
    return path


def _find(flag: str, name: str) -> Path:
    path = find_path(name)
    if path is None:
        raise SourceError(f"{flag}: {name!r} does not exist, here or in the project")
    return path


def _find_local(name: str, suffix: str) -> list[str]:
    path = find_path(name)
    if path is not None and not path.is_dir():
        return [str(path)]
    if path is not None:
        return sorted(str(file) for file in path.iterdir() if file.name.endswith(_endings(suffix)))
    if not _is_pattern(name):
        raise SourceError(f"{FLAG}: {name!r} does not exist, here or in the project")
    given = Path(name).expanduser()
    if given.is_absolute():
        root, pattern = Path(given.anchor), str(given.relative_to(given.anchor))
        return sorted(map(str, root.glob(pattern)))
    return sorted(map(str, Path().glob(name))) or sorted(map(str, ROOT.glob(name)))


def _find_remote(url: str, suffix: str) -> list[str]:
    """Returns the URLs of a folder, pattern or file. A web server cannot list its files."""
    if url.startswith(("http://", "https://")):
        if "*" in url:
            raise SourceError(
                f"{FLAG}: {without_query(url)}: http has no patterns, name the files with braces"
            )
        return [url]
    system, path = find_filesystem(url)

    def look() -> list[str]:
        if _is_pattern(path):
            return list(system.glob(path))
        if system.isdir(path):
            names = system.ls(path, detail=False)
            return [name for name in names if name.endswith(_endings(suffix))]
        return [path]

    return [system.unstrip_protocol(name) for name in sorted(with_retries(url, look))]


def _endings(suffix: str) -> tuple[str, ...]:
    # Compressed tars count as found, for an error that says so.
    return (suffix, *(img2dataset.COMPRESSED if suffix == ".tar" else ()))


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")
