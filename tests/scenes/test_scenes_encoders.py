"""The shipped encoders: stock formats, the gate, and that they can be made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from latent_t2i import scenes
from latent_t2i.scenes import clip_training, train_encoders, vae_training
from latent_t2i.scenes.captions import vocabulary
from latent_t2i.scenes.dataset import render
from latent_t2i.scenes.world import WORLDS, stream

ENCODERS = Path(scenes.__file__).parent / "encoders"


def test_the_shipped_weights_pass_their_gate() -> None:
    figures = train_encoders.measure(ENCODERS, num=300)
    train_encoders.gate(figures)
    assert figures["vae/latent_std_smallest"] >= 0.8
    assert figures["vae/latent_std_largest"] <= 1.25


def test_the_shipped_weights_are_small_float16_safetensors() -> None:
    files = [path for path in ENCODERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_a_low_figure_stops_with_both_numbers() -> None:
    good = dict.fromkeys(train_encoders.LIMITS, 99.0)
    train_encoders.gate(good)
    with pytest.raises(SystemExit, match=r"clip/shape_replaced is 0.5800, expected at least 0.9"):
        train_encoders.gate(good | {"clip/shape_replaced": 0.58})


def test_every_word_of_the_grammar_is_one_token_and_other_text_is_spelled() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "clip")
    assert tokenizer.model_max_length == 77
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    ids = tokenizer("Zürich, 7 o'clock!").input_ids
    assert tokenizer.eos_token_id not in ids[:-1]


def test_the_text_tower_is_causal_so_fewer_positions_change_nothing() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "clip")
    tower = CLIPModel.from_pretrained(ENCODERS / "clip", dtype=torch.float32).text_model
    states = [
        tower(input_ids=clip_training.encode(tokenizer, ["a red circle above a blue star"], n))
        for n in (24, 77)
    ]
    short, long = (out.last_hidden_state for out in states)
    assert torch.allclose(short, long[:, :24], atol=1e-5)


def test_standardising_changes_the_latents_and_not_the_picture() -> None:
    torch.manual_seed(0)
    vae = vae_training.build().eval()
    scene, _ = next(stream(WORLDS["full"], "train", 0))
    image = vae_training.to_tensor(render([scene]))
    with torch.no_grad():
        before = vae.encode(image).latent_dist
        picture = vae.decode(before.mean).sample
        vae_training.standardise(vae, seed=0, num_images=128)
        after = vae.encode(image).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)
    # Relative spread of the posterior is kept: its standard deviation is scaled like its mean.
    ratio = after.std / before.std
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), rtol=1e-3)
    assert not torch.allclose(after.mean, before.mean)


def test_growing_keeps_the_trained_weights() -> None:
    small = vae_training.build(3)
    large = vae_training.grow(small)
    theirs, ours = small.state_dict(), large.state_dict()
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
        assert torch.equal(theirs[name], ours[name])
    inner = "resnets.0.conv1.weight"
    assert torch.equal(theirs[f"decoder.up_blocks.2.{inner}"], ours[f"decoder.up_blocks.3.{inner}"])


def test_negatives_belong_to_their_picture_and_differ_in_one_thing() -> None:
    data = clip_training.captioned(WORLDS["full"], "train", 0)
    seen = set()
    for _, (scene, told, wrong) in zip(range(200), data, strict=False):
        for kind, text in wrong.items():
            seen.add(kind)
            assert text != told.text
            if kind == "colours_swapped":
                assert sorted(text.replace("an ", "a ").split()) == sorted(
                    told.text.replace("an ", "a ").split()
                )
        if len(scene.things) == 1:
            assert set(wrong) == {"shape_replaced", "colour_replaced"}
    assert seen == set(clip_training.DISTORTIONS)


@pytest.mark.slow
def test_both_encoders_can_be_made_again(tmp_path: Path) -> None:
    few = [
        "--vae-steps",
        "2",
        "2",
        "2",
        "2",
        "--text-steps",
        "2",
        "--image-steps",
        "2",
        "--num-measured",
        "8",
    ]
    with pytest.raises(SystemExit, match="encoders below the gate"):
        train_encoders.main(["--out", str(tmp_path), *few])
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == 1.0
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (1, 8, 8, 8)
    assert "| vae/psnr_db |" in (tmp_path / "README.md").read_text()
    assert np.isfinite(train_encoders.measure(tmp_path, num=8)["clip/shape_replaced"])
