"""A folder of pictures that can be interrupted, continued, and drawn by several processes.

A picture is written under a temporary name and renamed, so it is complete or absent. Its text chunk
holds the prompt, the seed, all settings and the bundle's digest. A rerun compares them: equal
pictures are kept, missing ones are drawn, and a different one is an error that names both values.
Each process draws the pictures of its own batches and needs no connection to the others.
"""

import json
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from latent_t2i import __version__
from latent_t2i.model.generate import generate
from latent_t2i.model.grid import SETTINGS_CHUNK, DamagedImageError, read_settings, save_png
from latent_t2i.sample.config import DrawSettings
from latent_t2i.sample.sampler import keywords

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

LIBRARIES = ("torch", "diffusers", "transformers")
NOT_COMPARED = ("bundle",)
"""Recorded in a picture, but different values are no error; bundle is the path of its folder."""
_NOTHING = object()
MAX_WAITING = 64
"""Pictures that may wait for the thread that writes them."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to draw."""

    prompt: str
    seed: int
    settings: DrawSettings


def picture_path(folder: Path, position: int) -> Path:
    """Returns the file of the picture at this position of the list."""
    return folder / f"{position:06d}.png"


def draw_folder(
    pipeline: "StableDiffusionPipeline",
    pictures: Sequence[Picture],
    folder: Path,
    *,
    batch_size: int,
    identity: Mapping[str, str],
    rank: int = 0,
    world_size: int = 1,
    title: str = "draw",
    guide: Any = None,
    overwrite: bool = False,
    fill: bool = False,
) -> None:
    """Draws those pictures that the folder lacks; returns when this process's share is on disk.

    Args:
        pipeline: A pipeline of `sampler.load`.
        pictures: All pictures, the same in every process.
        folder: Holds one PNG per picture, numbered by position.
        batch_size: Number of pictures drawn at once. Fewer pictures than that are one batch of
            their number, unless `fill` is true.
        identity: What the pictures depend on besides their settings, such as the bundle's digest.
        rank: Which share of the pictures to draw.
        world_size: Number of processes that draw into this folder.
        title: Name of the progress bar.
        guide: The network of the settings' `guide`, from `sampler.load_guide`.
        overwrite: Delete pictures of other calls instead of refusing them.
        fill: Draw fewer pictures than `batch_size` in a batch of that size, too.

    Raises:
        ValueError: A picture of the folder has another prompt, seed, setting or identity; the
            folder has pictures beyond those of the list; a setting does not fit the bundle; or a
            picture is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = _plan(pictures, batch_size, fill=fill)[rank::world_size]
    arguments = {
        settings: keywords(pipeline, settings, guide if settings.guide else None)
        for settings in dict.fromkeys(picture.settings for picture in pictures)
    }
    own = [position for batch in batches for position in batch.positions]
    extras = _find_extras(folder, len(pictures)) if rank == 0 else []
    differing = _find_differing(folder, pictures, own, identity)
    if overwrite:
        _delete(folder, [*differing, *extras])
    else:
        _refuse(folder, differing, extras, len(pictures))
    missing = {position for position in own if not picture_path(folder, position).exists()}
    bar = tqdm(
        desc=title if world_size == 1 else f"{title}, process {rank + 1} of {world_size}",
        total=len(own),
        initial=len(own) - len(missing),
        unit="image",
        disable=None,
        leave=False,
        position=rank,
    )
    with bar, Writer() as writer:
        for settings, size, positions in _regroup(batches, missing):
            prompts = [pictures[position].prompt for position in positions]
            seeds = [pictures[position].seed for position in positions]
            images = generate(pipeline, prompts, seeds, **arguments[settings], batch_size=size)
            computed = describe_computation(pipeline, batch_size=size)
            for position, image in zip(positions, images, strict=True):
                record = describe(pictures[position], identity) | computed
                writer.save(image, picture_path(folder, position), record)
                bar.update()


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Positions of pictures with equal settings, and the number of pictures drawn at once."""

    settings: DrawSettings
    size: int
    positions: Sequence[int]


def _plan(pictures: Sequence[Picture], batch_size: int, *, fill: bool) -> list[_Batch]:
    """Returns the batches that all processes share out; depends on the list of pictures alone."""
    groups: dict[DrawSettings, list[int]] = {}
    for position, picture in enumerate(pictures):
        groups.setdefault(picture.settings, []).append(position)
    batches = []
    for settings, positions in groups.items():
        size = batch_size if fill else min(batch_size, len(positions))
        batches += [
            _Batch(settings=settings, size=size, positions=positions[start : start + size])
            for start in range(0, len(positions), size)
        ]
    return batches


def _regroup(
    batches: Sequence[_Batch], missing: Collection[int]
) -> list[tuple[DrawSettings, int, list[int]]]:
    """Returns the settings, batch size and missing positions of each group of equal settings."""
    groups: dict[tuple[DrawSettings, int], list[int]] = {}
    for batch in batches:
        positions = [position for position in batch.positions if position in missing]
        if positions:
            groups.setdefault((batch.settings, batch.size), []).extend(positions)
    return [(*key, positions) for key, positions in groups.items()]


def describe(picture: Picture, identity: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a picture's text chunk and line in samples.jsonl hold, as plain values."""
    record = {"prompt": picture.prompt, "seed": picture.seed}
    record |= asdict(picture.settings) | dict(identity)
    plain: dict[str, Any] = json.loads(json.dumps(record))  # tuples become lists
    return plain


def describe_computation(pipeline: Any, *, batch_size: int) -> dict[str, Any]:
    """Returns what a picture depends on by rounding, for its text chunk.

    `batch_size` is that of the picture's own batch, which may be smaller than --batch-size.
    """
    unet = pipeline.unet
    on_gpu = unet.device.type == "cuda"
    name = torch.cuda.get_device_name(unet.device) if on_gpu else str(unet.device)
    return {
        **describe_versions(),
        "dtype": str(unet.dtype).removeprefix("torch."),
        "device": name if on_gpu else f"{name}, {torch.get_num_threads()} threads",
        "batch_size": batch_size,
        "channels_last": any(p.ndim == 4 and not p.is_contiguous() for p in unet.parameters()),
        "compile": unet._compiled_call_impl is not None,
    }


def describe_versions() -> dict[str, Any]:
    """Returns the versions of this project and of the libraries that draw."""
    return {"versions": {"latent-t2i": __version__} | {name: version(name) for name in LIBRARIES}}


def _find_differing(
    folder: Path,
    pictures: Sequence[Picture],
    positions: Iterable[int],
    identity: Mapping[str, str],
) -> dict[Path, str]:
    """Returns the present pictures that are damaged or differ from those of the list, and how.

    Raises ValueError for a file that no call of this project drew.
    """
    differing = {}
    for position in positions:
        path = picture_path(folder, position)
        if path.exists():
            expected = describe(pictures[position], identity)
            try:
                difference = _compare(read_settings(path), expected)
            except DamagedImageError as error:
                if not _was_drawn_here(path):
                    raise
                differing[path] = str(error)
            else:
                if difference:
                    differing[path] = f"{path}: an earlier call drew it with {difference}"
    return differing


def _was_drawn_here(path: Path) -> bool:
    """Returns whether a damaged file is a picture of this project, or empty."""
    content = path.read_bytes()
    return not content or SETTINGS_CHUNK.encode() in content


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Returns the first difference of two records with both values, or None."""
    for name in expected:
        if name not in NOT_COMPARED and found.get(name, _NOTHING) != expected[name]:
            before = repr(found[name]) if name in found else "nothing"
            return f"{name} {before}, this one has {expected[name]!r}"
    return None


def _find_extras(folder: Path, num_pictures: int) -> list[Path]:
    """Returns the pictures of an earlier call that drew more of them."""
    paths = sorted(path for path in folder.glob("[0-9]*.png") if path.stem.isdecimal())
    return [path for path in paths if int(path.stem) >= num_pictures and _has_settings(path)]


def _refuse(
    folder: Path, differing: Mapping[Path, str], extras: Sequence[Path], num_pictures: int
) -> None:
    """Raises ValueError if there are pictures of an earlier call that differ from this one."""
    advice = "give another folder with --out, or --overwrite to delete pictures that differ"
    for difference in differing.values():
        raise ValueError(f"{difference}; {advice}")
    if extras:
        raise ValueError(
            f"{folder}: an earlier call drew {len(extras)} more than the {num_pictures} pictures "
            f"of this one, such as {extras[0].name}; {advice}"
        )


def _delete(folder: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    if paths:
        print(f"deleted {len(paths)} pictures of an earlier call from {folder}")


def refuse_foreign(*paths: Path) -> None:
    """Raises ValueError for a path that exists and is not a PNG of this project.

    Call it before files are replaced or deleted without --overwrite.
    """
    for path in paths:
        if path.exists() and not _has_settings(path):
            raise ValueError(
                f"--out: {path} would be replaced or deleted, but is not a picture that this "
                "project drew; expected a folder without it: move it, or give another --out"
            )


def _has_settings(path: Path) -> bool:
    try:
        read_settings(path)
    except (ValueError, OSError):
        return False
    return True


def write_index(path: Path, pictures: Sequence[Picture], identity: Mapping[str, str]) -> None:
    """Writes a line of JSON per picture: its file's name and what `describe` returns."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for position, picture in enumerate(pictures):
            line = {"file": picture_path(Path(), position).name} | describe(picture, identity)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Writer:
    """Encodes and saves pictures in a thread. Leaving the block waits for all of them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "png")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        with self._pool:
            while self._waiting:
                self._waiting.popleft().result()

    def save(self, image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
        """Saves a picture soon; raises the error of an earlier one."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(save_whole, image, path, record))


def save_whole(image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Writes a PNG with its text chunks; the file is complete or absent."""
    with whole_file(path) as partial:
        save_png(image, partial, record)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what the block writes there is flushed to disk and renamed."""
    # Always the same name, so that the picture that a kill interrupted replaces its partial file.
    partial = path.with_name(f".{path.name}")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    try:
        partial.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else a second run of this command has renamed it
            raise
