"""Training images, decoded from their latents, to compare drawn images with.

The shards hold no images, so that what is compared is what the model learned from: the images after
the VAE. Of a large set, a random part is decoded, the same in every evaluation of the same shards.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from latent_t2i.evaluation.metrics.metric import MissingWeights
from latent_t2i.model.encoders import Autoencoder, fingerprint, load_vae
from latent_t2i.shards.buckets import holds_buckets, open_buckets
from latent_t2i.shards.reader import ShardSet, open_shards
from latent_t2i.shards.schema import Manifest, hash_json

DECODE_BATCH = 16


def open_sets(folders: Sequence[Path]) -> Sequence[ShardSet]:
    """Returns the ordinary sets of folders of shards, one per bucket if a folder has buckets.

    Raises FormatError, a ValueError, for a folder that is not a finished set.
    """
    opened = [
        (open_buckets if holds_buckets(folder) else open_shards)(folder, verify="none")
        for folder in folders
    ]
    return [part for one in opened for part in one.sets]


class TrainingSet:
    """A part of the images of one or several training sets, numbered from 0."""

    def __init__(
        self, folders: Sequence[Path], vae: Autoencoder | None = None, *, most: int = 10_000
    ) -> None:
        """Opens the shards, and chooses at most `most` images.

        `vae` is the bundle's, used if it is the one that encoded the shards.

        Raises ValueError if a folder holds no shards, and MissingWeights if their VAE is
        unavailable.
        """
        self._sets = open_sets(folders)
        starts = np.cumsum([0, *map(len, self._sets)])
        self.num_records = int(starts[-1])
        chosen = choose(self.num_records, most)
        self._set_of = np.searchsorted(starts, chosen, side="right") - 1
        self._record = chosen - starts[self._set_of]
        self._vae = _find_vae(self._sets[0].manifest, vae)
        hashes = [part.sha256 for part in self._sets]
        self.sha256 = hashes[0] if len(hashes) == 1 else hash_json(hashes)

    def __len__(self) -> int:
        return len(self._record)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Yields all images once: their numbers (B,) and pixels (B, H, W, 3)."""
        for index in range(len(self._sets)):
            numbers = np.flatnonzero(self._set_of == index)
            for start in range(0, len(numbers), DECODE_BATCH):
                part = numbers[start : start + DECODE_BATCH]
                yield part, self._decode(index, self._record[part])

    def image(self, number: int) -> NDArray[np.uint8]:
        """Returns an image.  # (H, W, 3)"""
        return self._decode(int(self._set_of[number]), self._record[[number]])[0]

    def key(self, number: int) -> str:
        """Returns the key of an image's record."""
        found = self._sets[self._set_of[number]].keys(self._record[[number]])
        return found[0]

    def caption(self, number: int) -> str:
        """Returns the first caption of an image, or an empty text."""
        document = self._sets[self._set_of[number]].meta(int(self._record[number]))
        captions = document.get("captions") or [""]
        return str(captions[0])

    @torch.inference_mode()
    def _decode(self, index: int, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        shards, first = self._sets[index], np.zeros(len(records))
        # Stored latents are unscaled, so that the posterior's mean is decoded as it is.
        latents = shards.gather(records, first, first).latent[:, : shards.manifest.latent_channels]
        pixels = self._vae.decode(latents.to(self._vae.device, torch.float32)).sample
        rounded = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).cpu().numpy()


def choose(total: int, most: int) -> NDArray[np.int64]:
    """Returns `most` of the numbers below `total`, or all, ascending; the choice is fixed."""
    if total <= most:
        return np.arange(total)
    # RandomState's numbers stay the same in all versions of numpy.
    return np.sort(np.random.RandomState(0).permutation(total)[:most])


def _find_vae(manifest: Manifest, vae: Autoencoder | None) -> Autoencoder:
    """Returns the VAE that encoded the shards: the bundle's, or the one that the manifest names.

    The bundle's can differ: with half of the digits, or with a shift of the latents folded in.
    """
    if vae is not None and fingerprint(vae) == manifest.vae.sha256:
        return vae
    try:
        named = load_vae(manifest.vae.name, manifest.vae.revision)
    except ValueError as error:
        raise MissingWeights(
            f"--train-shards: the VAE that encoded them is not available: {error}"
        ) from error
    if fingerprint(named) != manifest.vae.sha256:
        raise MissingWeights(
            f"--train-shards: they were encoded with {manifest.vae}, but {manifest.vae.name} now "
            f"has the sha256 {fingerprint(named)}; expected the same weights"
        )
    return named if vae is None else named.to(vae.device)
