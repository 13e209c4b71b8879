"""The script that most people write to precompute latents: a DataLoader, a loop, .npy files.

    python -m bench.stages.plain_script IMAGES CAPTIONS VAE TEXT_ENCODER OUT [SIZE_PX]

One worker per core reads and resizes with Pillow. The loop runs the VAE and the text encoder on a
batch and saves one file per image (moments) and per caption (hidden states, padded to 77 tokens as
in diffusers' examples). It is meant as a fair baseline: ordinary code without tuning.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from latent_t2i.model.encoders import quiet
from latent_t2i.pipeline.encode import find_device, num_cores

BATCH_SIZE = 32


class CocoImages(Dataset[tuple[str, Tensor, list[str]]]):
    """COCO images as tensors, with their captions."""

    def __init__(self, images: Path, captions_json: Path, size_px: int) -> None:
        document = json.loads(captions_json.read_text())
        self.images = images
        self.size_px = size_px
        self.names = {image["id"]: image["file_name"] for image in document["images"]}
        self.ids = list(self.names)
        self.captions: dict[int, list[str]] = {image_id: [] for image_id in self.ids}
        for annotation in document["annotations"]:
            self.captions[annotation["image_id"]].append(annotation["caption"])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[str, Tensor, list[str]]:
        image_id = self.ids[index]
        image = Image.open(self.images / self.names[image_id]).convert("RGB")
        scale = self.size_px / min(image.size)
        width, height = (max(round(side * scale), self.size_px) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size_px) // 2, (height - self.size_px) // 2
        image = image.crop((left, top, left + self.size_px, top + self.size_px))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return f"{image_id:012d}", pixels, self.captions[image_id]


def collate(rows: list[Any]) -> tuple[list[str], Tensor, list[list[str]]]:
    """Stacks the images of a batch."""
    names, pixels, captions = zip(*rows, strict=True)
    return list(names), torch.stack(pixels), list(captions)


@torch.no_grad()
def main(
    images: Path, captions_json: Path, vae_folder: Path, text_folder: Path, out: Path, size_px: int
) -> dict[str, Any]:
    """Encodes all images; returns their number and the seconds, without loading the networks."""
    device = find_device("auto", 0)
    with quiet():
        vae = AutoencoderKL.from_pretrained(vae_folder).to(device).eval()
        tokenizer = CLIPTokenizer.from_pretrained(text_folder)
        text_encoder = CLIPTextModel.from_pretrained(text_folder).to(device).eval()
    out.mkdir(parents=True, exist_ok=True)
    dataset = CocoImages(images, captions_json, size_px)
    began = time.perf_counter()
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=num_cores(), collate_fn=collate)
    for names, pixels, captions in loader:
        moments = vae.encode(pixels.to(device)).latent_dist.parameters.half().cpu().numpy()
        for name, latent in zip(names, moments, strict=True):
            np.save(out / f"{name}.latent.npy", latent)
        texts = [caption for part in captions for caption in part]
        ids = tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        hidden = text_encoder(ids.to(device))[0].half().cpu().numpy()
        rows = iter(hidden)
        for name, part in zip(names, captions, strict=True):
            for number in range(len(part)):
                np.save(out / f"{name}.text{number}.npy", next(rows))
    return {"seconds": time.perf_counter() - began, "images": len(dataset)}


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:6]]
    print(json.dumps(main(*paths, int(sys.argv[6]) if len(sys.argv) > 6 else 64)))
