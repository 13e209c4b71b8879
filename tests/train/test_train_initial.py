"""A run that goes on from a network: of ours, of diffusers, of another size, or of no use."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from latent_t2i.model import denoiser
from latent_t2i.model.bundle import read_info
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.encoders import load_vae, quiet
from latent_t2i.train import checkpoint, initial
from latent_t2i.train.config import TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import Plan, validate
from latent_t2i.train.setup import Run, make_accelerator, make_state
from tests import tiny
from tests.train.conftest import MakeConfig

SD1 = {
    "attention_head_dim": 8,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": tiny.TEXT_WIDTH,
}
"""Stable Diffusion 1 leaves the rest to diffusers' defaults; its widths are 40 times these."""
SD2 = SD1 | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
SMALL = DenoiserConfig(channels=(8, 16, 32, 32), norm_num_groups=8)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The bundle of a run of a few steps."""
    config = TrainConfig(
        name="first",
        shards=str(shards),
        out=str(tmp_path_factory.mktemp("first") / "run"),
        batch_size=4,
        num_steps=30,
        mixed_precision="no",
        optim=replace(TrainConfig(name="x", num_steps=1).optim, learning_rate=5e-3),
        ema=replace(TrainConfig(name="x", num_steps=1).ema, decay=0.5),
        model=TINY,
    )
    return train(config)


TINY = DenoiserConfig(
    channels=(8,), attention=(True,), layers_per_block=1, attention_head_dim=2, norm_num_groups=4
)


def stock(folder: Path, **settings: Any) -> Path:
    """Writes a U-Net as diffusers does, with weights of its own."""
    torch.manual_seed(7)
    with quiet():
        unet = UNet2DConditionModel(**{**SD1, **settings})
        unet.save_pretrained(folder)
    return folder


def begin(config: TrainConfig) -> tuple[Plan, Run | Any]:
    """Returns a run's plan and its state before the first step."""
    accelerator = make_accelerator("no")
    plan = validate(config, 1)
    return plan, make_state(plan, accelerator)[0]


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_first_weights_and_their_average_are_the_bundles(
    make_config: MakeConfig, trained: Path
) -> None:
    plan, state = begin(make_config(init_from=str(trained)))
    wanted = weights(trained)
    for found in (state.unet.state_dict(), state.ema.average):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert state.step == 0
    assert plan.settings["init_sha256"] == plan.initial.sha256 if plan.initial else False
    assert not any("warning" in note for note in plan.notes)


def test_the_first_loss_is_lower_than_that_of_fresh_weights(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    losses = []
    for out, init_from in (("fresh", None), ("on", str(trained))):
        config = make_config(init_from=init_from, out=str(tmp_path / out), num_steps=1)
        train(replace(config, log_every_steps=1))
        line = (tmp_path / out / "metrics.jsonl").read_text().splitlines()[0]
        losses.append(json.loads(line)["loss"])
    assert losses[1] < losses[0] - 0.02


def test_latents_of_another_size_take_the_same_weights(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    big = tiny.make_shards(tmp_path / "big", latent_side=16)
    bundle = train(make_config(shards=str(big), init_from=str(trained), num_steps=1))
    assert read_info(bundle)["config"]["init_from"] == str(trained)
    config = json.loads((bundle / "unet" / "config.json").read_text())
    assert config["sample_size"] == 16


def test_resuming_does_not_read_it_again(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    source = stock(tmp_path / "unet")
    config = make_config(init_from=str(source), model_from_init=True, num_steps=2)
    train(config)
    (source / "config.json").unlink()
    bundle = train(replace(config, num_steps=3))
    assert read_info(bundle)["step"] == 3
    assert read_info(bundle)["config"]["model"]["channels"] == [8, 16, 32, 32]
    with pytest.raises(ValueError, match=r"init_from: the run in .* has .*unet', found"):
        train(replace(config, init_from=str(trained), num_steps=4))
    with pytest.raises(ValueError, match=r"init_from: .* found None"):
        train(replace(config, init_from=None, model_from_init=False, model=SMALL, num_steps=4))
    last = checkpoint.find_all(tmp_path / "run" / "checkpoints")[-1]
    assert len(checkpoint.read_state(last)["settings"]["init_sha256"]) == 64


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_stable_diffusions_layout_is_our_default(
    make_config: MakeConfig, tmp_path: Path, variant: str | None
) -> None:
    torch.manual_seed(7)
    with quiet():
        unet = UNet2DConditionModel(**SD1)
        unet.to(torch.float16 if variant else torch.float32)
        unet.save_pretrained(tmp_path / "sd" / "unet", variant=variant)
    model = SMALL
    _, state = begin(make_config(init_from=str(tmp_path / "sd"), model=model))
    for name, tensor in state.unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, unet.state_dict()[name].float())


def test_the_default_is_stable_diffusion_1s_own_network() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        ours = denoiser.build(DenoiserConfig(), latent_channels=4, sample_size=64, text_width=768)
    pairs = [initial._with_defaults(UNet2DConditionModel, net.config) for net in (theirs, ours)]
    assert not [*initial.compare_configs(*pairs)]
    assert ours.num_parameters() == 859_520_964


def test_stable_diffusion_2s_layout_can_be_said(make_config: MakeConfig, tmp_path: Path) -> None:
    source = stock(tmp_path / "unet", **SD2)
    config = make_config(init_from=str(source), model=SMALL)
    with pytest.raises(ValueError, match=r"model.heads: \[1, 2, 4, 4\] there, 8 here; "):
        begin(config)
    plan, state = begin(replace(config, model_from_init=True))
    assert plan.config.model.heads == (1, 2, 4, 4)
    assert state.unet.config["use_linear_projection"] is True
    assert "model.linear_projection: True from --init-from, in place of False" in plan.notes
    begin(replace(config, model=plan.config.model))


def test_settings_that_differ_are_named_with_both_values(
    make_config: MakeConfig, trained: Path
) -> None:
    model = replace(TINY, channels=(8, 16), attention=(True, False), layers_per_block=2)
    with pytest.raises(ValueError, match="not the network of this run") as error:
        begin(make_config(init_from=str(trained), model=model))
    for part in (
        "model.channels: 8 there, [8, 16] here",
        "model.attention: [True] there, [True, False] here",
        "model.layers_per_block: 1 there, 2 here",
        "--model-from-init",
        "--init-allow partial",
    ):
        assert part in str(error.value)


def test_what_does_not_fit_is_named_and_fresh_when_allowed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    source = stock(tmp_path / "unet", in_channels=9, cross_attention_dim=24)
    model = SMALL
    config = make_config(init_from=str(source), model=model)
    with pytest.raises(ValueError, match=r"the latents' channels: 9 there, 4 here;"):
        begin(config)
    plan, state = begin(replace(config, init_allow="partial"))
    told = "\n".join(plan.notes)
    assert "conv_in.weight: 8x9x3x3 there, 8x4x3x3 here: fresh" in told
    assert "attn2.to_k.weight (6 tensors): 32x24 there, 32x32 here: fresh" in told
    num = len(state.unet.state_dict())
    assert f"{num - 33} of {num} tensors are from --init-from" in told
    theirs = load_file(source / "diffusion_pytorch_model.safetensors")
    ours = state.unet.state_dict()
    fit = [name for name, tensor in ours.items() if theirs[name].shape == tensor.shape]
    assert len(fit) == num - 33
    assert all(torch.equal(ours[name], theirs[name]) for name in fit)


def test_missing_and_unexpected_tensors_are_named() -> None:
    found = {"down_blocks.0.a": (1,), "down_blocks.1.a": (1,), "down_blocks.1.b": (1,)}
    wanted = {"down_blocks.0.a": (1,), "mid_block.a": (2, 3)}
    assert [*initial.compare_shapes(found, wanted)] == [
        "down_blocks.1 (2 tensors): not in this network: left out",
        "mid_block: not there: fresh",
    ]


def test_another_kind_of_network_is_refused_even_in_part(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    source = stock(tmp_path / "unet", act_fn="gelu", time_embedding_dim=24)
    with pytest.raises(ValueError, match=r"act_fn \(which no setting here changes\): gelu there"):
        begin(make_config(init_from=str(source), model=SMALL))


def test_another_objective_and_other_encoders_are_said(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    config = make_config(init_from=str(trained))
    plan, _ = begin(replace(config, objective=replace(config.objective, prediction="v")))
    warnings = [note for note in plan.notes if note.startswith("warning")]
    assert len(warnings) == 1
    assert "prediction_type 'epsilon' there, 'v_prediction' here" in warnings[0]

    vae = load_vae(tiny.encoders().vae)
    vae.decoder.conv_out.bias.data[0] += 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in trained.iterdir():
        (copy / part.name).symlink_to(part)
    (copy / "vae").unlink()
    vae.save_pretrained(copy / "vae")
    plan, _ = begin(replace(config, init_from=str(copy)))
    warnings = [note for note in plan.notes if note.startswith("warning")]
    assert len(warnings) == 1
    assert "its vae is not that of the shards" in warnings[0]


def test_pickles_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with quiet():
        UNet2DConditionModel(**SD1).save_pretrained(tmp_path / "unet", safe_serialization=False)
    with pytest.raises(ValueError, match=r"--init-from: .* a pickle, which can run arbitrary code"):
        begin(make_config(init_from=str(tmp_path / "unet"), model=SMALL))


def test_damaged_weights_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    source = stock(tmp_path / "unet")
    path = source / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--init-from: .* does not load"):
        begin(make_config(init_from=str(source), model=SMALL))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", r"--init-from: no folder 'no/such/folder' here"),
        ("someone/network", r"--init-from: no folder 'someone/network', .* point --init-from to"),
        (str(tiny.__file__), "--init-from: .* is a file; expected a folder"),
        ("tests", r"--init-from: .* has no config.json; expected one there, .* in unet/"),
        ("scenes/encoders/vae", "--init-from: .* expected .* 'UNet2DConditionModel'"),
    ],
)
def test_a_wrong_source_names_the_flag(make_config: MakeConfig, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        begin(make_config(init_from=name))


def test_settings_of_init_need_it() -> None:
    with pytest.raises(ValueError, match="init_allow: has no effect without init_from"):
        TrainConfig(name="x", num_steps=1, init_allow="partial")
    with pytest.raises(ValueError, match="model_from_init: has no effect without init_from"):
        TrainConfig(name="x", num_steps=1, model_from_init=True)
