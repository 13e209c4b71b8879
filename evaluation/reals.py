"""The real images of an evaluation: rendered scenes, or a folder."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.evaluation.captions import Names
from latent_t2i.evaluation.images import CROP, Size, batches_of, list_images
from latent_t2i.evaluation.metrics.metric import Batch, Item
from latent_t2i.evaluation.processes import Group
from latent_t2i.evaluation.rows import share_of
from latent_t2i.model.encoders import Autoencoder, encode_images, quiet
from latent_t2i.model.paths import hash_file
from latent_t2i.scenes.dataset import render


class Reals(Protocol):
    """Real images in a fixed order."""

    def __len__(self) -> int: ...

    def batches(self, group: Group, batch_size: int) -> Iterator[Batch]:
        """Yields this process's share."""

    def record(self) -> dict[str, Any]:
        """Returns name, count and sha256, for the protocol."""


@dataclass(frozen=True, kw_only=True)
class SceneReals:
    """The scenes that the prompts describe, drawn exactly."""

    items: Sequence[Item]
    size_px: int

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, group: Group, batch_size: int) -> Iterator[Batch]:
        share = share_of(self.items, group)
        for start in range(0, len(share), batch_size):
            items = [self.items[i] for i in share[start : start + batch_size]]
            scenes = [i.prompt.scene for i in items if i.prompt and i.prompt.scene]
            yield Batch(images=render(scenes, self.size_px), items=items)

    def record(self) -> dict[str, Any]:
        return {"name": "scenes of the prompts", "count": len(self), "size_px": self.size_px}


@dataclass(frozen=True, kw_only=True)
class FolderReals:
    """A folder of images; an image's captions are those of its file name."""

    folder: Path
    paths: Sequence[Path]
    items: Sequence[Item]
    size: Size | None
    sha256: str

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, group: Group, batch_size: int) -> Iterator[Batch]:
        share = share_of(self.paths, group)
        yield from batches_of(
            [self.paths[i] for i in share],
            [self.items[i] for i in share],
            batch_size=batch_size,
            size=self.size,
            first=self.paths[0],
            flag="--reference",
        )

    def record(self) -> dict[str, Any]:
        crop = "none" if self.size is None else CROP
        return {"name": self.folder.name, "count": len(self), "sha256": self.sha256, "crop": crop}


def open_folder(
    folder: Path, known: Names, size: Size | None, *, flag: str = "--reference"
) -> FolderReals:
    """Returns the images of a folder, with the captions that `known` has of their names."""
    paths = list_images(folder, flag)
    items = [
        replace(
            known.find(path, folder) or Item(position=0, key=path.relative_to(folder).as_posix()),
            position=number,
        )
        for number, path in enumerate(paths)
    ]
    return FolderReals(
        folder=folder, paths=paths, items=items, size=size, sha256=hash_files(folder, paths)
    )


def hash_files(folder: Path, paths: Sequence[Path]) -> str:
    """Returns the sha256 of the files' relative names and contents."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(folder).as_posix()}\n{hash_file(path)}\n".encode())
    return total.hexdigest()


def reconstructions(vae: Autoencoder, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields batches after the VAE: encoded to the posterior mean and decoded, in float32."""
    for batch in batches:
        yield Batch(
            images=reconstruct(vae, batch.images), items=batch.items, originals=batch.images
        )


@torch.no_grad()
def reconstruct(vae: Autoencoder, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns 8-bit images after encoding and decoding.  # (B, H, W, 3)"""
    pixels = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with quiet():
        moments = encode_images(vae, pixels)
        latents = moments[:, : vae.config.latent_channels].to(vae.dtype)
        decoded = vae.decode(latents).sample
    found = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return found.permute(0, 2, 3, 1).cpu().numpy()
