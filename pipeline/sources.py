"""Where records come from: one function per kind of source, all giving the same type.

To add a source, write a module beside `coco.py` that returns a list of `Record`, name its kind in
`SourceConfig.kind`, and call it here. The order it returns is the order of the shards.
"""

from collections.abc import Sequence
from pathlib import Path

from model.paths import find_path
from pipeline import coco
from pipeline.config import PipelineConfig
from pipeline.images import missing_files
from pipeline.record import Record
from scenes.dataset import write_coco


def records(config: PipelineConfig, out: Path) -> list[Record]:
    """Returns every record of the source, in the source's order.

    Scenes are drawn first, into a folder beside `out`, unless they lie there already.
    Raises ValueError naming the flag for a missing folder or file, or one of another kind.
    """
    source = config.source
    if source.kind == "scenes":
        assert source.num_images is not None
        drawn = write_coco(
            out.with_name(f"{out.name}-source"),
            source.world,
            config.split,
            source.num_images,
            config.image_size_px,
            config.seed,
        )
        return coco.records(drawn.images, drawn.captions, drawn.instances)
    images = _find("--source.images", source.images)
    if not images.is_dir():
        raise ValueError(f"--source.images: {images} is a file, expected a folder of images")
    instances = source.instances and _find("--source.instances", source.instances)
    found = coco.records(images, _find("--source.captions", source.captions), instances or None)
    _require_files(images, found)
    return found[: source.num_images]


def _require_files(folder: Path, found: Sequence[Record]) -> None:
    """Refuses a folder without most of the images: single ones are left out later, with reason."""
    missing = missing_files(found)
    if len(missing) > len(found) / 2:
        raise ValueError(
            f"--source.images: {len(missing)} of the {len(found)} files that the captions name are "
            f"not in {folder}, {missing[0].path.name} first: is it the folder of another split?"
        )


def _find(flag: str, name: str) -> Path:
    path = find_path(name)
    if path is None:
        raise ValueError(f"{flag}: nothing at {name!r}, here or in the project")
    return path
