"""The shipped encoders: stock formats, the limits on their metrics, and the code that made them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from latent_t2i.model.paths import ROOT
from latent_t2i.scenes import clip_training, train_encoders, vae_training
from latent_t2i.scenes.captions import vocabulary
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import WORLDS, stream

ENCODERS = ROOT / "scenes" / "encoders"


@pytest.mark.slow
def test_the_shipped_weights_meet_their_limits() -> None:
    metrics = train_encoders.measure(ENCODERS, num=300)
    train_encoders.check_limits(metrics)
    assert metrics["vae/latent_std_smallest"] >= 0.8
    assert metrics["vae/latent_std_largest"] <= 1.25


def test_the_shipped_weights_are_small_safetensors() -> None:
    files = [path for path in ENCODERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_a_metric_below_its_limit_is_reported_with_both_numbers() -> None:
    good = dict.fromkeys(train_encoders.LIMITS, 99.0)
    train_encoders.check_limits(good)
    with pytest.raises(SystemExit, match=r"clip/shape_replaced is 0.5800, expected at least 0.9"):
        train_encoders.check_limits(good | {"clip/shape_replaced": 0.58})


def test_each_word_of_the_grammar_is_one_token_and_other_text_is_encoded_as_bytes() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "clip")
    assert tokenizer.model_max_length == 77
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    ids = tokenizer("Zürich, 7 o'clock!").input_ids
    assert tokenizer.eos_token_id not in ids[:-1]


def test_the_text_tower_is_causal_so_max_tokens_does_not_change_the_states() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "clip")
    tower = CLIPModel.from_pretrained(ENCODERS / "clip", dtype=torch.float32).text_model
    texts = ["a red circle above a blue star"]
    short, long = (
        tower(input_ids=clip_training.encode(tokenizer, texts, num)).last_hidden_state
        for num in (24, 77)
    )
    assert torch.allclose(short, long[:, :24], atol=1e-5)


def test_standardising_changes_the_latents_but_not_the_decoded_image() -> None:
    torch.manual_seed(0)
    vae = vae_training.build().eval()
    scene, _ = next(stream(WORLDS["full"], "train", 0))
    image = vae_training.to_tensor(render([scene]))
    with torch.no_grad():
        before = vae.encode(image).latent_dist
        decoded = vae.decode(before.mean).sample
        vae_training.standardise(vae, seed=0, num_images=128)
        after = vae.encode(image).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
    # The posterior's standard deviation is scaled like its mean.
    ratio = after.std / before.std
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), rtol=1e-3)
    assert not torch.allclose(after.mean, before.mean)


def test_growing_keeps_the_trained_weights() -> None:
    small = vae_training.build(3)
    before, after = small.state_dict(), vae_training.grow(small).state_dict()
    inner = "resnets.0.conv1.weight"
    for name, grown_name in (
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("decoder.conv_out.weight", "decoder.conv_out.weight"),
        (f"decoder.up_blocks.2.{inner}", f"decoder.up_blocks.3.{inner}"),
    ):
        assert torch.equal(before[name], after[grown_name])


def test_negatives_differ_from_the_caption_in_one_attribute() -> None:
    data = clip_training.caption_stream(WORLDS["full"], "train", 0)
    seen = set()
    for _, (scene, true, negatives) in zip(range(200), data, strict=False):
        for kind, text in negatives.items():
            seen.add(kind)
            assert text != true.text
            if kind == "colours_swapped":
                words = [sorted(t.replace("an ", "a ").split()) for t in (text, true.text)]
                assert words[0] == words[1]
        if len(scene.objects) == 1:
            assert set(negatives) == {"shape_replaced", "colour_replaced"}
    assert seen == set(clip_training.NEGATIVE_KINDS)


@pytest.mark.slow
def test_both_encoders_can_be_trained(tmp_path: Path) -> None:
    few = "--vae-steps 2 2 2 2 --text-steps 2 --image-steps 2 --num-measured 8"
    with pytest.raises(SystemExit, match="the encoders are below their limits"):
        train_encoders.main(["--out", str(tmp_path), *few.split()])
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == 1.0
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 8, 8, 8)
    assert "| vae/psnr_db |" in (tmp_path / "README.md").read_text()
    assert np.isfinite(train_encoders.measure(tmp_path, num=8)["clip/shape_replaced"])
