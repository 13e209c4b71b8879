"""Encoders load from folders, are identified by content, and encode like a stock pipeline."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latent_t2i.model import encoders
from tests import tiny

LONG = "a red circle above a blue square " * 4
CAPTIONS = (
    "",
    "a red circle",
    "red " * 7,
    LONG,
    "Straße, naïve café! 42's",
    "🙂🙃 日本語",
    "a <|endoftext|> b <|startoftext|>",
    "  two   spaces\tand a tab \n",
    "x" * 500,
)
KINDS = {  # class, channels of the encoded image, downscale, latent channels, scale, shift
    "sd": ("AutoencoderKL", 8, 8, 4, 0.18215, 0.0),
    "flux": ("AutoencoderKL", 32, 8, 16, 0.3611, 0.1159),
    "per_channel": ("AutoencoderKL", 8, 8, 4, 0.5, 0.0),
    "asymmetric": ("AsymmetricAutoencoderKL", 8, 4, 4, 0.5, 0.0),
    "tiny": ("AutoencoderTiny", 4, 8, 4, 1.0, 0.0),
    "tiny_f4": ("AutoencoderTiny", 16, 4, 16, 1.5, 0.0),
    "tiny_shifted": ("AutoencoderTiny", 4, 8, 4, 1.0, 0.5),
    "dc": ("AutoencoderDC", 8, 32, 8, 0.41407, 0.0),
    "vq": ("VQModel", 3, 4, 3, 0.18215, 0.0),
}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def drop_weights(path: Path, part: str) -> None:
    change_weights(path, lambda tensors: {n: t for n, t in tensors.items() if part not in n})


def copy_vae(folder: Path) -> Path:
    return Path(shutil.copytree(tiny.encoders().vae, folder))


def copy_clip(folder: Path) -> Path:
    return Path(shutil.copytree(tiny.encoders().clip, folder))


def make_pipeline(folder: Path) -> Path:
    """Puts the tiny encoders into the folders of a pipeline."""
    clip = tiny.encoders().clip
    without_tokenizer = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(tiny.encoders().vae, folder / "vae")
    shutil.copytree(clip, folder / "text_encoder", ignore=without_tokenizer)
    (folder / "tokenizer").mkdir()
    for path in Path(clip).glob("tokenizer*"):
        shutil.copy(path, folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_whole_clip_loads_as_a_text_encoder_without_warnings(
    capfd: pytest.CaptureFixture[str],
) -> None:
    tokenizer, text_encoder = encoders.load_text_encoder(tiny.encoders().clip)
    assert (type(tokenizer), type(text_encoder)) == (CLIPTokenizer, CLIPTextModel)
    assert capfd.readouterr() == ("", "")


def test_float16_files_load_as_frozen_float32(tmp_path: Path) -> None:
    vae, clip = copy_vae(tmp_path / "vae"), copy_clip(tmp_path / "clip")
    for weights in tmp_path.rglob("*.safetensors"):
        change_weights(weights, lambda tensors: {n: t.half() for n, t in tensors.items()})
    for network in (encoders.load_vae(str(vae)), encoders.load_text_encoder(str(clip))[1]):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in network.parameters())
        assert not network.training


def test_fingerprints_depend_on_weights_only(tmp_path: Path) -> None:
    first = encoders.load_vae(tiny.encoders().vae)
    first.save_pretrained(tmp_path / "copy")
    copied = encoders.load_vae(str(tmp_path / "copy"))
    assert encoders.fingerprint(copied) == encoders.fingerprint(first)
    copied.decoder.conv_out.bias.data[0] += 1e-6
    assert encoders.fingerprint(copied) != encoders.fingerprint(first)


def test_tokenizer_fingerprints_depend_on_ids_only(tmp_path: Path) -> None:
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


def test_encoded_images_are_the_posterior_in_float32_under_autocast() -> None:
    vae = encoders.load_vae(tiny.encoders().vae)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        moments = encoders.encode_images(vae, images)
    assert (moments.shape, moments.dtype) == ((2, 8, 8, 8), torch.float32)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(moments[:, :4], posterior.mean, rtol=0, atol=0)
    torch.testing.assert_close(moments[:, 4:], posterior.logvar, rtol=0, atol=0)
    assert (encoders.vae_downscale(vae), encoders.latent_channels(vae)) == (8, 4)


def test_hidden_states_do_not_depend_on_the_padding() -> None:
    tokenizer, text_encoder = encoders.load_text_encoder(tiny.encoders().clip)
    short, whole = (encoders.tokenize(tokenizer, ["a red circle"], n)[0] for n in (20, 77))
    hidden = encoders.encode_text(text_encoder, whole)
    torch.testing.assert_close(encoders.encode_text(text_encoder, short), hidden[:, :20])


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "../nowhere"])
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--vae: no folder '{name}'"):
        encoders.load_vae(name)


def test_without_network_the_error_says_what_to_download() -> None:
    with pytest.raises(ValueError, match=r"no network; download .* and point --text-encoder") as e:
        encoders.load_text_encoder("openai/clip-vit-large-patch14")
    assert "\n" not in str(e.value)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected _class_name 'AutoencoderKL' or .*, found 'None'"
    ):
        encoders.load_vae(tiny.encoders().clip)
    with pytest.raises(ValueError, match=r"--text-encoder: .* has no config.json"):
        encoders.load_text_encoder(str(tmp_path))


def test_missing_text_weights_are_refused(tmp_path: Path) -> None:
    folder = copy_clip(tmp_path / "clip")
    drop_weights(folder / "model.safetensors", "final_layer_norm")
    with pytest.raises(ValueError, match=r"missing 2 weights .* first .*final_layer_norm.bias"):
        encoders.load_text_encoder(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_scale_of_every_class(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    name, encoded_channels, downscale, channels, scale, shift = KINDS[kind]
    folder = tiny.vae_folder(kind)
    capfd.readouterr()
    vae = encoders.load_vae(folder)
    assert capfd.readouterr() == ("", "")
    assert type(vae).__name__ == name
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = encoders.encode_images(vae, images)
    shape = (2, encoded_channels, 64 // downscale, 96 // downscale)
    assert (latents.shape, latents.dtype) == (shape, torch.float32)
    assert encoders.vae_downscale(vae) == downscale
    assert encoders.latent_channels(vae) == channels
    assert encoders.latent_kind(vae) == ("moments" if encoded_channels > channels else "plain")
    assert (encoders.scaling_factor(vae), encoders.shift_factor(vae)) == (scale, shift)
    assert vae.decode(latents[:, :channels]).sample.shape == images.shape


@pytest.mark.parametrize("kind", ["sd", "tiny", "dc", "vq", "asymmetric"])
def test_bfloat16_latents_are_close(kind: str) -> None:
    whole = encoders.load_vae(tiny.vae_folder(kind))
    rounded = encoders.load_vae(tiny.vae_folder(kind))
    encoders.round_to_bfloat16(rounded)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.float16):
        near = encoders.encode_images(rounded, images)
    exact = encoders.encode_images(whole, images)
    assert near.dtype == torch.float32
    error = ((near - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.04


def test_plain_latents_are_not_quantised() -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    vq, small = (encoders.load_vae(tiny.vae_folder(kind)) for kind in ("vq", "tiny"))
    expected = vq.quant_conv(vq.encoder(images))
    torch.testing.assert_close(encoders.encode_images(vq, images), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        encoders.encode_images(small, images), small.encoder(images), rtol=0, atol=0
    )


def test_shift_and_scale_come_from_the_config() -> None:
    shift, scale = encoders.latent_affine(encoders.load_vae(tiny.vae_folder("flux")))
    assert shift.shape == scale.shape == (16, 1, 1)
    assert (shift == torch.tensor(0.1159)).all() and (scale == torch.tensor(0.3611)).all()
    shift, scale = encoders.latent_affine(encoders.load_vae(tiny.vae_folder("per_channel")))
    assert shift.flatten().tolist() == [-1.5, 0.25, 0.5, 2.0]
    torch.testing.assert_close(scale.flatten(), 0.5 / torch.tensor([8.0, 5.5, 0.5, 3.0]))


def test_old_names_of_attention_weights_load(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        return tensors

    weights = folder / "diffusion_pytorch_model.safetensors"
    change_weights(weights, rename)
    assert any("query" in name for name in load_file(weights))
    expected = encoders.fingerprint(encoders.load_vae(tiny.encoders().vae))
    assert encoders.fingerprint(encoders.load_vae(str(folder))) == expected


def test_weights_in_several_files_load(tmp_path: Path) -> None:
    vae = encoders.load_vae(tiny.encoders().vae)
    vae.save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*-of-*.safetensors"))) > 1
    loaded = encoders.load_vae(str(tmp_path / "vae"))
    assert encoders.fingerprint(loaded) == encoders.fingerprint(vae)
    text_encoder = encoders.load_text_encoder(tiny.encoders().clip)[1]
    folder = copy_clip(tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    with encoders.quiet():
        text_encoder.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    again = encoders.load_text_encoder(str(folder))[1]
    assert encoders.fingerprint(again) == encoders.fingerprint(text_encoder)


def test_parts_of_a_whole_pipeline_load(tmp_path: Path) -> None:
    folder = str(make_pipeline(tmp_path / "pipeline"))
    vae = encoders.load_vae(folder)
    assert encoders.fingerprint(vae) == encoders.fingerprint(encoders.load_vae(tiny.encoders().vae))
    tokenizer, network = encoders.load_text_encoder(folder)
    alone = encoders.TextEncoder.load(tiny.encoders().clip)
    assert encoders.fingerprint(network) == alone.fingerprint
    assert encoders.tokenizer_fingerprint(tokenizer) == alone.tokenizer_fingerprint
    shutil.rmtree(Path(folder) / "text_encoder")
    with pytest.raises(ValueError, match=r"--text-encoder: .* whole pipeline .* text_encoder/"):
        encoders.load_text_encoder(folder)


def test_pickles_and_single_files_are_refused(tmp_path: Path) -> None:
    vae, clip = copy_vae(tmp_path / "vae"), copy_clip(tmp_path / "clip")
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"--vae: .* diffusion_pytorch_model.bin, a pickle, .*run"):
        encoders.load_vae(str(vae))
    with pytest.raises(ValueError, match=r"--text-encoder: .* pytorch_model.bin, a pickle, .* sav"):
        encoders.load_text_encoder(str(clip))
    for name, message in (("all.ckpt", "is a pickle"), ("all.safetensors", "from_single_file")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"--vae: .*{name} .*{message}"):
            encoders.load_vae(str(tmp_path / name))


def test_missing_weight_files_are_refused(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    half = weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"has no .*model.safetensors, only .*fp16.*: rename it"):
        encoders.load_vae(str(folder))
    half.unlink()
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.safetensors$"):
        encoders.load_vae(str(folder))


def test_missing_vae_weights_are_refused(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    drop_weights(folder / "diffusion_pytorch_model.safetensors", "conv_out")
    with pytest.raises(ValueError, match=r"missing 4 weights of an AutoencoderKL, .* decoder.conv"):
        encoders.load_vae(str(folder))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    cut, wide, words = (copy_vae(tmp_path / name) for name in ("cut", "wide", "words"))
    clip = copy_clip(tmp_path / "clip")
    for weights in (cut / "diffusion_pytorch_model.safetensors", clip / "model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:5000])
    change_config(wide, latent_channels=5)
    (words / "config.json").write_text("{")
    for folder, message in (
        (cut, "does not load: "),
        (wide, "size mismatch"),
        (words, "not valid JSON"),
    ):
        with pytest.raises(ValueError, match=rf"--vae: .*{folder.name}.*{message}") as error:
            encoders.load_vae(str(folder))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"--text-encoder: .*clip does not load: "):
        encoders.load_text_encoder(str(clip))


def test_unsupported_classes_are_refused(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    change_config(folder, _class_name="AutoencoderKLWan")
    with pytest.raises(ValueError, match=r"expected .* or 'VQModel', found 'AutoencoderKLWan'"):
        encoders.load_vae(str(folder))
    clip = copy_clip(tmp_path / "clip")
    for found in ("clip_vision_model", "clipseg"):
        change_config(clip, model_type=found)
        with pytest.raises(ValueError, match=rf"expected model_type 'clip' or .*, found '{found}'"):
            encoders.load_text_encoder(str(clip))
    with pytest.raises(ValueError, match=r"expected images of 3 channels, found 4"):
        encoders.load_vae(tiny.vae_folder("four_bands"))


def test_a_missing_or_unsuitable_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = copy_clip(tmp_path / "clip")
    text = (folder / "tokenizer.json").read_text()
    assert '"<|endoftext|>": 137' in text
    (folder / "tokenizer.json").write_text(
        text.replace('"<|endoftext|>": 137', '"<|endoftext|>": 138').replace(
            '"id": 137', '"id": 138'
        )
    )
    with pytest.raises(ValueError, match=r"expected .* ids below 138, found .* ids up to 138"):
        encoders.load_text_encoder(str(folder))
    (folder / "tokenizer.json").write_text(text)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match=r"expected right padding .*, found left padding"):
        encoders.load_text_encoder(str(folder))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"--text-encoder: .*clip has no tokenizer; expected"):
        encoders.load_text_encoder(str(folder))


@pytest.mark.parametrize("max_tokens", [9, 20, 77])
def test_ids_match_transformers(max_tokens: int) -> None:
    tokenizer, network = encoders.load_text_encoder(tiny.encoders().clip)
    expected = tokenizer(
        list(CAPTIONS),
        padding="max_length",
        max_length=max_tokens,
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    assert torch.equal(encoders.tokenize(tokenizer, CAPTIONS, max_tokens)[0], expected)
    text = encoders.TextEncoder.load(tiny.encoders().clip)
    token_ids = text.tokenize(CAPTIONS)
    hidden, ids, is_cut = text.encode(token_ids, max_tokens)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(hidden, encoders.encode_text(network, expected), rtol=0, atol=0)
    assert token_ids == [tokenizer(caption, verbose=False)["input_ids"] for caption in CAPTIONS]
    assert is_cut.tolist() == [len(ids) > max_tokens for ids in token_ids]
    assert text.tokenize([]) == []


def test_earlier_use_of_a_tokenizer_has_no_effect() -> None:
    tokenizer, network = encoders.load_text_encoder(tiny.encoders().clip)
    tokenizer("red", padding="max_length", truncation=True, max_length=5)  # kept as its state
    used = encoders.TextEncoder(tokenizer, network, name="n").tokenize(CAPTIONS)
    assert used == encoders.TextEncoder.load(tiny.encoders().clip).tokenize(CAPTIONS)
    assert min(map(len, used)) == 2 and max(map(len, used)) > 400


def test_a_text_encoder_is_identified_by_its_weights_and_tokenizer() -> None:
    tokenizer, network = encoders.load_text_encoder(tiny.encoders().clip)
    text = encoders.TextEncoder.load(tiny.encoders().clip, "main")
    assert text.fingerprint == encoders.fingerprint(network)
    assert text.tokenizer_fingerprint == encoders.tokenizer_fingerprint(tokenizer)
    assert (text.name, text.revision) == (tiny.encoders().clip, "main")
    assert (text.width, text.max_length) == (tiny.TEXT_WIDTH, 77)


def test_a_projection_is_ignored_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny.clip_with_projection()
    capfd.readouterr()
    text = encoders.TextEncoder.load(folder)
    assert capfd.readouterr() == ("", "")
    with encoders.quiet():
        whole = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    hidden, ids, _ = text.encode(text.tokenize(CAPTIONS), 20)
    torch.testing.assert_close(hidden, whole(ids).last_hidden_state, rtol=0, atol=0)


def test_the_penultimate_state_is_that_before_the_last_layer_and_norm() -> None:
    folder = tiny.encoders().clip
    text = encoders.TextEncoder.load(folder, hidden_state="penultimate")
    network = encoders.load_text_encoder(folder)[1]
    hidden, ids, _ = text.encode(text.tokenize(CAPTIONS), 20)
    states = network(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(hidden, states[-2], rtol=0, atol=0)
    assert text.name == f"{folder} (penultimate)"


def test_different_text_has_different_fingerprints() -> None:
    folders = (tiny.encoders().clip, tiny.clip_with_projection())
    states: tuple[encoders.HiddenState, ...] = ("last", "penultimate")
    loaded = [encoders.TextEncoder.load(f, hidden_state=state) for f in folders for state in states]
    assert len({text.fingerprint for text in loaded}) == 4
    assert len({text.tokenizer_fingerprint for text in loaded}) == 2


def test_many_threads_may_encode_at_once() -> None:
    text = encoders.TextEncoder.load(tiny.encoders().clip)
    lengths = [9, 20, 60] * 8
    token_ids = text.tokenize(CAPTIONS)
    expected = {length: text.encode(token_ids, length) for length in set(lengths)}
    with ThreadPoolExecutor(8) as pool:
        tokenized = [pool.submit(text.tokenize, CAPTIONS) for _ in lengths]
        encoded = list(pool.map(lambda length: text.encode(token_ids, length), lengths))
    for length, found in zip(lengths, encoded, strict=True):
        torch.testing.assert_close(found, expected[length])
    assert all(future.result() == token_ids for future in tokenized)
