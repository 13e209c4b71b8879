"""The denoising loop: guidance, noise levels, decoding, and independence of the batch."""

import math
import random
from pathlib import Path
from threading import current_thread
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from latent_t2i.model import generate as generation
from latent_t2i.model.bundle import sampling_scheduler
from latent_t2i.model.diffusion import ObjectiveConfig, make_scheduler
from latent_t2i.model.encoders import load_vae
from latent_t2i.model.generate import (
    Guidance,
    decode,
    decode_dtype,
    denoise,
    generate,
    latent_shape,
    noise_levels,
    not_finite_advice,
)
from latent_t2i.sample import sampler, schedulers
from tests import tiny
from tests.bundles import make_bundle

PROMPTS = ["a red circle", "two blue squares", "a red circle", "", "a star"]
SEEDS = [5, 6, 7, 2**63, 0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sampler.load(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))


class Counter:
    """A denoiser that records its inputs and predicts a part of them that its text scales."""

    device = torch.device("cpu")

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls: list[tuple[int, float]] = []

    def __call__(
        self, latents: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        self.calls.append((len(latents), float(timestep)))
        return (self.factor * latents * encoder_hidden_states.mean((1, 2))[:, None, None, None],)


def run(unet: Counter, guidance: Guidance, scheduler: Any, num_steps: int = 10) -> Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states, negative = torch.full((2, 3, 5), 0.4), torch.full((1, 3, 5), 0.1)
    return denoise(
        unet,
        scheduler,
        noise,
        states,
        None if guidance.network is not None else negative,
        num_steps=num_steps,
        guidance=guidance,
        generators=[],
    )


def ddim(**settings: Any) -> Any:
    return sampling_scheduler(make_scheduler(ObjectiveConfig(**settings)))


def test_guidance_outside_its_interval_costs_half() -> None:
    scheduler, unet = ddim(), Counter()
    run(unet, Guidance(scale=3.0, interval=(0.3, 4.0)), scheduler)
    sigmas = noise_levels(scheduler, scheduler.timesteps)
    assert [num for num, _ in unet.calls] == [4 if 0.3 < s <= 4.0 else 2 for s in sigmas]
    assert {num for num, _ in unet.calls} == {2, 4}


@pytest.mark.parametrize("interval", [(0.0, 1e9), None])
def test_an_interval_of_all_noise_levels_is_plain_guidance(interval: Any) -> None:
    everywhere = run(Counter(), Guidance(scale=3.0, interval=interval), ddim())
    assert torch.equal(everywhere, run(Counter(), Guidance(scale=3.0), ddim()))
    nowhere = run(Counter(), Guidance(scale=3.0, interval=(1e9, 2e9)), ddim())
    torch.testing.assert_close(nowhere, run(Counter(), Guidance(), ddim()), rtol=0, atol=1e-6)


def test_a_guide_replaces_the_unconditional_prediction() -> None:
    # Predictions 0.4 x and 0.5 * 0.4 x: guidance of scale 3 gives 0.2 x + 3 * 0.2 x = 0.8 x.
    guide = Counter(0.5)
    guided = run(Counter(), Guidance(scale=3.0, network=guide), ddim())
    assert {num for num, _ in guide.calls} == {2}
    torch.testing.assert_close(guided, run(Counter(2.0), Guidance(), ddim()), rtol=0, atol=1e-5)


def test_rescaling_is_that_of_diffusers(pipeline: Any) -> None:
    seen: list[Tensor] = []

    def images(**settings: Any) -> np.ndarray:
        guidance = Guidance(scale=4.0, **settings)
        drawn = generate(pipeline, PROMPTS, SEEDS, guidance=guidance, num_steps=4, batch_size=5)
        return np.stack([np.asarray(image, int) for image in drawn])

    stock = pipeline(
        PROMPTS,
        guidance_scale=4.0,
        guidance_rescale=0.7,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        callback_on_step_end=lambda _, i, t, kwargs: seen.append(t) or kwargs,
    ).images
    assert np.abs(images(rescale=0.7) - np.stack([np.asarray(i, int) for i in stock])).max() <= 1
    assert np.abs(images() - images(rescale=0.7)).max() > 2
    assert len(seen) == 4 and callable(rescale_noise_cfg)


def test_noise_levels_are_the_ratio_of_noise_to_signal() -> None:
    scheduler = ddim(prediction="v", beta_schedule="squaredcos_cap_v2")
    levels = noise_levels(scheduler, torch.tensor([999, 500, 0, 500.5]))
    signal = scheduler.alphas_cumprod
    assert levels[1] == pytest.approx(math.sqrt((1 - signal[500]) / signal[500]), rel=1e-5)
    assert levels[0] > 1000 and levels[2] < 0.1
    assert levels[1] < levels[3] < noise_levels(scheduler, torch.tensor([501]))[0]
    zero_snr = ddim(prediction="v", zero_terminal_snr=True)
    assert noise_levels(zero_snr, torch.tensor([999]))[0] > 1e5
    flow = ddim(prediction="flow")
    assert noise_levels(flow, torch.tensor([500, 750])) == pytest.approx([1, 3])
    assert noise_levels(flow, torch.tensor([1000]))[0] > 1e5


@pytest.mark.parametrize("name", ["dpmpp", "euler-ancestral"])
def test_an_image_does_not_depend_on_its_position_or_neighbours(pipeline: Any, name: str) -> None:
    scheduler = schedulers.make_scheduler(pipeline.scheduler, name)
    order = list(range(5))

    def draw(order: list[int], batch_size: int) -> tuple[list[bytes], list[Tensor]]:
        latents: list[Tensor] = []
        images = generate(
            pipeline,
            [PROMPTS[i] for i in order],
            [SEEDS[i] for i in order],
            guidance=Guidance(scale=3.0),
            num_steps=3,
            batch_size=batch_size,
            scheduler=scheduler,
            on_step=lambda step, x: latents.extend(x) if step == 3 else None,
        )
        return [image.tobytes() for image in images], latents

    images, latents = draw(order, 2)
    random.Random(0).shuffle(order)
    assert draw(order, 2)[0] == [images[i] for i in order]
    assert draw([4], 2)[0] == images[4:]
    _, single = draw(list(range(5)), 1)
    for one, other in zip(latents, single, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_each_prompt_is_encoded_once(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = pipeline.text_encoder.forward

    def count(ids: Tensor, *arguments: Any, **settings: Any) -> Any:
        calls.append(len(ids))
        return forward(ids, *arguments, **settings)

    monkeypatch.setattr(pipeline.text_encoder, "forward", count)
    images = generate(
        pipeline, PROMPTS * 2, SEEDS * 2, guidance=Guidance(scale=2.0), num_steps=1, batch_size=3
    )
    assert len(list(images)) == 10
    assert calls == [1] * 4  # the empty prompt is one of the four


def overflowing_vae() -> AutoencoderKL:
    """Returns a VAE with activations of about 1e5 before the last normalisation."""
    vae = load_vae(tiny.vae_folder("sd"))
    with torch.no_grad():
        vae.decoder.up_blocks[-1].resnets[-1].conv2.weight.mul_(3e5)
    return vae


def test_a_vae_that_overflows_decodes_in_float32() -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = decode(overflowing_vae(), latents)
    half = overflowing_vae().half()
    with torch.no_grad():
        assert not half.decode(latents.half() / half.config.scaling_factor).sample.isfinite().all()
    found = decode(half, latents.half())
    assert (found.int() - expected.int()).abs().max() <= 2
    assert half.dtype == torch.float32


def test_only_a_vae_that_says_so_decodes_in_float16() -> None:
    assert decode_dtype({}, torch.float16) == torch.float32
    assert decode_dtype({"force_upcast": True}, torch.float16) == torch.float32
    assert decode_dtype({"force_upcast": False}, torch.float16) == torch.float16
    for dtype in (torch.bfloat16, torch.float32):
        assert decode_dtype({"force_upcast": True}, dtype) == dtype


@pytest.mark.parametrize("upcast", [True, False])
def test_loading_in_float16_keeps_the_vae_in_float32(tmp_path: Path, upcast: bool) -> None:
    vae = load_vae(tiny.encoders().vae)
    vae.register_to_config(force_upcast=upcast)
    loaded = sampler.load(make_bundle(tmp_path / "bundle", vae=vae), device="cpu", dtype="float16")
    assert (loaded.unet.dtype, loaded.text_encoder.dtype) == (torch.float16, torch.float16)
    assert loaded.vae.dtype == (torch.float32 if upcast else torch.float16)


def test_a_vae_is_converted_before_it_decodes_in_another_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of its old weights must not be reused while a stream still reads them."""
    pipeline = sampler.load(make_bundle(tmp_path / "bundle"))
    pipeline.vae.to(torch.float16)
    convert, converting, decoding = pipeline.vae.to, [], []
    monkeypatch.setattr(generation, "decodes_beside", lambda device: True)
    monkeypatch.setattr(
        pipeline.vae, "to", lambda dtype: converting.append(current_thread()) or convert(dtype)
    )
    pipeline.vae.decoder.register_forward_pre_hook(lambda *_: decoding.append(current_thread()))
    settings: dict[str, Any] = {"guidance": Guidance(), "num_steps": 1, "batch_size": 1}
    assert len(list(generate(pipeline, PROMPTS[:2], SEEDS[:2], **settings))) == 2
    assert pipeline.vae.dtype == torch.float32
    assert converting == [current_thread()]
    assert len(decoding) == 2 and current_thread() not in decoding


def test_values_that_are_not_finite_are_an_error_or_black() -> None:
    vae, latents = load_vae(tiny.encoders().vae), torch.full((1, 4, 8, 8), torch.nan)
    with pytest.raises(ValueError, match=r"not finite in torch.float32"):
        decode(vae, latents)
    assert not decode(vae, latents, require_finite=False).any()
    scheduler = ddim()
    assert "try --dtype float32" in not_finite_advice(torch.float16, scheduler, 3, 4.0)
    assert "DDIMScheduler fails with" in not_finite_advice(torch.float32, scheduler, 3, 4.0)


def test_sizes_are_width_and_height(pipeline: Any) -> None:
    assert latent_shape(pipeline) == (4, 8, 8)
    assert latent_shape(pipeline, (128, 64)) == (4, 8, 16)
    with pytest.raises(ValueError, match=r"--size: expected multiples of 8 pixels .* 60 x 64"):
        latent_shape(pipeline, (60, 64))
