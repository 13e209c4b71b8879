"""Initial weights: from our bundles, from diffusers' layouts, in part, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from latent_t2i.model import denoiser
from latent_t2i.model.bundle import read_info
from latent_t2i.model.denoiser import DenoiserConfig
from latent_t2i.model.ema import EMAConfig
from latent_t2i.model.encoders import load_vae, quiet
from latent_t2i.train import checkpoint, initial
from latent_t2i.train.config import OptimConfig, TrainConfig
from latent_t2i.train.loop import train
from latent_t2i.train.preflight import Plan, validate
from latent_t2i.train.setup import make_accelerator, make_state
from tests import tiny
from tests.train.conftest import MakeConfig
from tests.train.test_train_loop import metrics, weights

# Stable Diffusion's layouts, with channels a fortieth as wide and diffusers' defaults for the rest.
SD1 = {
    "attention_head_dim": 8,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": tiny.TEXT_WIDTH,
}
SD2 = {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
SMALL = DenoiserConfig(channels=(8, 16, 32, 32), norm_num_groups=8)
TINY = DenoiserConfig(
    channels=(8,), attention=(True,), layers_per_block=1, attention_head_dim=2, norm_num_groups=4
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The bundle of a short run."""
    config = TrainConfig(
        name="first",
        shards=(str(shards),),
        out=str(tmp_path_factory.mktemp("first") / "run"),
        batch_size=4,
        num_steps=30,
        mixed_precision="no",
        optim=OptimConfig(learning_rate=5e-3),
        ema=EMAConfig(decay=0.5),
        model=TINY,
    )
    return train(config)


def save_unet(folder: Path, *, variant: str | None = None, **settings: Any) -> Path:
    """Saves a U-Net of random weights as diffusers does."""
    torch.manual_seed(7)
    with quiet():
        unet = UNet2DConditionModel(**{**SD1, **settings})
        unet.to(torch.float16 if variant else torch.float32)
        unet.save_pretrained(folder, variant=variant)
    return folder


def prepare(config: TrainConfig) -> tuple[Plan, checkpoint.TrainState]:
    """Returns a run's plan and its state before the first step."""
    accelerator = make_accelerator("no")
    plan = validate(config, 1)
    return plan, make_state(plan, accelerator)[0]


def test_weights_and_ema_start_as_the_bundles(make_config: MakeConfig, trained: Path) -> None:
    plan, state = prepare(make_config(init_from=str(trained)))
    expected = weights(trained)
    for found in (state.unet.state_dict(), state.ema.average):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert state.step == 0
    assert plan.initial is not None
    assert plan.settings["init_sha256"] == plan.initial.sha256
    assert not any("warning" in note for note in plan.notes)


def test_the_first_loss_is_lower_than_with_random_weights(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    losses = []
    for out, init_from in (("random", None), ("trained", str(trained))):
        folder = tmp_path / out
        train(make_config(init_from=init_from, out=str(folder), num_steps=1, log_every_steps=1))
        losses.append(metrics(folder)[0]["loss"])
    assert losses[1] < losses[0] - 0.02


def test_latents_of_another_size_use_the_same_weights(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    big = tiny.make_shards(tmp_path / "big", latent_side=16)
    bundle = train(make_config(shards=str(big), init_from=str(trained), num_steps=1))
    assert read_info(bundle)["config"]["init_from"] == str(trained)
    config = json.loads((bundle / "unet" / "config.json").read_text())
    assert config["sample_size"] == 16


def test_resuming_does_not_read_the_source_again(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    source = save_unet(tmp_path / "unet")
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
def test_a_stable_diffusion_1_pipeline_loads(
    make_config: MakeConfig, tmp_path: Path, variant: str | None
) -> None:
    source = save_unet(tmp_path / "sd" / "unet", variant=variant)
    _, state = prepare(make_config(init_from=str(tmp_path / "sd"), model=SMALL))
    name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else WEIGHTS
    expected = load_file(source / name)
    for name, tensor in state.unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].float())


def test_the_default_model_is_stable_diffusion_1s() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        ours = denoiser.build(DenoiserConfig(), latent_channels=4, sample_size=64, text_width=768)
    pairs = [initial._with_defaults(UNet2DConditionModel, net.config) for net in (theirs, ours)]
    assert not [*initial.compare_configs(*pairs)]
    assert ours.num_parameters() == 859_520_964


def test_stable_diffusion_2s_layout_is_taken_over(make_config: MakeConfig, tmp_path: Path) -> None:
    source = save_unet(tmp_path / "unet", **SD2)
    config = make_config(init_from=str(source), model=SMALL)
    with pytest.raises(ValueError, match=r"model.heads: found \[1, 2, 4, 4\], expected 8; "):
        prepare(config)
    plan, state = prepare(replace(config, model_from_init=True))
    assert plan.config.model.heads == (1, 2, 4, 4)
    assert state.unet.config["use_linear_projection"] is True
    assert "model.linear_projection: True from --init-from replaces False" in plan.notes
    prepare(replace(config, model=plan.config.model))


def test_settings_that_differ_are_named_with_both_values(
    make_config: MakeConfig, trained: Path
) -> None:
    model = replace(TINY, channels=(8, 16), attention=(True, False), layers_per_block=2)
    with pytest.raises(ValueError, match="does not match the model settings") as error:
        prepare(make_config(init_from=str(trained), model=model))
    for part in (
        "model.channels: found 8, expected [8, 16]",
        "model.attention: found [True], expected [True, False]",
        "model.layers_per_block: found 1, expected 2",
        "--model-from-init",
        "--init-allow partial",
    ):
        assert part in str(error.value)


def test_tensors_that_do_not_fit_are_random_if_allowed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    source = save_unet(tmp_path / "unet", in_channels=9, cross_attention_dim=24)
    config = make_config(init_from=str(source), model=SMALL)
    with pytest.raises(ValueError, match=r"latent channels: found 9, expected 4;"):
        prepare(config)
    plan, state = prepare(replace(config, init_allow="partial"))
    notes = "\n".join(plan.notes)
    assert "conv_in.weight: found 8x9x3x3, expected 8x4x3x3" in notes
    assert "attn2.to_k.weight (6 tensors): found 32x24, expected 32x32" in notes
    ours = state.unet.state_dict()
    assert f"{len(ours) - 33} of {len(ours)} tensors come from --init-from" in notes
    theirs = load_file(source / WEIGHTS)
    fit = [name for name, tensor in ours.items() if theirs[name].shape == tensor.shape]
    assert len(fit) == len(ours) - 33
    assert all(torch.equal(ours[name], theirs[name]) for name in fit)


def test_missing_and_unexpected_tensors_are_named() -> None:
    found = {"down_blocks.0.a": (1,), "down_blocks.1.a": (1,), "down_blocks.1.b": (1,)}
    expected = {"down_blocks.0.a": (1,), "mid_block.a": (2, 3)}
    assert [*initial.compare_shapes(found, expected)] == [
        "down_blocks.1 (2 tensors): not in this network",
        "mid_block: missing",
    ]


def test_another_objective_and_other_encoders_are_warned_about(
    make_config: MakeConfig, trained: Path, tmp_path: Path
) -> None:
    config = make_config(init_from=str(trained))
    vae = load_vae(tiny.encoders().vae)
    vae.decoder.conv_out.bias.data[0] += 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in trained.iterdir():
        (copy / part.name).symlink_to(part)
    (copy / "vae").unlink()
    vae.save_pretrained(copy / "vae")
    objective = replace(config.objective, prediction="v")
    for changed, message in (
        (replace(config, objective=objective), "found 'epsilon', expected 'v_prediction'"),
        (replace(config, init_from=str(copy)), "vae differs from the shards' vae"),
    ):
        plan, _ = prepare(changed)
        (warning,) = [note for note in plan.notes if note.startswith("warning")]
        assert message in warning


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", r"--init-from: no folder 'no/such/folder' in the"),
        ("someone/network", r"--init-from: no folder 'someone/network', .* point --init-from to"),
        (str(tiny.__file__), "--init-from: .* is a file; expected a folder"),
        ("tests", r"--init-from: .* has no config.json; expected one there, .* in unet/"),
        ("scenes/encoders/vae", "--init-from: .* expected .* 'UNet2DConditionModel'"),
    ],
)
def test_a_source_without_a_network_is_refused(
    make_config: MakeConfig, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(make_config(init_from=name))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"block_out_channels": 8}, "block_out_channels: expected a list of int, f"),
        ("config.json", {"block_out_channels": ["8"]}, "channels: expected a list of int, found "),
        ("config.json", {"down_block_types": None}, "down_block_types: expected a list of str"),
        ("config.json", {"attention_head_dim": 1.5}, "attention_head_dim: .* of int, found 1.5"),
        (INDEX, {"weight_map": {"conv_in.bias": 1}}, "weight_map: expected file names by tensor"),
        (INDEX, {"weight_map": [WEIGHTS]}, "weight_map: expected file names by tensor, found "),
        (INDEX, {}, "weight_map: expected file names by tensor, found None"),
        (INDEX, [], "expected a JSON object, found list"),
    ],
)
def test_json_of_other_types_is_refused(
    tmp_path: Path, file: str, content: Any, message: str
) -> None:
    source = save_unet(tmp_path / "unet")
    if file == INDEX:
        (source / WEIGHTS).unlink()
    else:
        content = json.loads((source / file).read_text()) | content
    (source / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"--init-from: .*{file}.*{message}"):
        initial.find(str(source))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("pickle", r"diffusion_pytorch_model.bin, a pickle"),
        ("truncated", "does not load"),
        ("nan", "tensor conv_in.bias is not finite"),
        ("another network", r"act_fn \(no setting changes it\): found gelu, expected silu"),
    ],
)
def test_unusable_weights_are_refused(
    make_config: MakeConfig, tmp_path: Path, fault: str, message: str
) -> None:
    other = {"act_fn": "gelu", "time_embedding_dim": 24} if fault == "another network" else {}
    source = save_unet(tmp_path / "unet", **other)
    path = source / WEIGHTS
    if fault == "pickle":
        path.rename(path.with_suffix(".bin"))
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "nan":
        tensors = load_file(path)
        tensors["conv_in.bias"][0] = torch.nan
        save_file(tensors, path)
    with pytest.raises(ValueError, match=f"--init-from: .*{message}"):
        prepare(make_config(init_from=str(source), model=SMALL))
