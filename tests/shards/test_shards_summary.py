"""`python -m shards.summary` tells what is in a set, and draws it where the VAE is at hand."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latent_t2i.model.encoders import fingerprint, load_vae
from latent_t2i.shards import summary
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example, Identity, Manifest
from latent_t2i.shards.writer import ShardWriter, begin_set, finish_set
from tests import tiny
from tests.shard_sets import CHANNELS, layout_of, make_examples, make_provenance, write_set


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect", str(folder), *flags])
    return summary.main()


def lines_of(folder: Path, num_sample: int = 1000, num_captions: int = 3) -> list[str]:
    shards = open_shards(folder)
    return list(summary.describe(shards, num_sample=num_sample, num_captions=num_captions))


def row(lines: Sequence[str], name: str) -> list[str]:
    """The words after a line's name."""
    (line,) = [line for line in lines if line.startswith(f"  {name} ")]
    return line.removeprefix(f"  {name}").split()


def after(lines: list[str], title: str) -> list[str]:
    """The lines from a title on."""
    return lines[next(n for n, line in enumerate(lines) if line.startswith(title)) :]


def test_identity_shapes_and_counts(tmp_path: Path) -> None:
    first = make_examples(5, num_captions=3, views=2)
    long = replace(first[0], meta={"captions": ["long " * 99] * 3, "truncated": []})
    second = make_examples(2, num_captions=2, views=2)
    manifest = write_set(tmp_path / "set", [[long, *first[1:]], second])
    lines = lines_of(tmp_path / "set")
    assert lines[0] == str(tmp_path / "set")
    assert max(len(line) for line in lines[1:]) <= 80
    assert row(lines, "manifest") == ["version", "2,", manifest.sha256[:12]]
    assert row(lines, "vae") == ["some/vae", f"({'v' * 12})"]
    assert row(lines, "preprocessing") == ["image_size_px", "64,", "views", "1"]
    assert row(lines, "records") == ["7", "in", "2", "shards"]
    assert " ".join(row(lines, "captions")) == "19: 2 records of 2, 5 records of 3"
    assert " ".join(row(lines, "truncated")) == "3 captions (15.79%) at 7 tokens"
    shapes = [line for line in lines if "float16 " in line]
    assert shapes[0].endswith("float16 2 x 8 x 8 x 8, moments")
    assert shapes[1].endswith("float16 captions x 7 x 32")
    assert any(line.endswith("padded to 512 or 1536 bytes") for line in lines)
    assert any(line.startswith("    long long ") and line.endswith("…") for line in lines)


@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_bytes_add_up_to_the_disk(tmp_path: Path, text_dtype: str) -> None:
    folder = tmp_path / "set"
    shards = [make_examples(5, num_captions=captions, text_dtype=text_dtype) for captions in (3, 2)]
    write_set(folder, shards)
    lines = lines_of(folder)
    found = {
        name: int(row(lines, name)[0].replace(",", ""))
        for name in ("tar headers", "array headers", "padding", "other files", "all")
    }
    sizes = after(lines, "bytes")
    for name in ("latent", "text", "tokens"):
        found[name] = int(row(sizes, name)[0].replace(",", ""))
        assert found[name] == sum(getattr(e, name).nbytes for part in shards for e in part)
    found["json"] = int(row(sizes, "json")[0].replace(",", ""))
    assert found["all"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["tar headers"] == 10 * 4 * 512
    total = found.pop("all")
    assert sum(found.values()) == total
    assert found["padding"] > 0


def test_lengths_count_tokens_up_to_the_end(tmp_path: Path) -> None:
    """The end token is the empty prompt's second, which is 1 here."""
    examples = [
        replace(example, tokens=np.array([[0, *[5] * words, *[1] * (6 - words)]], np.int32))
        for words, example in enumerate(make_examples(4, num_captions=1))
    ]
    write_set(tmp_path / "set", [examples])
    lines = after(lines_of(tmp_path / "set"), "caption lengths")
    counts = [line.split()[:2] for line in lines[1:8]]
    assert counts == [[str(n), str(int(2 <= n <= 5))] for n in range(1, 8)]
    assert row(lines, "mean") == ["3.5,", "median", "4"]


@pytest.mark.parametrize("pad", [0, 2])
def test_padding_may_be_the_end_token_or_another(pad: int) -> None:
    empty = np.array([1, 2, pad, pad])
    tokens = np.array([[1, 2, pad, pad], [1, 7, 2, pad], [1, 7, 7, 2], [1, 7, 7, 7]])
    assert summary.count_tokens(tokens, empty).tolist() == [2, 3, 4, 4]
    assert summary.count_tokens(tokens[:, :1], empty[:1]).tolist() == [1] * 4


def test_spread_takes_the_first_and_the_last() -> None:
    assert summary.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert summary.spread(3, 100).tolist() == [0, 1, 2]
    assert summary.spread(5, 1).tolist() == [0]


@pytest.mark.parametrize("kind", ["moments", "plain"])
def test_latent_statistics(tmp_path: Path, kind: str) -> None:
    """Of a whole set as of a sample of it that is the whole set; of fewer, their own."""
    examples = make_examples(6, views=2, kind=kind)
    manifest = write_set(tmp_path, [examples[:4], examples[4:]], make_provenance(kind))
    lines = after(lines_of(tmp_path), "latents")
    for channel in range(CHANNELS):
        *stored, bar, mean, std, low, high = row(lines, str(channel))[-7:]
        assert bar == "|"
        assert stored == [mean, std]
        assert float(mean) == pytest.approx(manifest.latent_statistics.mean[channel], abs=1e-4)
        means = np.stack([example.latent[:, channel] for example in examples])
        assert [float(low), float(high)] == pytest.approx([means.min(), means.max()], abs=1e-3)
    *_, low, high = row(after(lines_of(tmp_path, num_sample=1), "latents"), "0")
    first = examples[0].latent[:, 0]
    assert [float(low), float(high)] == pytest.approx([first.min(), first.max()], abs=1e-3)


def test_int8_scales(tmp_path: Path) -> None:
    write_set(tmp_path, [make_examples(2, text_dtype="int8")])
    lines = lines_of(tmp_path)
    assert " ".join(row(lines, "relative error")) == "1.0000% over 9 captions"
    assert " ".join(row(lines, "scales")) == "32 channels, 0.01000 to 0.10000, median 0.05500"
    assert not [line for line in lines if line.startswith("left out")]


def test_what_was_left_out_and_why(tmp_path: Path) -> None:
    examples, provenance = make_examples(2), make_provenance()
    begin_set(tmp_path, provenance)
    with ShardWriter(tmp_path, 0, layout_of(examples), "moments") as shard:
        shard.write(examples[0])
        for number in range(30):
            shard.quarantine(f"bad-{number}", f"reason {number % 15 // 4 * 4} {'x' * 99}")
    empty = {"empty_text": examples[0].text[0], "empty_tokens": examples[0].tokens[0]}
    reasons = {f"c{number}": f"other {number}" for number in range(9)}
    finish_set(tmp_path, provenance, num_shards=1, quarantined=reasons, **empty)
    lines = lines_of(tmp_path)
    assert "39 left out" in " ".join(row(lines, "records"))
    start = lines.index("left out: 39 images")
    assert [line.split()[:3] for line in lines[start + 1 : start + 5]] == [
        ["8", "reason", "0"],
        ["8", "reason", "4"],
        ["8", "reason", "8"],
        ["6", "reason", "12"],
    ]
    assert lines[-1] == "  and 3 more reasons"
    assert max(map(len, lines[1:])) <= 80


def named(vae: str, network: AutoencoderKL) -> Identity:
    return Identity(name=vae, revision=None, sha256=fingerprint(network))


def write_named(folder: Path, vae: Identity, examples: list[Example]) -> Manifest:
    return write_set(folder, [examples], make_provenance(vae=vae))


@pytest.mark.parametrize("given", [False, True])
def test_sheet_of_decoded_latents(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: bool,
) -> None:
    vae = tiny.encoders().vae
    network = load_vae(vae)
    examples = make_examples(9)
    identity = replace(named("no/such", network), sha256="0") if given else named(vae, network)
    write_named(tmp_path / "set", identity, examples)
    out = tmp_path / "sheet.png"
    flags = ["--vae", vae] if given else []
    assert run(monkeypatch, tmp_path / "set", "--decode", "5", "--out", str(out), *flags) == 0
    *_, last = capsys.readouterr().out.splitlines()
    warning = "; its weights are not those the latents were made with" if given else ""
    assert last == f"{out}: 5 pictures, decoded with {vae}{warning}"
    with Image.open(out) as image:
        sheet = np.asarray(image)
    step = summary.CELL_PX + summary.PADDING_PX
    assert sheet.shape[1] == 4 * step + summary.PADDING_PX
    latent = torch.from_numpy(examples[2].latent[:, :CHANNELS]).float()  # of 0, 2, 4, 6, 8
    with torch.inference_mode():
        expected = network.decode(latent).sample[0].clamp(-1, 1).add(1).mul(127.5)
    left, top = summary.PADDING_PX + step, summary.PADDING_PX
    picture = sheet[top : top + 256, left : left + 256]
    np.testing.assert_allclose(picture[2::4, 2::4], expected.permute(1, 2, 0).numpy(), atol=1)
    below = sheet[top + 256 : top + 256 + 3 * summary.LINE_PX, left : left + 256]
    assert (below < 100).any(), "no caption"


def test_the_embedded_vae_is_found_from_anywhere(tmp_path: Path, elsewhere: Path) -> None:
    vae = "scenes/encoders/vae"
    network = load_vae(vae)
    channels = network.config.latent_channels
    examples = [
        replace(example, latent=np.zeros((1, 2 * channels, 8, 8), np.float16))
        for example in make_examples(1)
    ]
    write_named(tmp_path / "set", named(vae, network), examples)
    out = elsewhere / "sheet.png"
    told = summary.draw_sheet(open_shards(tmp_path / "set"), 4, vae=None, out=out)
    assert told == f"{out}: 1 pictures, decoded with {vae}"
    assert out.is_file()


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ("no/such", "error: --vae: 'no/such' cannot be had, give a folder that holds it: "),
        ("scenes/encoders/clip", "'scenes/encoders/clip': expected one of AutoencoderKL, "),
        ("scenes/encoders/vae", "'scenes/encoders/vae': expected 4 latent channels, found 8"),
    ],
)
def test_a_vae_that_cannot_be_had(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    vae: str,
    message: str,
) -> None:
    write_named(tmp_path / "set", Identity(name=vae, revision=None, sha256="0"), make_examples(1))
    out = str(tmp_path / "sheet.png")
    assert run(monkeypatch, tmp_path / "set", "--decode", "1", "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path(out).exists()


def test_a_set_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "none") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder of shards\n"


@pytest.mark.parametrize("flag", ["--sample=0", "--captions=-1", "--decode=x"])
def test_flags_out_of_range(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, flag)
    assert stopped.value.code == 2
    assert f"{flag.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a red ball", ["a red ball"]),
        ("one two three four", ["one two", "three four"]),
        ("one\n two", ["one two"]),
        ("0123456789ab cd", ["0123456789", "ab cd"]),
        ("a b c " * 9, ["a b c a b", "c a b c a", "b c a b c…"]),
        ("", []),
    ],
)
def test_wrap(text: str, lines: list[str]) -> None:
    assert summary.wrap(text, len, 10) == lines


@given(text=st.text(), width=st.integers(1, 40))
def test_wrapped_lines_fit(text: str, width: int) -> None:
    lines = summary.wrap(text, len, width)
    assert len(lines) <= summary.MAX_LINES
    assert all(0 < len(line) <= width for line in lines)
    if not (lines and lines[-1].endswith("…")):
        assert "".join(lines).replace(" ", "") == "".join(text.split())
