"""The CLIP score stays the same where torchvision is installed, which has its own resizing."""

import numpy as np
import pytest

from latent_t2i.evaluation.clip_model import Clip
from latent_t2i.evaluation.networks import load_image_processor
from latent_t2i.model.paths import ROOT
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.prompts import make_prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other packages
pytest.importorskip("torchvision", reason="see .ci/references")

CLIP = ROOT / "scenes" / "encoders" / "clip"


def test_images_are_resized_by_pillow() -> None:
    from transformers import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    assert is_torchvision_available()
    ours = load_image_processor(CLIP, flag="--weights.clip")
    assert type(ours).__name__ == "CLIPImageProcessorPil"
    other = AutoImageProcessor.from_pretrained(CLIP, backend="torchvision")
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    pixels, others = (p(images=[image], return_tensors="np").pixel_values for p in (ours, other))
    assert np.abs(pixels - others).max() > 1e-3, "the backends differ"


def test_the_clip_score_is_that_without_torchvision() -> None:
    prompts = make_prompts("easy", "single", 70, 3)
    clip = Clip(str(CLIP))
    images = clip.embed_images(render([p.scene for p in prompts if p.scene]))
    texts = clip.embed_texts([prompt.text for prompt in prompts])
    score = 100 * (images * texts).sum(-1).clip(0).mean()
    assert score == pytest.approx(74.9539, abs=1e-3)
