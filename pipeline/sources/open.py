"""Where records come from: one module per kind of source, all giving the same type.

    for record in open_source(config, out): ...

To add a source, write a module beside `folder.py` whose `records` yields a `Record` for each image,
name its kind in `SourceConfig.kind`, and call it here. The order it yields is the order of the
shards. What is wrong with one image is that record's `problem`; what is wrong with a whole file is
a ValueError. Records are made as they are asked for, so that a source may be larger than memory.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from latent_t2i.model.paths import ROOT, find_path
from latent_t2i.pipeline.config import PipelineConfig, SourceConfig
from latent_t2i.pipeline.sources import coco, folder, img2dataset, parquet
from latent_t2i.pipeline.sources.locators import import_parquet, with_retries, without_query
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.scenes.dataset import write_coco
from latent_t2i.shards.remote.transport import find_filesystem, is_remote

FLAG = "--source.images"


def open_source(config: PipelineConfig, out: Path) -> Iterator[Record]:
    """Returns every record of the source, or the first `num_images`, in the source's order.

    Scenes are drawn first, into a folder beside `out`, unless they lie there already.
    Raises ValueError naming the flag for a missing folder or file, or one of another kind; what is
    wrong within them is raised on the way.
    """
    source = config.source
    if source.kind == "scenes":
        return _scenes(config, out)
    if source.kind == "coco":
        found = _coco(source)
    elif source.kind == "folder":
        found = folder.records(
            _find_folder(source.images),
            caption_column=source.caption_column,
            caption_per=source.caption_per,
        )
    elif source.kind == "webdataset":
        found = img2dataset.records(
            with_short_names(find_files(source.images, ".tar")),
            caption_column=source.caption_column,
        )
    else:
        import_parquet()  # says at once that it is not installed
        found = parquet.records(
            with_short_names(find_files(source.images, ".parquet")),
            image_column=source.image_column,
            caption_column=source.caption_column,
        )
    return islice(found, source.num_images)


def find_files(location: str, suffix: str) -> list[str]:
    """Returns the paths or URLs of a folder's files, a pattern's, or those that braces spell out.

    Those of a folder or a pattern are sorted, those of braces come as they are listed.
    Raises ValueError if there are none, one is missing, or one is compressed.
    """
    try:
        parts = [location] if find_path(location) else list(braceexpand(location, escape=False))
    except ValueError:
        raise ValueError(f"{FLAG}: braces of {location!r} do not close") from None
    found = []
    for part in parts:
        files = _find_remote(part, suffix) if is_remote(part) else _find_local(part, suffix)
        if not files:
            raise ValueError(
                f"{FLAG}: no {suffix} at {part!r}; folders below take a pattern, '**/*{suffix}'"
            )
        found += files
    for file in found:
        if without_query(file).endswith(img2dataset.COMPRESSED):
            raise ValueError(f"{FLAG}: {without_query(file)} is compressed: decompress it first")
    return found


def with_short_names(files: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs each file with its path below the folder that holds all of them, without suffix."""
    paths = [PurePosixPath(without_query(file)) for file in files]
    depth = len(os.path.commonprefix([path.parts[:-1] for path in paths]))  # noqa: RUF071 - parts
    return [
        (file, "/".join(path.with_suffix("").parts[depth:]))
        for file, path in zip(files, paths, strict=True)
    ]


def _scenes(config: PipelineConfig, out: Path) -> Iterator[Record]:
    assert config.source.num_images is not None
    drawn = write_coco(
        out.with_name(f"{out.name}-source"),
        config.source.world,
        config.split,
        config.source.num_images,
        config.image_size_px,
        config.seed,
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
        raise ValueError(f"{FLAG}: {path} is a file, expected a folder of images")
    return path


def _find(flag: str, name: str) -> Path:
    path = find_path(name)
    if path is None:
        raise ValueError(f"{flag}: nothing at {name!r}, here or in the project")
    return path


def _find_local(name: str, suffix: str) -> list[str]:
    path = find_path(name)
    if path is not None and path.is_file():
        return [str(path)]
    if path is not None:
        endings = (suffix, *(img2dataset.COMPRESSED if suffix == ".tar" else ()))
        return sorted(str(file) for file in path.iterdir() if file.name.endswith(endings))
    if not _is_pattern(name):
        raise ValueError(f"{FLAG}: nothing at {name!r}, here or in the project")
    given = Path(name).expanduser()
    if given.is_absolute():
        root, pattern = Path(given.anchor), str(given.relative_to(given.anchor))
        return sorted(map(str, root.glob(pattern)))
    return sorted(map(str, Path().glob(name))) or sorted(map(str, ROOT.glob(name)))


def _find_remote(url: str, suffix: str) -> list[str]:
    """Returns the URLs behind one; a web server lists nothing, so there it is a single file."""
    if url.startswith(("http://", "https://")):
        if "*" in url:
            raise ValueError(f"{FLAG}: {url}: a web server lists no files; braces spell them out")
        return [url]
    system, path = find_filesystem(url)

    def look() -> list[str]:
        if _is_pattern(path):
            return list(system.glob(path))
        if system.isdir(path):
            endings = (suffix, *(img2dataset.COMPRESSED if suffix == ".tar" else ()))
            return [name for name in system.ls(path, detail=False) if name.endswith(endings)]
        return [path]

    return [system.unstrip_protocol(name) for name in sorted(with_retries(url, look))]


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")
