"""Errors that are found before the first step."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from latent_t2i.model.encoders import load_vae
from latent_t2i.shards.order import Order
from latent_t2i.train.preflight import count_steps, split_batch, validate
from tests import tiny
from tests.train.conftest import MakeConfig


def test_the_plan_of_a_valid_run(make_config: MakeConfig, shards: Path) -> None:
    plan = validate(make_config(), num_processes=2)
    assert plan.latent_shape == (4, 8, 8)
    assert plan.micro_batch_size == 2
    assert plan.settings["shards_sha256"] == plan.shards.manifest.sha256


@pytest.mark.parametrize(
    ("batch_size", "micro", "num_processes", "message"),
    [
        (10, None, 4, r"batch_size: 10 records cannot .* \(2\.5 each\); use a multiple of 4"),
        (24, 5, 2, "24 examples / 2 processes = 12 each, found 5, expected a divisor of 12"),
    ],
)
def test_an_impossible_split_is_refused_with_the_arithmetic(
    batch_size: int, micro: int | None, num_processes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(batch_size, micro, num_processes)


def test_num_epochs_becomes_steps_and_the_last_one_is_filled(make_config: MakeConfig) -> None:
    config = make_config(num_steps=None, num_epochs=3, batch_size=10)
    filled = Order(sizes=(20, 4), batch_size=10, seed=0)
    assert count_steps(config, filled) == 8
    assert count_steps(config, replace(filled, last_batch="drop")) == 6


def test_missing_shards_are_named_with_the_command_that_makes_them(make_config: MakeConfig) -> None:
    message = r"shards: the folder 'no/such' does not exist; .* python -m pipeline.run"
    with pytest.raises(ValueError, match=message):
        validate(make_config(shards="no/such"), num_processes=1)


def test_another_vae_is_refused_naming_both(make_config: MakeConfig, tmp_path: Path) -> None:
    vae = load_vae(tiny.encoders().vae)
    vae.decoder.conv_out.bias.data[0] += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae: .*sha256 \w{64}.* uses one with sha256 \w{64}"):
        validate(make_config(vae=str(tmp_path / "vae")), num_processes=1)


def test_another_tokenizer_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.encoders().clip, tmp_path / "clip")
    file = "tokenizer.json"
    text = (folder / file).read_text()
    swapped = text.replace('"a": 0', '"a": -1').replace('"b": 1', '"b": 0').replace("-1", "1")
    assert swapped != text
    (folder / file).write_text(swapped)
    message = r"text_encoder: tokenizer sha256: the shards in .* were made with \w+, found \w+"
    with pytest.raises(ValueError, match=message):
        validate(make_config(text_encoder=str(folder)), num_processes=1)


def test_verification_finds_damaged_shards(
    make_config: MakeConfig, shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"caption", b"Caption", 1))
    config = make_config(shards=str(folder))
    validate(config, num_processes=1)
    with pytest.raises(ValueError, match="sha256"):
        validate(replace(config, data=replace(config.data, verify="full")), num_processes=1)
