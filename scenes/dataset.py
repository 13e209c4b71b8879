"""Scenes written out in COCO's own layout, so that they go the very same way as COCO.

FOLDER/SPLIT/000000000001.png ...   FOLDER/annotations/{captions,instances}_SPLIT.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latent_t2i.scenes.captions import captions
from latent_t2i.scenes.draw import draw
from latent_t2i.scenes.world import CANVAS_PX, SHAPES, SPLITS, WORLDS, Scene, Thing, stream


@dataclass(frozen=True, kw_only=True)
class CocoPaths:
    """Where a split lies: the image folder, the captions JSON and the instances JSON."""

    images: Path
    captions: Path
    instances: Path


def write_coco(
    out_dir: Path, world: str, split: str, num_images: int, image_size_px: int, seed: int
) -> CocoPaths:
    """Draw `num_images` scenes of `split` into `out_dir`; a finished folder of the same settings is
    kept as it is.

    The captions file is written last, under its final name only when all is there, and says in its
    `info` what was drawn: a folder that was cut short is drawn again.

    Raises:
        ValueError: an unknown world or split, or no images asked for.
    """
    if world not in WORLDS:
        raise ValueError(f"world is {world!r}, expected one of {', '.join(WORLDS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, expected at least 1")
    paths = CocoPaths(
        images=out_dir / split,
        captions=out_dir / "annotations" / f"captions_{split}.json",
        instances=out_dir / "annotations" / f"instances_{split}.json",
    )
    info = {"description": "procedural scenes", "world": world, "split": split,
            "num_images": num_images, "image_size_px": image_size_px, "seed": seed}  # fmt: skip
    if _is_finished(paths.captions, info):
        return paths
    for folder in (paths.images, paths.captions.parent):
        folder.mkdir(parents=True, exist_ok=True)
    _write(paths, info)
    return paths


def _is_finished(path: Path, info: dict[str, Any]) -> bool:
    return path.is_file() and bool(json.loads(path.read_text("utf-8"))["info"] == info)


def _write(paths: CocoPaths, info: dict[str, Any]) -> None:
    world, split, size_px = WORLDS[info["world"]], info["split"], info["image_size_px"]
    images: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    numbers = range(1, info["num_images"] + 1)
    bar = tqdm(numbers, desc=f"draw {split}", unit="image", disable=None)
    for image_id, (scene, rng) in zip(bar, stream(world, split, info["seed"]), strict=False):
        name = f"{image_id:012d}.png"
        draw(scene, size_px).save(paths.images / name)
        images.append({"id": image_id, "file_name": name, "width": size_px, "height": size_px})
        for caption in captions(scene, world, rng):
            told.append({"id": len(told) + 1, "image_id": image_id, "caption": caption.text})
        for thing in scene.things:
            instances.append(_instance(len(instances) + 1, image_id, thing, size_px / CANVAS_PX))
    shared = {"info": info, "licenses": [], "images": images}
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
    _dump(paths.instances, shared | {"annotations": instances, "categories": categories})
    _dump(paths.captions, shared | {"annotations": told})


def _instance(number: int, image_id: int, thing: Thing, scale: float) -> dict[str, Any]:
    left, top = (thing.x_px - thing.extent_px) * scale, (thing.y_px - thing.extent_px) * scale
    side = 2 * thing.extent_px * scale
    return {"id": number, "image_id": image_id, "category_id": SHAPES.index(thing.shape) + 1,
            "bbox": [round(left, 2), round(top, 2), round(side, 2), round(side, 2)],
            "area": round(side * side, 2), "iscrowd": 0, "colour": thing.colour}  # fmt: skip


def _dump(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content), "utf-8")
    part.replace(path)


def render(scenes: list[Scene], image_size_px: int = CANVAS_PX) -> np.ndarray:
    """Scenes as uint8 pictures.  # (B, H, W, 3)"""
    return np.stack([np.asarray(draw(scene, image_size_px)) for scene in scenes])
