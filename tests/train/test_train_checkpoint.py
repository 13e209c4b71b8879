"""Checkpoints restore every bit, and only for the run that they belong to."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from latent_t2i.model.denoiser import build
from latent_t2i.model.ema import EMA, EMAConfig
from latent_t2i.train import checkpoint
from latent_t2i.train.checkpoint import TrainState
from latent_t2i.train.config import OptimConfig
from latent_t2i.train.loop import train
from latent_t2i.train.optim import make_optimizer
from tests.train.conftest import MODEL, MakeConfig, assert_same_tensors

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "model": {"channels": (8,), "attention_kernel": "auto"},
    "optim": {"learning_rate": 1e-4},
}


def make_state(seed: int = 0, *, channels_last: bool = False) -> TrainState:
    """A state after two updates with random gradients."""
    torch.manual_seed(seed)
    unet = build(MODEL, latent_channels=4, sample_size=8, text_width=32)
    unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    ema = EMA(EMAConfig(), unet.named_parameters())
    optimizer = Accelerator(cpu=True, mixed_precision="no").prepare(
        make_optimizer(OptimConfig(), unet.parameters())
    )
    state = TrainState(unet=unet, ema=ema, optimizer=optimizer)
    for _ in range(2):
        update(state)
    return state


def update(state: TrainState) -> None:
    """One step with random gradients."""
    for parameter in state.unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.ema.update(state.unet.parameters(), state.step)
    state.step += 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_state_continues_bit_by_bit(tmp_path: Path, channels_last: bool) -> None:
    state = make_state(channels_last=channels_last)
    state.train_s, state.metrics = 1.25, {"rows": [[0.1, 0.2, 0.0]]}
    checkpoint.save(tmp_path, state, SETTINGS, keep=2)
    other = make_state(seed=1, channels_last=channels_last)
    checkpoint.load(checkpoint.find_all(tmp_path)[-1], other)
    assert (other.step, other.train_s, other.metrics) == (2, state.train_s, state.metrics)
    for each in (state, other):
        torch.manual_seed(5)
        update(each)
    assert_same_tensors(other.unet.state_dict(), state.unet.state_dict())
    assert_same_tensors(other.ema.average, state.ema.average)


class NewTensors(TorchDispatchMode):
    """Records the devices on which operations make tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.devices.append(made.device.type)
        return made


def test_a_full_gpu_has_to_hold_no_copy_of_a_saved_tensor() -> None:
    with FakeTensorMode():
        weight = torch.empty(8, 4, 3, 3, device="cuda").to(memory_format=torch.channels_last)
        with NewTensors() as made:
            packed = checkpoint.pack(weight)
    assert set(made.devices) == {"cpu"}
    assert packed.is_contiguous()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = make_state()
    for _ in range(3):
        state.step += 1
        checkpoint.save(tmp_path, state, SETTINGS, keep=2)
    kept = ["step-00000004", "step-00000005"]
    assert [p.name for p in checkpoint.find_all(tmp_path)] == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_a_changed_model_is_refused_naming_both_values(tmp_path: Path) -> None:
    now = SETTINGS | {"model": {"channels": (16,), "attention_kernel": "auto"}}
    with pytest.raises(ValueError, match=r"model.channels: .* has \[8\], found \[16\]"):
        checkpoint.compare_settings(SETTINGS, now, tmp_path)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    before, now = ({"optim": {"kind": kind}} for kind in ("adamw", "adamw8bit"))
    with pytest.raises(ValueError, match=r"optim.kind: .* has 'adamw', found 'adamw8bit'"):
        checkpoint.compare_settings(before, now, tmp_path)


def test_a_checkpoint_of_a_version_with_other_noise_is_refused(tmp_path: Path) -> None:
    now = SETTINGS | {"draws": "philox per example"}
    message = r"draws: .* is of an older version .* expected 'philox per example'; finish it with"
    with pytest.raises(ValueError, match=message):
        checkpoint.compare_settings(SETTINGS, now, tmp_path)


def test_a_changed_learning_rate_is_allowed_and_reported(tmp_path: Path) -> None:
    now = SETTINGS | {
        "optim": {"learning_rate": 2e-4},
        "model": {"channels": [8], "attention_kernel": "plain"},
    }
    assert checkpoint.compare_settings(SETTINGS, now, tmp_path) == [
        "model.attention_kernel changed from 'auto' to 'plain'",
        "optim.learning_rate changed from 0.0001 to 0.0002",
    ]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all kinds of values."""
    state = make_state()
    state.metrics = {
        "rows": [[0.1, 0.2, 0.0]],
        "num_skipped": 1,
        "num_skipped_in_a_row": 0,
        "last": {"step": 1, "loss": 0.5},
        "validation": {},
        "previewed": None,
    }
    folder = tmp_path_factory.mktemp("intact")
    checkpoint.save(folder, state, SETTINGS, keep=1)
    return checkpoint.find_all(folder)[0]


@pytest.fixture
def copied(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / intact.name)


@pytest.mark.parametrize(
    "name", ["unet.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_changed_byte_is_refused_naming_the_file(copied: Path, name: str) -> None:
    rng, content = random.Random(0), (copied / name).read_bytes()
    state = make_state()
    weights = {key: tensor.clone() for key, tensor in state.unet.state_dict().items()}
    for _ in range(100):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        (copied / name).write_bytes(changed)
        with pytest.raises(ValueError, match=rf"step-00000002: .* is damaged \({name}: "):
            checkpoint.load(copied, state)
    (copied / name).write_bytes(content)
    assert_same_tensors(state.unet.state_dict(), weights)
    checkpoint.load(copied, state)


def replace_random_value(rng: random.Random, value: Any) -> Any:
    """A JSON document with one value replaced, removed or nested."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = replace_random_value(rng, value[key])
        if isinstance(value, dict) and rng.random() < 0.1:
            del value[key]
        return value
    return rng.choice([None, True, -1, 1e400, "", "x", [], [[]], {}, {"a": 1}])


def test_a_mutated_state_is_a_clear_error(copied: Path) -> None:
    """Also one whose hash is right, as of a file that another program wrote."""
    rng, path = random.Random(0), copied / "state.json"
    content = path.read_bytes()
    state, num_refused = make_state(), 0
    for number in range(400):
        mutated = replace_random_value(rng, json.loads(content))
        if number % 2 and isinstance(mutated, dict):
            mutated["sha256"] = checkpoint.hash_state(mutated)
        path.write_text(json.dumps(mutated, indent=1) + "\n")
        try:
            checkpoint.load(copied, state)
        except ValueError as error:
            assert "step-00000002: the checkpoint is damaged (" in str(error)
            num_refused += 1
    assert num_refused > 250
    for text in (b"", b"[" * 10**6, b"9" * 10**4, b"\xff", b'{"step": 2}'):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.load(copied, state)


def test_a_checkpoint_that_was_being_replaced_is_restored(copied: Path) -> None:
    copied.rename(copied.with_name(f".{copied.name}.old"))
    (copied.parent / ".step-00000002.partial").mkdir()
    (copied.parent / ".step-00000001.deleted").mkdir()
    checkpoint.repair(copied.parent)
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    checkpoint.load(copied, make_state())


def test_a_resumed_run_deletes_what_a_kill_left(make_config: MakeConfig, tmp_path: Path) -> None:
    """A kill within retention leaves one checkpoint too many, and one that is half deleted."""
    train(make_config(num_steps=3, checkpoint_every_steps=1, keep_checkpoints=3))
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".step-00000000.deleted").mkdir()
    train(make_config(num_steps=3, keep_checkpoints=2))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["latent_shift", "latent_scale", "empty_text_sha256"])
def test_other_constants_of_the_loss_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .* has \[1.0\], found \[0.3\]"):
        checkpoint.compare_settings({name: [1.0]}, {name: [0.3]}, tmp_path)
