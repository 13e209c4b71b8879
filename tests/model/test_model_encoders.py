"""The encoders load from folders, are told by their content, and encode as a stock pipeline."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from model import encoders
from tests import tiny

LONG = "a red circle above a blue square " * 4


def test_a_whole_clip_gives_its_text_tower_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer, text_encoder = encoders.load_text_encoder(tiny.encoders().clip)
    assert (type(tokenizer), type(text_encoder)) == (CLIPTokenizer, CLIPTextModel)
    assert capfd.readouterr() == ("", "")


def test_everything_is_loaded_as_float32_and_frozen(tmp_path: Path) -> None:
    vae_folder, clip_folder = tmp_path / "vae", tmp_path / "clip"
    for source, folder in ((tiny.encoders().vae, vae_folder), (tiny.encoders().clip, clip_folder)):
        shutil.copytree(source, folder)
        for weights in folder.glob("*.safetensors"):
            halved = {name: tensor.half() for name, tensor in load_file(weights).items()}
            save_file(halved, weights, metadata={"format": "pt"})
    for network in (
        encoders.load_vae(str(vae_folder)),
        encoders.load_text_encoder(str(clip_folder))[1],
    ):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in network.parameters())
        assert not network.training


def test_fingerprints_tell_weights_not_folders(tmp_path: Path) -> None:
    first = encoders.load_vae(tiny.encoders().vae)
    first.save_pretrained(tmp_path / "copy")
    copied = encoders.load_vae(str(tmp_path / "copy"))
    assert encoders.fingerprint(copied) == encoders.fingerprint(first)
    copied.decoder.conv_out.bias.data[0] += 1e-6
    assert encoders.fingerprint(copied) != encoders.fingerprint(first)


def test_a_tokenizer_is_told_by_its_ids_however_it_is_stored(tmp_path: Path) -> None:
    tokenizer, _ = encoders.load_text_encoder(tiny.encoders().clip)
    before = encoders.tokenizer_fingerprint(tokenizer)
    encoders.tokenize(tokenizer, ["a red circle"], 7)  # sets padding and truncation
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tmp_path)
    assert encoders.tokenizer_fingerprint(CLIPTokenizer.from_pretrained(tmp_path)) == before
    vocabulary = tokenizer.get_vocab()
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    other = CLIPTokenizer(vocab=vocabulary, merges=[])
    assert encoders.tokenizer_fingerprint(other) != before


def test_the_encoded_image_is_the_posterior_and_autocast_does_not_touch_it() -> None:
    vae = encoders.load_vae(tiny.encoders().vae)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        moments = encoders.encode_images(vae, images)
    assert (moments.shape, moments.dtype) == ((2, 8, 8, 8), torch.float32)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(moments[:, :4], posterior.mean, rtol=0, atol=0)
    torch.testing.assert_close(moments[:, 4:], posterior.logvar, rtol=0, atol=0)
    assert (encoders.vae_downscale(vae), encoders.latent_channels(vae)) == (8, 4)


def test_tokens_are_padded_and_cut_as_the_pipeline_does() -> None:
    tokenizer, _ = encoders.load_text_encoder(tiny.encoders().clip)
    ids, cut = encoders.tokenize(tokenizer, ["", "red", LONG], 9)
    assert cut.tolist() == [False, False, True]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0].tolist() == [start] + [end] * 8
    assert (ids[1, 0], ids[1, 4:].unique().tolist()) == (start, [end])
    assert (ids[2, 0], ids[2, -1]) == (start, end)


def test_the_first_positions_do_not_depend_on_the_padding() -> None:
    tokenizer, text_encoder = encoders.load_text_encoder(tiny.encoders().clip)
    short, whole = (encoders.tokenize(tokenizer, ["a red circle"], n)[0] for n in (20, 77))
    hidden = encoders.encode_text(text_encoder, whole)
    torch.testing.assert_close(encoders.encode_text(text_encoder, short), hidden[:, :20])


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "../nowhere"])
def test_a_missing_folder_is_named_with_its_flag(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--vae: no folder '{name}'"):
        encoders.load_vae(name)


def test_without_network_the_remedy_is_told() -> None:
    with pytest.raises(ValueError, match=r"no network; download .* and point --text-encoder") as e:
        encoders.load_text_encoder("openai/clip-vit-large-patch14")
    assert "\n" not in str(e.value)


def test_another_kind_of_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--vae: .*_class_name 'None', expected 'AutoencoderKL'"):
        encoders.load_vae(tiny.encoders().clip)
    with pytest.raises(ValueError, match=r"--text-encoder: .* holds no config.json"):
        encoders.load_text_encoder(str(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    shutil.copytree(tiny.encoders().clip, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if "final_layer_norm" not in n}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights .* final_layer_norm.bias first"):
        encoders.load_text_encoder(str(tmp_path / "clip"))
