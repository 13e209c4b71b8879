"""Small data sets in COCO's layout, with images of noise."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class CocoFolder:
    """The paths of a small COCO data set, for `--source.*`."""

    images: Path
    captions: Path
    instances: Path

    def change(self, kind: str, **changes: Any) -> None:
        """Replaces lists of an annotation file."""
        path: Path = getattr(self, kind)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def read(self, kind: str) -> dict[str, Any]:
        """Returns an annotation file's content."""
        document: dict[str, Any] = json.loads(getattr(self, kind).read_text())
        return document


def make_coco(
    root: Path, num_captions: Sequence[int] = (2, 2, 2, 2, 2, 2), size_px: int = 72
) -> CocoFolder:
    """Writes a data set with one image per entry of `num_captions`, with ids 1, 2 ..."""
    folder = CocoFolder(root / "images", root / "captions.json", root / "instances.json")
    folder.images.mkdir(parents=True)
    images, captions, instances = [], [], []
    for image_id, number in enumerate(num_captions, 1):
        name = f"{image_id:012d}.png"
        noise = np.random.default_rng(image_id).integers(0, 256, (size_px, size_px + 9, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder.images / name)
        images.append({"id": image_id, "file_name": name})
        for index in range(number):
            text = f"picture {image_id}" if index else "a picture"  # all images share the first
            captions.append({"id": len(captions), "image_id": image_id, "caption": text})
        box = {"bbox": [1.5, 2.0, 3.0, 4.0], "category_id": 1, "iscrowd": 0}
        instances.append({"id": image_id, "image_id": image_id} | box)
    categories = [{"id": 1, "name": "noise"}]
    folder.captions.write_text(json.dumps({"images": images, "annotations": captions}))
    folder.instances.write_text(
        json.dumps({"images": images, "annotations": instances, "categories": categories})
    )
    return folder
