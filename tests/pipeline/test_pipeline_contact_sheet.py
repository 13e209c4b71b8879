"""`python -m pipeline.contact_sheet` draws decoded latents with their captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latent_t2i.model.encoders import fingerprint, load_vae
from latent_t2i.model.grid import CELL_PX, PADDING_PX
from latent_t2i.pipeline import contact_sheet
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example, Identity
from tests import tiny
from tests.shard_sets import (
    CHANNELS,
    make_examples,
    make_provenance,
    run_main,
    write_buckets,
    write_set,
)


def write_with_vae(
    folder: Path, vae: str, network: AutoencoderKL | None, examples: list[Example]
) -> None:
    sha256 = fingerprint(network) if network else "0"
    identity = Identity(name=vae, revision=None, sha256=sha256)
    write_set(folder, [examples], make_provenance(vae=identity))


@pytest.mark.parametrize("is_given", [False, True])
def test_sheet_shows_decoded_latents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_given: bool,
) -> None:
    vae = tiny.encoders().vae
    network, examples = load_vae(vae), make_examples(9)
    if is_given:
        write_with_vae(tmp_path / "set", "no/such", None, examples)
    else:
        write_with_vae(tmp_path / "set", vae, network, examples)
    out = tmp_path / "sheet.png"
    flags = ["--num", "5", "--out", out, *(["--vae", vae] if is_given else [])]
    assert run_main(contact_sheet, monkeypatch, tmp_path / "set", *flags) == 0
    warning = "; its weights differ from those of the VAE that encoded them" if is_given else ""
    assert capsys.readouterr().out == f"{out}: 5 images, decoded with {vae}{warning}\n"
    with Image.open(out) as image:
        sheet = np.asarray(image)
    step = CELL_PX + PADDING_PX
    assert sheet.shape[1] == 4 * step + PADDING_PX
    latent = torch.from_numpy(examples[2].latent[:, :CHANNELS]).float()  # records 0, 2, 4, 6, 8
    with torch.inference_mode():
        expected = network.decode(latent).sample[0].clamp(-1, 1).add(1).mul(127.5)
    left, top = PADDING_PX + step, PADDING_PX
    picture = sheet[top : top + CELL_PX, left : left + CELL_PX]
    factor = CELL_PX // expected.shape[-1]
    np.testing.assert_allclose(
        picture[factor // 2 :: factor, factor // 2 :: factor],
        expected.permute(1, 2, 0).numpy(),
        atol=1,
    )
    assert (sheet[top + CELL_PX : top + CELL_PX + 30, left : left + CELL_PX] < 100).any(), "caption"


def test_embedded_vae_is_found_from_any_folder(tmp_path: Path, elsewhere: Path) -> None:
    vae = "scenes/encoders/vae"
    network = load_vae(vae)
    latent = np.zeros((1, 2 * network.config.latent_channels, 8, 8), np.float16)
    examples = [replace(example, latent=latent) for example in make_examples(1)]
    write_with_vae(tmp_path / "set", vae, network, examples)
    out = elsewhere / "sheet.png"
    line = contact_sheet.draw_sheet(open_shards(tmp_path / "set"), 4, vae=None, out=out)
    assert line == f"{out}: 1 images, decoded with {vae}"
    assert out.is_file()


def test_bucketed_set_has_a_sheet_per_bucket(tmp_path: Path) -> None:
    write_buckets(tmp_path / "set", {"64x64": (2,), "128x32": (1,)})
    vae, out = tiny.encoders().vae, tmp_path / "sheet.png"
    first, second = contact_sheet.draw_sheets(tmp_path / "set", 2, vae=vae, out=out)
    assert "sheet-64x64.png: 2 images" in first and "sheet-128x32.png: 1 images" in second
    found = {path.name for path in tmp_path.glob("*.png")}
    assert found == {"sheet-64x64.png", "sheet-128x32.png"}


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ("no/such", "no/such"),
        ("scenes/encoders/clip", "--vae: "),
        ("scenes/encoders/vae", "--vae: 'scenes/encoders/vae' has 8 latent channels, but"),
    ],
)
def test_unsuitable_vae_gives_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    vae: str,
    message: str,
) -> None:
    write_with_vae(tmp_path / "set", vae, None, make_examples(1))
    out = tmp_path / "sheet.png"
    assert run_main(contact_sheet, monkeypatch, tmp_path / "set", "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not out.exists()
