"""The further producers: what they make of a view, and which settings are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, Dinov2Model, Dinov2WithRegistersModel
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from latent_t2i.model.encoders import fingerprint, quiet
from latent_t2i.pipeline.producers.producer import produce
from latent_t2i.pipeline.producers.registry import FURTHER, load_further
from tests import tiny
from tests.hostile import photograph


def views(width: int, height: int) -> tuple[Tensor, Image.Image]:
    """Returns a batch of two views, of which the second is flipped, and the first as an image."""
    image = photograph((width, height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    return torch.cat([pixels, pixels.flip(3)]), image


def normalised(image: Image.Image, mean: Any, std: Any) -> Tensor:
    values = (np.asarray(image) / 255 - mean) / std
    return torch.from_numpy(values).permute(2, 0, 1)[None].float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 80), (256, 192)])
@torch.inference_mode()
def test_clip_s_embedding_is_that_of_its_own_preprocessing(size: tuple[int, int]) -> None:
    (producer,) = load_further([f"clip_image={tiny.vision_folder('clip_image')}"])
    (spec,) = producer.fields(size)
    assert (spec.name, spec.dtype, spec.shape, spec.per) == ("clip_image", "float16", (16,), "view")
    batch, image = views(*size)
    found = produce(producer, batch, size)["clip_image"]
    assert found.shape == (2, 16) and found.dtype == torch.float16
    width, height = (round(64 * side / min(size)) for side in size)
    left, top = (width - 64) // 2, (height - 64) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = resized.crop((left, top, left + 64, top + 64))
    network = CLIPVisionModelWithProjection.from_pretrained(tiny.vision_folder("clip_image")).eval()
    pixels = normalised(square, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    expected = network(pixel_values=pixels).image_embeds
    assert relative_error(found[0].float(), expected[0]) < 0.02  # Pillow rounds to 8 bits
    assert spec.made_by.sha256 == fingerprint(network)
    assert not torch.equal(found[0], found[1])


def test_the_image_tower_of_a_whole_clip_is_enough() -> None:
    (producer,) = load_further([f"clip_image={tiny.encoders().clip}"])
    assert producer.fields((64, 64))[0].shape == (16,)


@pytest.mark.parametrize(
    ("kind", "cls", "num_before"),
    [("dino", Dinov2Model, 1), ("dino_registers", Dinov2WithRegistersModel, 5)],
)
@torch.inference_mode()
def test_dino_s_features_are_those_of_the_patches(kind: str, cls: Any, num_before: int) -> None:
    (producer,) = load_further([f"dino={tiny.vision_folder(kind)}"])
    size = (96, 64)  # 6 x 4 patches of 16 px, which the network sees as 7 px each
    (spec,) = producer.fields(size)
    assert (spec.name, spec.shape, spec.per) == ("dino", (24, tiny.TEXT_WIDTH), "view")
    batch, image = views(*size)
    found = produce(producer, batch, size)["dino"]
    assert found.shape == (2, *spec.shape) and found.dtype == torch.float16
    pixels = normalised(
        image.resize((42, 28), Image.Resampling.BICUBIC),
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
    )
    network = cls.from_pretrained(tiny.vision_folder(kind)).eval()
    expected = network(pixel_values=pixels).last_hidden_state[:, num_before:]
    assert relative_error(found[0].float(), expected[0]) < 0.02  # Pillow rounds to 8 bits


def test_a_batch_of_one_gives_the_items_of_a_larger_batch() -> None:
    for name in FURTHER:
        (producer,) = load_further([f"{name}={tiny.vision_folder(name)}"])
        batch, _ = views(64, 64)
        with torch.inference_mode():
            found, (alone,) = producer.encode(batch), producer.encode(batch[1:])
        torch.testing.assert_close(found[0][1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["clip_image"], "expected NAME=MODEL, each NAME once, of clip_image, dino, found 'clip_"),
        (["depth=some/model"], "expected NAME=MODEL, .* found 'depth=some/model'"),
        (["dino="], "expected NAME=MODEL, .* found 'dino='"),
        (["dino=a/b", "dino=a/c"], "expected NAME=MODEL, .* found 'dino=a/c'"),
        (["dino=no folder"], "no folder 'no folder' in the current directory"),
        (["dino=CLIP"], "expected model_type 'dinov2' or 'dinov2_with_registers', found 'clip'"),
    ],
)
def test_wrong_settings_are_refused(names: list[str], message: str) -> None:
    names = [name.replace("CLIP", tiny.encoders().clip) for name in names]
    with quiet(), pytest.raises(ValueError, match=f"^--producers: .*{message}"):
        load_further(names)


def test_a_revision_follows_an_at_sign() -> None:
    with pytest.raises(ValueError, match=r"'some/model' at revision 'abc'"):
        load_further(["dino=some/model@abc"])
