"""Written sets are read back unchanged by our reader and by stock webdataset."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example, Manifest
from tests.shard_sets import (
    MAX_TOKENS,
    TEXT_WIDTH,
    make_examples,
    make_provenance,
    write_set,
)


@pytest.fixture
def examples() -> list[Example]:
    """Five images with three captions and three images with two."""
    return make_examples(5, num_captions=3, views=2) + make_examples(3, num_captions=2, views=2)


@pytest.fixture
def folder(tmp_path: Path, examples: list[Example]) -> Path:
    write_set(tmp_path / "set", [examples[:5], examples[5:]])
    return tmp_path / "set"


def test_gather_returns_chosen_captions_and_views(folder: Path, examples: list[Example]) -> None:
    shards = open_shards(folder, fields=("latent", "text", "tokens"))
    rng = np.random.default_rng(0)
    records = rng.permutation(np.repeat(np.arange(len(shards)), 4))
    caption_u, view_u = rng.random((2, len(records)))
    batch = shards.gather(records, caption_u, view_u)
    for place, record in enumerate(records):
        example = examples[record]
        caption = int(caption_u[place] * len(example.tokens))
        view = int(view_u[place] * 2)
        np.testing.assert_array_equal(batch.latent[place], example.latent[view])
        np.testing.assert_array_equal(batch.text[place], example.text[caption])
        np.testing.assert_array_equal(batch.extra["tokens"][place], example.tokens[caption])


def test_gather_accepts_draws_of_0_and_1(folder: Path) -> None:
    shards = open_shards(folder)
    below_one = np.nextafter(1.0, 0.0)
    records = np.array([0, 7])
    for u in (0.0, below_one, 1.0):
        assert len(shards.gather(records, np.full(2, u), np.full(2, u)).text) == 2


def test_keys_and_meta(folder: Path, examples: list[Example]) -> None:
    shards = open_shards(folder)
    order = np.array([6, 0, 3])
    assert shards.keys(order) == [examples[record].key for record in order]
    assert [shards.meta(record) for record in range(8)] == [dict(e.meta) for e in examples]
    assert shards.keys(np.array([], np.int64)) == []


def test_gather_of_no_records(folder: Path) -> None:
    none = np.array([])
    assert open_shards(folder).gather(none.astype(np.int64), none, none).text.shape == (
        0,
        MAX_TOKENS,
        TEXT_WIDTH,
    )


@pytest.mark.parametrize("record", [-1, 8])
def test_records_out_of_range(folder: Path, record: int) -> None:
    with pytest.raises(IndexError, match=r"expected records in 0\.\.7"):
        open_shards(folder).keys(np.array([record]))


def test_opening_does_not_read_shards(folder: Path) -> None:
    for path in folder.glob("*.tar"):  # the right size, but wrong bytes
        path.chmod(0o644)
        path.write_bytes(bytes(path.stat().st_size))
    assert len(open_shards(folder)) == 8


def test_empty_prompt(folder: Path) -> None:
    shards = open_shards(folder)
    assert shards.empty_text.shape == (MAX_TOKENS, TEXT_WIDTH)
    assert shards.empty_tokens.tolist() == list(range(MAX_TOKENS))


def test_equal_examples_give_equal_bytes(tmp_path: Path, examples: list[Example]) -> None:
    contents = []
    for name in ("a", "b"):
        write_set(tmp_path / name, [examples[:5], examples[5:]])
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [
        "empty_text.npy",
        "empty_tokens.npy",
        "manifest.json",
        "quarantine.jsonl",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard_sums.npy",
        "shards.npy",
    ]


def test_manifest_round_trips(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.dump().encode() == (folder / "manifest.json").read_bytes()
    assert (manifest.latent_shape, manifest.num_views) == ((8, 8, 8), 2)
    assert (manifest.latent_channels, manifest.text_width) == (4, TEXT_WIDTH)
    assert (manifest.num_source, manifest.num_records, manifest.num_captions) == (8, 8, 21)
    assert manifest.num_truncated == 3


def test_layout_gives_the_position_of_the_bytes(folder: Path, examples: list[Example]) -> None:
    """Reads a latent as README.md describes it: seek and read."""
    document = json.loads((folder / "manifest.json").read_text())
    row = np.load(folder / document["shard_table"]["name"])[1]
    layout = document["layouts"][row["layout"]]
    field = layout["fields"]["latent"]
    with (folder / f"shard-{row['number']:06d}.tar").open("rb") as file:
        file.seek(field["offset_bytes"] + 2 * layout["record_bytes"])
        found = np.fromfile(file, "<f2", int(np.prod(field["shape"]))).reshape(field["shape"])
    np.testing.assert_array_equal(found, examples[7].latent)


@pytest.mark.parametrize("kind", ["moments", "plain"])
def test_statistics_of_sampled_latents(tmp_path: Path, kind: Any) -> None:
    examples = make_examples(6, views=2, kind=kind)
    manifest = write_set(tmp_path, [examples[:4], examples[4:]], make_provenance(kind))
    values = np.stack([example.latent for example in examples]).astype(np.float64)
    rng = np.random.default_rng(0)
    if kind == "moments":
        mean, log_variance = np.split(np.repeat(values, 500, axis=1), 2, axis=2)
        values = mean + np.exp(log_variance / 2) * rng.normal(size=mean.shape)
    found = manifest.latent_statistics
    np.testing.assert_allclose(found.mean, values.mean((0, 1, 3, 4)), atol=0.02)
    np.testing.assert_allclose(found.std, values.std((0, 1, 3, 4)), rtol=0.02)
    assert found.scaling_factor == pytest.approx(1 / values.std(), rel=0.02)
