"""The stage one benchmark: the plain script's outputs equal those of this project."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.stages.photographs import write_photographs
from bench.stages.plain_script import CocoImages
from latent_t2i.model.encoders import encode_images, encode_text, load_text_encoder, load_vae
from tests.coco_folders import CocoFolder, make_coco

ROOT = Path(__file__).resolve().parents[2]
VAE, CLIP = ROOT / "scenes/encoders/vae", ROOT / "scenes/encoders/clip"
NUM_CAPTIONS = (2, 1, 3)
SIZE_PX = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CocoFolder:
    return make_coco(tmp_path_factory.mktemp("coco"), NUM_CAPTIONS, size_px=SIZE_PX)


@pytest.fixture(scope="module")
def out(folder: CocoFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script writes. It runs as a subprocess, since it forks workers."""
    out = tmp_path_factory.mktemp("script") / "out"
    paths = [folder.images, folder.captions, VAE, CLIP, out]
    done = subprocess.run(
        [sys.executable, "-m", "bench.stages.plain_script", *map(str, paths), str(SIZE_PX)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["images"] == len(NUM_CAPTIONS)
    assert figures["seconds"] > 0
    return out


@pytest.mark.slow
def test_script_writes_one_file_per_image_and_caption(out: Path) -> None:
    expected = {f"{image:012d}.latent.npy" for image in range(1, len(NUM_CAPTIONS) + 1)}
    for image, number in enumerate(NUM_CAPTIONS, 1):
        expected |= {f"{image:012d}.text{caption}.npy" for caption in range(number)}
    assert {path.name for path in out.iterdir()} == expected


@pytest.mark.slow
def test_script_encodes_as_this_project_does(out: Path, folder: CocoFolder) -> None:
    vae, (tokenizer, encoder) = load_vae(str(VAE)), load_text_encoder(str(CLIP))
    dataset = CocoImages(folder.images, folder.captions, SIZE_PX)
    for index in range(len(dataset)):
        name, pixels, captions = dataset[index]
        moments = np.load(out / f"{name}.latent.npy")
        assert_close(moments, encode_images(vae, pixels[None])[0])
        for number, caption in enumerate(captions):
            ids = tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt")
            text = np.load(out / f"{name}.text{number}.npy")
            assert_close(text, encode_text(encoder, ids.input_ids)[0])


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    """Asserts equality within float16's precision."""
    assert found.dtype == np.float16
    difference = torch.from_numpy(found).float() - expected.float()
    assert difference.abs().max() < 1e-2 * expected.abs().max()


def test_script_crops_the_centre(folder: CocoFolder) -> None:
    _, pixels, _ = CocoImages(folder.images, folder.captions, SIZE_PX)[0]
    noise = np.random.default_rng(1).integers(0, 256, (SIZE_PX, SIZE_PX + 9, 3))  # make_coco's
    middle = torch.from_numpy(noise[:, 4 : 4 + SIZE_PX]).permute(2, 0, 1)
    assert torch.allclose(pixels, middle / 127.5 - 1, atol=1e-6)


def test_synthetic_images_have_the_file_size_of_coco(tmp_path: Path) -> None:
    images, captions = write_photographs(tmp_path, 8)
    sizes = [path.stat().st_size for path in images.iterdir()]
    assert 100_000 < np.mean(sizes) < 200_000, "COCO's have 160 kB"
    document = json.loads(captions.read_text())
    assert len(document["images"]) == 8 and len(document["annotations"]) == 40
