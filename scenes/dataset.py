"""Writes scenes as a dataset in COCO's layout, so that stage one reads them like COCO.

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
from latent_t2i.scenes.world import CANVAS_PX, SHAPES, SPLITS, WORLDS, Scene, SceneObject, stream


@dataclass(frozen=True, kw_only=True)
class CocoPaths:
    """A split's image folder, captions JSON and instances JSON."""

    images: Path
    captions: Path
    instances: Path


def write_coco(
    out_dir: Path, world: str, split: str, num_images: int, image_size_px: int, seed: int
) -> CocoPaths:
    """Renders `num_images` scenes of `split`; keeps a complete dataset with the same settings.

    Raises ValueError for an unknown world or split, or for `num_images` below 1.
    """
    for name, value, known in (("world", world, WORLDS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, expected at least 1")
    paths = CocoPaths(
        images=out_dir / split,
        captions=out_dir / "annotations" / f"captions_{split}.json",
        instances=out_dir / "annotations" / f"instances_{split}.json",
    )
    info = {"description": "procedural scenes", "world": world, "split": split,
            "num_images": num_images, "image_size_px": image_size_px, "seed": seed}  # fmt: skip
    if not _is_finished(paths, info):
        _write(paths, info)
    return paths


def _is_finished(paths: CocoPaths, info: dict[str, Any]) -> bool:
    if not (paths.captions.is_file() and paths.instances.is_file()):
        return False
    try:
        found = json.loads(paths.captions.read_text("utf-8"))["info"]
    except (ValueError, KeyError, TypeError):  # damaged: render again
        return False
    num_images = sum(1 for _ in paths.images.glob("*.png"))
    return bool(found == info) and num_images >= info["num_images"]


def _write(paths: CocoPaths, info: dict[str, Any]) -> None:
    for folder in (paths.images, paths.captions.parent):
        folder.mkdir(parents=True, exist_ok=True)
    world, split, size_px = WORLDS[info["world"]], info["split"], info["image_size_px"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    numbers = range(1, info["num_images"] + 1)
    bar = tqdm(numbers, desc=f"draw {split}", unit="image", disable=None)
    for image_id, (scene, rng) in zip(bar, stream(world, split, info["seed"]), strict=False):
        name = f"{image_id:012d}.png"
        draw(scene, size_px).save(paths.images / name)
        images.append({"id": image_id, "file_name": name, "width": size_px, "height": size_px})
        for caption in captions(scene, world, rng):
            number = len(annotations) + 1
            annotations.append({"id": number, "image_id": image_id, "caption": caption.text})
        for item in scene.objects:
            instances.append(_instance(len(instances) + 1, image_id, item, size_px / CANVAS_PX))
    shared = {"info": info, "licenses": [], "images": images}
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
    _dump(paths.instances, shared | {"annotations": instances, "categories": categories})
    # The captions file marks the dataset as complete, so it is written last.
    _dump(paths.captions, shared | {"annotations": annotations})


def _instance(number: int, image_id: int, item: SceneObject, scale: float) -> dict[str, Any]:
    left, top = (item.x_px - item.extent_px) * scale, (item.y_px - item.extent_px) * scale
    side = 2 * item.extent_px * scale
    return {"id": number, "image_id": image_id, "category_id": SHAPES.index(item.shape) + 1,
            "bbox": [round(left, 2), round(top, 2), round(side, 2), round(side, 2)],
            "area": round(side * side, 2), "iscrowd": 0, "colour": item.colour}  # fmt: skip


def _dump(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content), "utf-8")
    part.replace(path)


def render(scenes: list[Scene], image_size_px: int = CANVAS_PX) -> np.ndarray:
    """Renders scenes into one uint8 array.  # (B, H, W, 3)"""
    return np.stack([np.asarray(draw(scene, image_size_px)) for scene in scenes])
