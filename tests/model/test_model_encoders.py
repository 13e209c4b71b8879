"""The encoders load from folders, are told by their content, and encode as a stock pipeline."""

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
KINDS = {  # class, channels of what is encoded, downscale, latent channels, scale, shift
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
    with pytest.raises(ValueError, match=r"_class_name 'None', expected 'AutoencoderKL' or 'Asym"):
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_tells_its_own_sizes_and_scale(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
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
def test_bfloat16_is_near_and_is_the_same_network_to_the_shards(kind: str) -> None:
    whole = encoders.load_vae(tiny.vae_folder(kind))
    rounded = encoders.load_vae(tiny.vae_folder(kind), dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert encoders.fingerprint(rounded) == encoders.fingerprint(whole)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.float16):
        near = encoders.encode_images(rounded, images)
    exact = encoders.encode_images(whole, images)
    assert near.dtype == torch.float32
    error = ((near - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.04


def test_half_precision_is_not_offered() -> None:
    with pytest.raises(ValueError, match=r"vae dtype: expected float32 or bfloat16, found .*16"):
        encoders.load_vae(tiny.encoders().vae, dtype=torch.float16)


def test_plain_latents_are_those_before_any_quantisation() -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    vq, small = (encoders.load_vae(tiny.vae_folder(kind)) for kind in ("vq", "tiny"))
    expected = vq.quant_conv(vq.encoder(images))
    torch.testing.assert_close(encoders.encode_images(vq, images), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        encoders.encode_images(small, images), small.encoder(images), rtol=0, atol=0
    )


def test_shift_and_scale_are_those_of_the_config() -> None:
    shift, scale = encoders.latent_affine(encoders.load_vae(tiny.vae_folder("flux")))
    assert shift.shape == scale.shape == (16, 1, 1)
    assert (shift == torch.tensor(0.1159)).all() and (scale == torch.tensor(0.3611)).all()
    shift, scale = encoders.latent_affine(encoders.load_vae(tiny.vae_folder("per_channel")))
    assert shift.flatten().tolist() == [-1.5, 0.25, 0.5, 2.0]
    torch.testing.assert_close(scale.flatten(), 0.5 / torch.tensor([8.0, 5.5, 0.5, 3.0]))


def test_the_old_names_of_attention_weights_are_understood(tmp_path: Path) -> None:
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


def test_weights_may_be_in_several_files(tmp_path: Path) -> None:
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


def test_a_whole_pipeline_gives_its_parts(tmp_path: Path) -> None:
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


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
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


def test_other_and_absent_weights_are_told(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    half = weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"holds no .*model.safetensors, but .*fp16.*: rename it"):
        encoders.load_vae(str(folder))
    half.unlink()
    with pytest.raises(ValueError, match=r"holds no diffusion_pytorch_model.safetensors$"):
        encoders.load_vae(str(folder))


def test_a_vae_that_lacks_weights_is_refused_not_filled_with_noise(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    change_weights(weights, lambda all_: {n: t for n, t in all_.items() if "conv_out" not in n})
    with pytest.raises(ValueError, match=r"lacks 4 weights of an AutoencoderKL, decoder.conv_out"):
        encoders.load_vae(str(folder))


def test_broken_files_are_told_with_their_folder(tmp_path: Path) -> None:
    cut, wide, words = (copy_vae(tmp_path / name) for name in ("cut", "wide", "words"))
    clip = copy_clip(tmp_path / "clip")
    for weights in (cut / "diffusion_pytorch_model.safetensors", clip / "model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:5000])
    change_config(wide, latent_channels=5)
    (words / "config.json").write_text("{")
    for folder, message in ((cut, "does not load: "), (wide, "size mismatch"), (words, "not JSON")):
        with pytest.raises(ValueError, match=rf"--vae: .*{folder.name}.*{message}") as error:
            encoders.load_vae(str(folder))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"--text-encoder: .*clip does not load: "):
        encoders.load_text_encoder(str(clip))


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    folder = copy_vae(tmp_path / "vae")
    change_config(folder, _class_name="AutoencoderKLWan")
    with pytest.raises(ValueError, match=r"'AutoencoderKLWan', expected .* or 'VQModel'"):
        encoders.load_vae(str(folder))
    clip = copy_clip(tmp_path / "clip")
    for found in ("clip_vision_model", "clipseg"):
        change_config(clip, model_type=found)
        with pytest.raises(ValueError, match=rf"model_type '{found}', expected 'clip' or"):
            encoders.load_text_encoder(str(clip))
    with pytest.raises(ValueError, match=r"takes images of 4 channels, expected 3"):
        encoders.load_vae(tiny.vae_folder("four_bands"))


def test_a_tokenizer_that_is_not_there_or_not_the_encoders_is_refused(tmp_path: Path) -> None:
    folder = copy_clip(tmp_path / "clip")
    text = (folder / "tokenizer.json").read_text()
    assert '"<|endoftext|>": 137' in text
    (folder / "tokenizer.json").write_text(
        text.replace('"<|endoftext|>": 137', '"<|endoftext|>": 138').replace(
            '"id": 137', '"id": 138'
        )
    )
    with pytest.raises(ValueError, match=r"has ids up to 138; expected .* fewer than 138"):
        encoders.load_text_encoder(str(folder))
    (folder / "tokenizer.json").write_text(text)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match=r"pads on the left and .*; expected the right"):
        encoders.load_text_encoder(str(folder))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"--text-encoder: .*clip holds no tokenizer; expected"):
        encoders.load_text_encoder(str(folder))


@pytest.mark.parametrize("max_tokens", [9, 20, 77])
def test_ids_are_those_that_transformers_gives(max_tokens: int) -> None:
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
