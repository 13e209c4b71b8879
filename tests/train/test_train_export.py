"""The end of a run: a bundle that is damaged or of another precision is written again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latent_t2i.model.bundle import INFO_FILE
from latent_t2i.train.export import HASHES_FILE
from latent_t2i.train.loop import train
from tests.train.conftest import MakeConfig, assert_same_weights, weights

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_a_finished_run_says_so_and_changes_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = train(make_config())
    before = (bundle / INFO_FILE).stat().st_mtime_ns
    assert train(make_config()) == bundle
    assert "finished at step 10 (last step reached); nothing left to do" in capsys.readouterr().err
    assert (bundle / INFO_FILE).stat().st_mtime_ns == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        (UNET, lambda path: path.write_bytes(path.read_bytes()[:1000]), f"bundle/{UNET}: its hash"),
        (UNET, flip, f"bundle/{UNET}: its hash"),
        (INFO_FILE, lambda path: path.write_text("{"), f"bundle/{INFO_FILE}: its hash"),
        (INFO_FILE, Path.unlink, f"bundle/{INFO_FILE} is missing"),
        ("vae", shutil.rmtree, "bundle/vae/"),
        (f"../{HASHES_FILE}", Path.unlink, f"{HASHES_FILE} is missing"),
        (f"../{HASHES_FILE}", lambda path: path.write_bytes(b"\xff\n"), HASHES_FILE),
    ],
)
def test_a_damaged_bundle_is_written_again(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
    fault: str,
) -> None:
    bundle = train(make_config(num_steps=1))
    intact = shutil.copytree(bundle, tmp_path / "intact")
    damage(bundle / name)
    train(make_config(num_steps=1))
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "bundle: writing it again" in s]
    assert fault in line
    assert (bundle / INFO_FILE).read_text() == (intact / INFO_FILE).read_text()
    assert_same_weights(bundle, intact)
    assert (bundle / "vae" / "config.json").is_file()


def test_a_missing_bundle_is_written_again(make_config: MakeConfig, tmp_path: Path) -> None:
    bundle = train(make_config(num_steps=1))
    intact = shutil.move(bundle, tmp_path / "intact")
    assert_same_weights(train(make_config(num_steps=1)), Path(intact))


def test_a_finished_run_with_another_bundle_dtype_writes_the_bundle_again(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = train(make_config(num_steps=1))
    assert {str(tensor.dtype) for tensor in weights(bundle).values()} == {"torch.float32"}
    train(make_config(num_steps=1, bundle_dtype="float16"))
    stderr = capsys.readouterr().err
    assert "writing it again: bundle_dtype changed from 'float32' to 'float16'" in stderr
    assert {str(tensor.dtype) for tensor in weights(bundle).values()} == {"torch.float16"}
    train(make_config(num_steps=1, bundle_dtype="float16"))
    assert "nothing left to do" in capsys.readouterr().err
