"""`sample.run`: writes one PNG per picture, samples.jsonl, and one labelled grid."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from latent_t2i.model.bundle import digest, find_bundle
from latent_t2i.model.generate import latent_shape
from latent_t2i.model.grid import label_seeds, labelled_grid, read_settings
from latent_t2i.model.paths import find_path, output_root
from latent_t2i.sample import sampler
from latent_t2i.sample.config import BATCH_SIZE, DrawSettings, SampleConfig
from latent_t2i.sample.folder import (
    Picture,
    describe_computation,
    describe_versions,
    draw_folder,
    picture_path,
    refuse_foreign,
    save_whole,
    write_index,
)
from latent_t2i.sample.guides import hash_guide
from latent_t2i.sample.prompts import list_pictures
from latent_t2i.sample.prompts import read_text as read_text

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

EDITED = ("init_image", "strength", "mask")
"""Settings of a picture that sample.edit or the page's Edit tab made."""
SHIPPED_BUNDLE = "scenes/bundle"
MAX_GRID_IMAGES = 64
"""The grid shows the first pictures only, so that memory does not grow with their number."""


def sample(config: SampleConfig) -> Path:
    """Draws the pictures that the output folder lacks; returns the path of the grid.

    Under `accelerate launch` or torchrun each process draws its share. The last one to finish
    writes the index and the grid. Raises ValueError if there is no bundle or no prompt, or if the
    folder has pictures of other settings.
    """
    rank, world_size = (
        int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE"))
    )
    earlier = {} if config.like is None else read_picture(config.like)
    chose_bundle = config.bundle is not None or config.name is not None
    if config.like is not None:
        config = like(config, earlier)
    pictures = list_pictures(config)
    out = Path(config.out) if config.out else output_root() / "runs" / (config.name or "samples")
    grid = out / "samples.png"
    refuse_foreign(grid)
    folder = choose_bundle(config.bundle, config.name)
    identity = describe_bundle(folder) | describe_guide(config.guide)
    _compare_bundles(earlier, identity, explicit=chose_bundle)
    pipeline = sampler.load(folder, device=config.device, dtype=config.dtype)
    guide = None if config.guide is None else sampler.load_guide(config.guide, pipeline)
    for network in (pipeline.unet, guide):
        if network is not None:
            sampler.speed_up(network, channels_last=config.channels_last, compiled=config.compile)
    identity["dtype"] = str(pipeline.unet.dtype).removeprefix("torch.")
    batch_size = config.batch_size or BATCH_SIZE
    if rank == 0:
        _note_sizes(pipeline, pictures)
        _note_rounding(earlier, describe_computation(pipeline, batch_size=batch_size))
    draw_folder(
        pipeline,
        pictures,
        out / "samples",
        batch_size=batch_size,
        identity=identity,
        rank=rank,
        world_size=world_size,
        guide=guide,
        overwrite=config.overwrite,
        # A batch of its own size repeats the picture of --like bit for bit.
        fill=earlier.get("batch_size") == batch_size,
    )
    missing = [n for n in range(len(pictures)) if not picture_path(out / "samples", n).exists()]
    if missing:
        print(f"process {rank + 1} of {world_size} has drawn its share of {len(pictures)} images")
        return grid
    write_index(out / "samples.jsonl", pictures, identity)
    write_grid(grid, pictures, identity)
    print(f"{len(pictures)} images from {folder}: {grid}")
    return grid


def write_grid(path: Path, pictures: Sequence[Picture], identity: Mapping[str, str]) -> None:
    """Writes a labelled grid of the first pictures in the folder samples/ beside it."""
    shown = pictures[:MAX_GRID_IMAGES]
    if len(shown) < len(pictures):
        print(f"{path} shows the first {len(shown)} of {len(pictures)} images")
    images = []
    for position in range(len(shown)):
        with Image.open(picture_path(path.parent / "samples", position)) as image:
            images.append(image.convert("RGB"))
    prompts = [picture.prompt for picture in shown]
    same = len({picture.settings for picture in shown}) == 1
    settings: dict[str, Any] = asdict(shown[0].settings) if same else {}
    save_whole(
        labelled_grid(images, label_seeds(prompts, [picture.seed for picture in shown])),
        path,
        {"prompts": prompts} | settings | dict(identity) | describe_versions(),
    )


def read_picture(name: str) -> dict[str, Any]:
    """Returns the text chunk of a picture; raises ValueError if it has none."""
    path = find_path(name)
    if path is None:
        raise ValueError(f"--like: no file {name!r} in the current directory or the project")
    try:
        found = read_settings(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--like: {error}") from error
    if not isinstance(found.get("prompt"), str) or not isinstance(found.get("seed"), int):
        raise ValueError(f"--like: {path} holds no prompt and seed; expected a PNG of samples/")
    if edit := [name for name in EDITED if name in found]:
        raise ValueError(
            f"--like: {path} was drawn from another image ({edit[0]} {found[edit[0]]!r}), which "
            "sample.run does not do; expected a picture drawn from a prompt alone, or python -m "
            "sample.edit with the same --init-image"
        )
    return found


def like(config: SampleConfig, earlier: Mapping[str, Any]) -> SampleConfig:
    """Returns the settings with which `earlier` was drawn, the text chunk of a picture.

    The bundle, the data type and the batch size are those of the picture unless `config` has its
    own.
    """
    names = [field.name for field in fields(DrawSettings) if field.name in earlier]
    values: dict[str, Any] = {
        n: tuple(v) if isinstance(v := earlier[n], list) else v for n in names
    }
    if config.bundle is None and config.name is None:
        values["bundle"] = earlier.get("bundle")
    if config.dtype == "auto":
        values["dtype"] = earlier.get("dtype", "auto")
    if config.batch_size is None:
        values["batch_size"] = earlier.get("batch_size")
    prompt, seed = earlier["prompt"], earlier["seed"]
    return replace(config, like=None, prompts=(prompt,), seed=seed, **values)


def _compare_bundles(
    earlier: Mapping[str, Any], identity: Mapping[str, str], *, explicit: bool
) -> None:
    """Prints that a picture of --like came from another bundle, or raises if none was given."""
    for name in ("bundle_sha256", "guide_sha256"):
        found, expected = identity.get(name), earlier.get(name)
        if earlier and found != expected:
            text = f"--like: its {name} is {expected}, that of {identity['bundle']} is {found}"
            if not explicit:
                raise ValueError(f"{text}; choose a bundle with --bundle")
            print(f"{text}: the picture will differ")


def _note_rounding(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Prints why a picture of --like may differ from the earlier one by rounding."""
    differing = [
        f"{name} {earlier[name]} there, {value} here"
        for name, value in now.items()
        if name in earlier and earlier[name] != value
    ]
    if differing:
        print(f"--like: {'; '.join(differing)}: the picture may differ by rounding")


def _note_sizes(pipeline: "StableDiffusionPipeline", pictures: Sequence[Picture]) -> None:
    _, height, width = latent_shape(pipeline)
    trained = (width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor)
    for size in dict.fromkeys(picture.settings.size for picture in pictures):
        if size not in (None, trained):
            print(
                f"--size: {size[0]} x {size[1]} pixels, but the bundle was trained with "
                f"{trained[0]} x {trained[1]}: objects may be repeated or cut off"
            )


def describe_guide(guide: str | None) -> dict[str, str]:
    """Returns the sha256 of the guide, if there is one."""
    return {} if guide is None else {"guide_sha256": hash_guide(guide)}


def choose_bundle(bundle: str | None, name: str | None) -> Path:
    """Returns the given bundle, else that of the named run; the shipped one if both are None."""
    if bundle is not None:
        return find_bundle(bundle)
    if name is None:
        print(f"no --bundle and no run name: using the shipped {SHIPPED_BUNDLE}")
        return find_bundle(SHIPPED_BUNDLE)
    own = output_root() / "runs" / name / "bundle"
    if not own.exists():
        raise ValueError(
            f"--bundle: {own} does not exist; train it with train/run.py, or give the folder of "
            f"another bundle, such as {SHIPPED_BUNDLE}"
        )
    return find_bundle(own)


def describe_bundle(folder: Path) -> dict[str, str]:
    """Returns the bundle's path, relative to the project if it is inside, and its sha256."""
    path, root = folder.resolve(), output_root().resolve()
    name = path.relative_to(root) if path.is_relative_to(root) else path
    return {"bundle": str(name), "bundle_sha256": digest(folder)}
