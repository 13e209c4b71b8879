"""The U-Net matches its config, and the attention kernel is chosen for the device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from latent_t2i.model.config import DenoiserConfig
from latent_t2i.model.denoiser import build, choose_attention

SMALL: dict[str, Any] = {
    "channels": (8, 16),
    "attention": (False, True),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def test_the_network_has_the_configured_shape() -> None:
    unet = build(DenoiserConfig(**SMALL), latent_channels=4, sample_size=8, text_width=32)
    assert unet.config.down_block_types == ("DownBlock2D", "CrossAttnDownBlock2D")
    assert unet.config.up_block_types == ("CrossAttnUpBlock2D", "UpBlock2D")
    noisy, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 7, 32)
    assert unet(noisy, torch.tensor([0, 9]), text).sample.shape == noisy.shape
    heads = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.heads
    assert heads == SMALL["attention_head_dim"]


@pytest.mark.parametrize(
    ("kernel", "device_type", "precision", "expected"),
    [
        ("auto", "cpu", "bf16", "plain"),
        ("auto", "cpu", "no", "sdpa"),
        ("auto", "cuda", "bf16", "sdpa"),
        ("plain", "cuda", "fp16", "plain"),
        ("sdpa", "cpu", "bf16", "sdpa"),
    ],
)
def test_the_attention_kernel_is_chosen(
    kernel: Any, device_type: str, precision: str, expected: str
) -> None:
    unet = build(DenoiserConfig(**SMALL), latent_channels=4, sample_size=8, text_width=32)
    chosen = choose_attention(unet, kernel, device_type=device_type, precision=precision)
    kind = AttnProcessor if expected == "plain" else AttnProcessor2_0
    assert chosen == expected
    assert {type(p) for p in unet.attn_processors.values()} == {kind}


@pytest.mark.parametrize(
    ("sample_size", "attention", "expected"),
    [
        (31, (True, True), "plain"),
        ((16, 32), (True, True), "sdpa"),
        (32, (False, True), "plain"),
        (64, (False, True), "sdpa"),
        (32, (False, False), "plain"),
    ],
)
def test_large_feature_maps_use_sdpa_on_a_cpu(
    sample_size: int | tuple[int, int], attention: tuple[bool, bool], expected: str
) -> None:
    config = replace(DenoiserConfig(**SMALL), attention=attention)
    unet = build(config, latent_channels=4, sample_size=sample_size, text_width=32)
    assert choose_attention(unet, "auto", device_type="cpu", precision="bf16") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ()}, "model.channels: expected one width per level"),
        ({"attention": (True,)}, r"model.attention: expected one flag per level .*\(2\), found 1"),
        (
            {"norm_num_groups": 5},
            "model.norm_num_groups: expected a divisor of the width 8, found 5",
        ),
        (
            {"attention_head_dim": 16},
            "model.attention_head_dim: expected a divisor of the width 8, found 16",
        ),
        ({"heads": (3, 4)}, "model.heads: expected a divisor of the width 8, found 3"),
        ({"layers_per_block": 0}, "model.layers_per_block: expected 1 or more, found 0"),
        ({"dropout": 1.0}, "model.dropout: expected 0 or more and less than 1, found 1.0"),
    ],
)
def test_invalid_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserConfig(**(SMALL | change))
