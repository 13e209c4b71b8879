"""Further fields in batches: each follows the chosen view or caption, by every kind of access."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_t2i.shards.access import Access, Kind, make_loader, open_set
from latent_t2i.shards.loader import batches
from latent_t2i.shards.order import choices
from latent_t2i.shards.reader import RawBatch, open_shards
from latent_t2i.shards.remote.stream import StreamLoader
from latent_t2i.shards.schema import Example, FormatError
from latent_t2i.shards.settings import ReadMode
from tests.shard_sets import make_examples, make_fields, make_provenance, write_buckets, write_set

SPECS = make_fields()
NAMES = tuple(spec.name for spec in SPECS)
ALL = ("latent", "text", "tokens", *NAMES)
SCALE = np.linspace(0.5, 1, 6, dtype=np.float32)
ACCESSES: list[tuple[Kind, ReadMode]] = [
    ("map", "map"),
    ("map", "pread"),
    ("cache", "map"),
    ("cache", "pread"),
    ("stream", "auto"),
]


def make(num: int, num_captions: int, seed: int, size: tuple[int, int] = (8, 8)) -> list[Example]:
    """Returns examples with two views and all kinds of fields."""
    return make_examples(
        num, num_captions=num_captions, views=2, fields=SPECS, seed=seed, size=size
    )


SHARDS = [make(5, 3, 0), make(4, 2, 1), make(6, 3, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, the second one with another layout."""
    folder = tmp_path_factory.mktemp("fields") / "set"
    write_set(folder, SHARDS, make_provenance(fields=SPECS), field_scales={"clip": SCALE})
    return folder


def assert_row(batch: RawBatch, row: int, example: Example) -> tuple[int, int]:
    """Compares a row with its example; returns the view and the caption that it holds."""
    found = {name: tensor[row].numpy() for name, tensor in batch.gathered.items()}
    (view,) = [n for n, latent in enumerate(example.latent) if (latent == found["latent"]).all()]
    (caption,) = [n for n, text in enumerate(example.text) if (text == found["text"]).all()]
    np.testing.assert_array_equal(found["tokens"], example.tokens[caption])
    for spec in SPECS:
        stored = example.extra[spec.name]
        item = {"view": view, "caption": caption}.get(spec.per)
        expected = stored if item is None else stored[item]
        np.testing.assert_array_equal(found[spec.name], expected, strict=True)
    return view, caption


@pytest.mark.parametrize(("kind", "read"), ACCESSES)
def test_fields_follow_their_view_and_caption(
    folder: Path, tmp_path: Path, kind: Kind, read: ReadMode
) -> None:
    access = Access(kind=kind, read=read, fields=ALL, cache_dir=tmp_path / "cache")
    shards = open_set(folder.as_uri() if kind == "cache" else str(folder), access)
    assert not isinstance(shards, tuple)
    by_key = {example.key: example for shard in SHARDS for example in shard}
    order: Any = shards.order(batch_size=5, seed=1)
    loader = make_loader(shards, order, access)
    seen = set()
    for step, batch in enumerate(batches(loader, start=0, stop=9)):
        if isinstance(loader, StreamLoader):
            keys = loader.nonfinite_keys(step)
        else:
            keys = shards.keys(order.records(step))
        seen |= {assert_row(batch, row, by_key[key]) for row, key in enumerate(keys)}
    assert seen == {(view, caption) for view in range(2) for caption in range(3)}
    assert list(shards.field_scales) == ["clip"]
    np.testing.assert_array_equal(shards.field_scales["clip"], SCALE)


@pytest.mark.parametrize("read", ["map", "pread"])
def test_fields_of_buckets(tmp_path: Path, read: ReadMode) -> None:
    sizes = {"48x80": [4, 3], "64x64": [5]}
    provenance = make_provenance(fields=[s for s in SPECS if s.name != "clip"])
    fields = provenance.fields
    write_buckets(tmp_path / "set", sizes, provenance, views=2, fields=fields)
    names = tuple(spec.name for spec in fields)
    access = Access(kind="map", read=read, fields=("latent", "text", *names))
    shards = open_set(str(tmp_path / "set"), access)
    order: Any = shards.order(batch_size=3, seed=1)
    loader = make_loader(shards, order, access)
    for step, batch in enumerate(batches(loader, start=0, stop=8)):
        u = choices(order.orders[order.locate(step)[0]].seed, order.locate(step)[1], 3)
        expected = shards.gather(order.records(step), *u)
        assert list(batch.extra) == list(names)
        for name, tensor in batch.gathered.items():
            assert torch.equal(tensor, expected.gathered[name]), name


def test_only_requested_fields_are_gathered(folder: Path) -> None:
    records, u = np.arange(15), np.linspace(0, 0.99, 15)
    whole = open_shards(folder, fields=ALL).gather(records, u, u)
    usual = open_shards(folder).gather(records, u, u)
    assert usual.extra == {}
    assert torch.equal(usual.latent, whole.latent) and torch.equal(usual.text, whole.text)
    for read in ("map", "pread"):
        some = open_shards(folder, fields=("pooled",), read=read).gather(records, u, u)
        assert (len(some), some.latent.shape, some.text.shape) == (15, (15, 0), (15, 0))
        assert torch.equal(some.extra["pooled"], whole.extra["pooled"])


def test_batches_with_fields_are_split_and_copied(folder: Path) -> None:
    u = np.zeros(15)
    batch = open_shards(folder, fields=("latent", "text", "clip")).gather(np.arange(15), u, u)
    pieces = batch.split(6)
    assert [len(piece.extra["clip"]) for piece in pieces] == [6, 6, 3]
    assert torch.equal(torch.cat([piece.extra["clip"] for piece in pieces]), batch.extra["clip"])
    assert batch.to(torch.device("meta")).extra["clip"].is_meta
    assert [id(tensor) for tensor in batch.tensors()] == [
        id(tensor) for tensor in (batch.latent, batch.text, batch.extra["clip"])
    ]


@pytest.mark.parametrize("kind", ["map", "cache", "stream"])
def test_unknown_field_is_refused(folder: Path, tmp_path: Path, kind: Kind) -> None:
    access = Access(kind=kind, fields=("latent", "depth"), cache_dir=tmp_path / "cache")
    location = folder.as_uri() if kind == "cache" else str(folder)
    with pytest.raises(FormatError, match=r"fields: expected some of \['latent', .*, found 'depth"):
        open_set(location, access)
