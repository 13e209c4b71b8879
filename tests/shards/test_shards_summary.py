"""`python -m shards.summary` describes a set."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latent_t2i.shards import summary
from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.writer import ShardWriter, begin_set, finish_set
from tests.shard_sets import (
    CHANNELS,
    layout_of,
    make_examples,
    make_provenance,
    run_main,
    write_set,
)


def lines_of(folder: Path, num_sample: int = 1000, num_captions: int = 3) -> list[str]:
    shards = open_shards(folder)
    return list(summary.describe(shards, num_sample=num_sample, num_captions=num_captions))


def row(lines: Sequence[str], name: str) -> list[str]:
    """Returns the words after a line's name."""
    (line,) = [line for line in lines if line.startswith(f"  {name} ")]
    return line.removeprefix(f"  {name}").split()


def after(lines: list[str], title: str) -> list[str]:
    """Returns the lines from a title on."""
    return lines[next(n for n, line in enumerate(lines) if line.startswith(title)) :]


def test_identity_shapes_and_counts(tmp_path: Path) -> None:
    first = make_examples(5, num_captions=3, views=2)
    long = replace(first[0], meta={"captions": ["long " * 99] * 3, "truncated": []})
    second = make_examples(2, num_captions=2, views=2)
    manifest = write_set(tmp_path / "set", [[long, *first[1:]], second])
    lines = lines_of(tmp_path / "set")
    assert lines[0] == str(tmp_path / "set")
    assert max(len(line) for line in lines[1:]) <= 80
    assert row(lines, "manifest") == ["version", "3,", manifest.sha256[:12]]
    assert row(lines, "vae") == ["some/vae", f"({'v' * 12})"]
    assert row(lines, "preprocessing") == ["image_size_px", "64,", "views", "1"]
    assert row(lines, "records") == ["7", "in", "2", "shards"]
    assert " ".join(row(lines, "captions")) == "19: 2 records of 2, 5 records of 3"
    assert " ".join(row(lines, "truncated")) == "3 captions (15.79%) at 7 tokens"
    unknown = "the records have no hashes of their images"
    assert " ".join(row(lines, "duplicates")) == unknown
    shapes = [line for line in lines if "float16 " in line]
    assert shapes[0].endswith("float16 2 x 8 x 8 x 8, moments")
    assert shapes[1].endswith("float16 captions x 7 x 32")
    assert any(line.endswith("padded to 512 or 1536 bytes") for line in lines)
    assert any(line.startswith("    long long ") and line.endswith("…") for line in lines)


@pytest.mark.parametrize("text_dtype", ["float16", "int8"])
def test_byte_counts_add_up_to_the_files(tmp_path: Path, text_dtype: str) -> None:
    folder = tmp_path / "set"
    shards = [make_examples(5, num_captions=captions, text_dtype=text_dtype) for captions in (3, 2)]
    write_set(folder, shards)
    lines = lines_of(folder)
    found = {
        name: int(row(lines, name)[0].replace(",", ""))
        for name in ("tar headers", "array headers", "padding", "other files", "total")
    }
    sizes = after(lines, "bytes")
    for name in ("latent", "text", "tokens"):
        found[name] = int(row(sizes, name)[0].replace(",", ""))
        assert found[name] == sum(getattr(e, name).nbytes for part in shards for e in part)
    found["json"] = int(row(sizes, "json")[0].replace(",", ""))
    assert found["total"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["tar headers"] == 10 * 4 * 512
    total = found.pop("total")
    assert sum(found.values()) == total
    assert found["padding"] > 0


def test_caption_lengths_end_at_the_end_token(tmp_path: Path) -> None:
    """The end token is the empty prompt's second token, here 1."""
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
def test_padding_with_end_token_or_another(pad: int) -> None:
    empty = np.array([1, 2, pad, pad])
    tokens = np.array([[1, 2, pad, pad], [1, 7, 2, pad], [1, 7, 7, 2], [1, 7, 7, 7]])
    assert summary.count_tokens(tokens, empty).tolist() == [2, 3, 4, 4]
    assert summary.count_tokens(tokens[:, :1], empty[:1]).tolist() == [1] * 4


def test_spread_contains_first_and_last_record() -> None:
    assert summary.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert summary.spread(3, 100).tolist() == [0, 1, 2]
    assert summary.spread(5, 1).tolist() == [0]


@pytest.mark.parametrize("kind", ["moments", "plain"])
def test_latent_statistics(tmp_path: Path, kind: str) -> None:
    """A sample of all records has the manifest's statistics, a smaller one its own."""
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
    assert not [line for line in lines if line.startswith("quarantined")]


def test_quarantined_images_with_reasons(tmp_path: Path) -> None:
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
    assert "39 quarantined" in " ".join(row(lines, "records"))
    start = lines.index("quarantined: 39 images")
    assert [line.split()[:3] for line in lines[start + 1 : start + 5]] == [
        ["8", "reason", "0"],
        ["8", "reason", "4"],
        ["8", "reason", "8"],
        ["6", "reason", "12"],
    ]
    assert lines[-1] == "  and 3 more reasons"
    assert max(map(len, lines[1:])) <= 80


def test_missing_set_gives_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(summary, monkeypatch, tmp_path / "none") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder of shards\n"


@pytest.mark.parametrize("flag", ["--sample=0", "--captions=-1", "--captions=x"])
def test_flags_out_of_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(summary, monkeypatch, tmp_path, flag)
    assert stopped.value.code == 2
    assert f"{flag.partition('=')[0]}: " in capsys.readouterr().err
