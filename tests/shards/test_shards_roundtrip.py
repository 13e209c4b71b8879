"""What is written comes back, through our reader and through stock webdataset."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latent_t2i.shards.reader import open_shards
from latent_t2i.shards.schema import Example, Manifest
from tests.shard_sets import (
    MAX_TOKENS,
    TEXT_WIDTH,
    layout_of,
    make_examples,
    make_provenance,
    read_stock,
    write_set,
)


def assert_same(examples: list[Example], samples: list[dict[str, Any]]) -> None:
    assert [sample["__key__"] for sample in samples] == [example.key for example in examples]
    for example, sample in zip(examples, samples, strict=True):
        for name in ("latent", "text", "tokens"):
            expected, found = getattr(example, name), sample[f"{name}.npy"]
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        assert sample["json"] == example.meta


@pytest.fixture
def examples() -> list[Example]:
    """Of two shards: five images of three captions, three of two."""
    return make_examples(5, num_captions=3, views=2) + make_examples(3, num_captions=2, views=2)


@pytest.fixture
def folder(tmp_path: Path, examples: list[Example]) -> Path:
    write_set(tmp_path / "set", [examples[:5], examples[5:]])
    return tmp_path / "set"


def test_stock_webdataset_gives_equal_arrays(folder: Path, examples: list[Example]) -> None:
    assert_same(examples, read_stock(folder))


def test_gather_gives_the_chosen_caption_and_view(folder: Path, examples: list[Example]) -> None:
    shards = open_shards(folder)
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
        np.testing.assert_array_equal(batch.tokens[place], example.tokens[caption])


def test_gather_stays_in_range_at_the_edges_of_a_draw(folder: Path) -> None:
    shards = open_shards(folder)
    below_one = np.nextafter(1.0, 0.0)
    records = np.array([0, 7])
    for u in (0.0, below_one, 1.0):
        assert len(shards.gather(records, np.full(2, u), np.full(2, u)).text) == 2


def test_keys_and_meta_by_record(folder: Path, examples: list[Example]) -> None:
    shards = open_shards(folder)
    order = np.array([6, 0, 3])
    assert shards.keys(order) == [examples[record].key for record in order]
    assert [shards.meta(record) for record in range(8)] == [dict(e.meta) for e in examples]
    assert shards.keys(np.array([], np.int64)) == []


def test_a_batch_may_be_empty(folder: Path) -> None:
    none = np.array([])
    assert open_shards(folder).gather(none.astype(np.int64), none, none).text.shape == (
        0,
        MAX_TOKENS,
        TEXT_WIDTH,
    )


@pytest.mark.parametrize("record", [-1, 8])
def test_records_outside_are_refused(folder: Path, record: int) -> None:
    with pytest.raises(IndexError, match=r"outside 0\.\.7"):
        open_shards(folder).keys(np.array([record]))


def test_opening_maps_no_shard(folder: Path) -> None:
    for path in folder.glob("*.tar"):  # right in size, wrong in every byte
        path.chmod(0o644)
        path.write_bytes(bytes(path.stat().st_size))
    assert len(open_shards(folder)) == 8


def test_empty_prompt(folder: Path) -> None:
    shards = open_shards(folder)
    assert shards.empty_text.shape == (MAX_TOKENS, TEXT_WIDTH)
    assert shards.empty_tokens.tolist() == list(range(MAX_TOKENS))


def test_same_examples_give_the_same_bytes(tmp_path: Path, examples: list[Example]) -> None:
    contents = []
    for name in ("a", "b"):
        write_set(tmp_path / name, [examples[:5], examples[5:]])
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [
        "empty_text.npy",
        "empty_tokens.npy",
        "manifest.json",
        "shard-000000.tar",
        "shard-000001.tar",
    ]


def test_manifest_round_trip_and_properties(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.dump().encode() == (folder / "manifest.json").read_bytes()
    assert (manifest.latent_shape, manifest.num_views) == ((8, 8, 8), 2)
    assert (manifest.latent_channels, manifest.text_width) == (4, TEXT_WIDTH)
    assert (manifest.num_source, manifest.num_records, manifest.num_captions) == (8, 8, 21)
    assert manifest.num_truncated == 3


def test_layout_is_where_the_bytes_are(folder: Path, examples: list[Example]) -> None:
    """As README.md tells a reader in another language: seek, read, done."""
    document = json.loads((folder / "manifest.json").read_text())
    entry = document["shards"][1]
    layout = document["layouts"][entry["layout"]]
    field = layout["fields"]["latent"]
    with (folder / entry["name"]).open("rb") as file:
        file.seek(field["offset_bytes"] + 2 * layout["record_bytes"])
        found = np.fromfile(file, "<f2", int(np.prod(field["shape"]))).reshape(field["shape"])
    np.testing.assert_array_equal(found, examples[7].latent)


@pytest.mark.parametrize("kind", ["moments", "plain"])
def test_statistics_are_those_of_sampled_latents(tmp_path: Path, kind: Any) -> None:
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


KEY_CHARACTERS = string.ascii_letters + string.digits + "_-"
keys = st.lists(
    st.text(KEY_CHARACTERS, min_size=1, max_size=80), min_size=1, max_size=3, unique=True
)
captions = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def examples_of_a_shard(draw: st.DrawFn) -> list[Example]:
    """A shard's examples of any shape, with numbers over all of float16's and int32's range."""
    views, channels, side = draw(st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 5)))
    num_captions, tokens, width = draw(st.tuples(*[st.integers(1, 4)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))

    def numbers(*shape: int) -> NDArray[np.float16]:
        return (rng.choice([-1, 1], shape) * 2.0 ** rng.uniform(-24, 15, shape)).astype(np.float16)

    return [
        Example(
            key=key,
            latent=numbers(views, 2 * channels, side, side),
            text=numbers(num_captions, tokens, width),
            tokens=rng.integers(-(2**31), 2**31, (num_captions, tokens)).astype(np.int32),
            meta={"captions": [draw(captions) for _ in range(num_captions)], "truncated": []},
        )
        for key in draw(keys)
    ]


@settings(max_examples=30, deadline=None)
@given(examples=examples_of_a_shard())
def test_any_shapes_round_trip(
    tmp_path_factory: pytest.TempPathFactory, examples: list[Example]
) -> None:
    folder = tmp_path_factory.mktemp("set")
    manifest = write_set(folder, [examples], make_provenance(max_tokens=examples[0].text.shape[1]))
    assert manifest.layouts == (layout_of(examples),)
    assert_same(examples, read_stock(folder))
    shards = open_shards(folder)
    for index, example in enumerate(examples):
        for caption, u in enumerate(np.arange(len(example.tokens)) / len(example.tokens)):
            batch = shards.gather(np.array([index]), np.array([u + 1e-9]), np.array([0.0]))
            np.testing.assert_array_equal(batch.text[0], example.text[caption])
            np.testing.assert_array_equal(batch.latent[0], example.latent[0])
        assert shards.meta(index) == example.meta
