"""What goes into the shards is what the networks give for one image and caption at a time."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model import encoders as networks
from pipeline import coco, encode
from pipeline.config import PipelineConfig, SourceConfig
from pipeline.encode import Encoders, examples, load_encoders
from pipeline.images import load
from pipeline.plan import Plan, make_plan, most_meta_bytes
from pipeline.provenance import hash_records
from pipeline.quantise import Quantiser
from pipeline.record import Record
from shards.schema import Example, TextDtype, encode_meta
from tests import tiny
from tests.coco_folders import make_coco


def make_config(**changes: Any) -> PipelineConfig:
    folders = tiny.encoders()
    values: dict[str, Any] = {
        "name": "n",
        "vae": folders.vae,
        "text_encoder": folders.clip,
        "source": SourceConfig(images="i", captions="c"),
        "max_tokens": 16,
        "views": 2,
        "batch_size": 4,
        "device": "cpu",
    }
    return PipelineConfig(**(values | changes))


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(make_config())


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    folder = make_coco(tmp_path, [3] * 6)
    return coco.records(folder.images, folder.captions)


def encode_all(records: list[Record], encoders: Encoders) -> tuple[list[Example], dict[str, str]]:
    left_out: dict[str, str] = {}
    with ThreadPoolExecutor(2) as pool:
        found = list(examples(records, encoders, pool, quarantine=left_out.__setitem__))
    return found, left_out


def test_parity_with_one_at_a_time(records: list[Record], encoders: Encoders) -> None:
    """Also of the embedded flip: the second view is the flipped image's, not the latent's."""
    found, left_out = encode_all(records, encoders)
    assert not left_out
    for record, example in zip(records, found, strict=True):
        picture = torch.from_numpy(load(record.path, 64).pixels.copy()).permute(2, 0, 1)[None]
        image = picture.float() / 127.5 - 1
        for view, pixels in enumerate((image, image.flip(3))):
            expected = networks.encode_images(encoders.vae, pixels)[0]
            torch.testing.assert_close(
                torch.from_numpy(example.latent[view]).float(), expected, rtol=1e-3, atol=1e-3
            )
        for index, caption in enumerate(record.captions):
            ids, cut = networks.tokenize(encoders.tokenizer, [caption], 16)
            hidden = networks.encode_text(encoders.text_encoder, ids)[0]
            text = torch.from_numpy(example.text[index]).float()
            torch.testing.assert_close(text, hidden, rtol=1e-3, atol=1e-3)
            assert example.tokens[index].tolist() == ids[0].tolist()
            assert (index in example.meta["truncated"]) == bool(cut)


def test_batch_size_does_not_matter(records: list[Record], encoders: Encoders) -> None:
    first, _ = encode_all(records, encoders)
    second, _ = encode_all(records, replace(encoders, batch_size=1))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a.latent, b.latent, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(a.text, b.text, rtol=2e-3, atol=2e-3)


def test_each_distinct_caption_is_encoded_once_and_let_go(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Counter[str] = Counter()
    original = encode.encode_captions

    def counting(encoders: Encoders, captions: list[str]) -> Any:
        encoded.update(captions)
        return original(encoders, captions)

    monkeypatch.setattr(encode, "encode_captions", counting)
    encode_all(records, encoders)
    assert set(encoded) == {caption for record in records for caption in record.captions}
    assert set(encoded.values()) == {1}
    captions = encode.Captions(records, encoders)
    for record in records:
        captions.take(record.captions)
    assert captions._encoded == {}


def test_captions_of_unreadable_images_are_let_go(
    records: list[Record], encoders: Encoders
) -> None:
    captions = encode.Captions(records, encoders)
    for record in records[:-1]:
        captions.drop(record.captions)
    captions.take(records[-1].captions)
    assert captions._encoded == {}


def test_truncated_captions_are_told(records: list[Record], encoders: Encoders) -> None:
    long = "a very long caption"
    (example,), _ = encode_all([replace(records[0], captions=("a dog", long))], encoders)
    assert example.meta["truncated"] == [1]
    assert example.meta["captions"] == ["a dog", long]


def test_values_that_are_not_finite_are_left_out(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = networks.encode_images

    def overflow(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        moments = original(vae, images)
        moments[1] = 1e6  # more than float16 holds
        return moments

    monkeypatch.setattr(encode, "encode_images", overflow)
    found, left_out = encode_all(records[:3], encoders)
    assert [example.key for example in found] == [records[0].key, records[2].key]
    assert left_out == {records[1].key: "latent is not finite in float16"}


def test_text_that_is_not_finite_is_left_out(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encode, "encode_text", lambda encoder, ids: torch.full((*ids.shape, 32), torch.nan)
    )
    _, left_out = encode_all(records[:1], encoders)
    assert left_out == {records[0].key: "text is not finite in float16"}
    with ThreadPoolExecutor(2) as pool:  # before it would become an int8, and so finite
        found = examples(records, encoders, pool, quarantine=left_out.__setitem__, quantise=no_call)
        assert list(found) == []
    assert len(left_out) == len(records)


def no_call(text: NDArray[np.float16]) -> NDArray[np.int8]:
    raise AssertionError("called")


def test_int8_text_is_the_float16_text_quantised(records: list[Record], encoders: Encoders) -> None:
    quantise = Quantiser(np.full(tiny.TEXT_WIDTH, 0.05, np.float32))
    expected, _ = encode_all(records, encoders)
    with ThreadPoolExecutor(2) as pool:
        left_out: dict[str, str] = {}
        quarantine = left_out.__setitem__
        found = list(examples(records, encoders, pool, quarantine=quarantine, quantise=quantise))
    assert not left_out
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(b.text, Quantiser(np.full(32, 0.05, np.float32))(a.text))
        np.testing.assert_array_equal(b.latent, a.latent)
        assert b.text.dtype == np.int8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size_px": 60}, "--image-size-px: 60 is not a multiple of 8, by which the VAE"),
        ({"max_tokens": 78}, "--max-tokens: 78 is more than the 77 that the text encoder"),
        ({"device": "abacus"}, "--device: no device is called 'abacus'"),
        ({"device": "cuda:99"}, "--device: 'cuda:99' asked for, but there are"),
        ({"vae": "nowhere/vae"}, "--vae: .*'nowhere/vae'"),
        ({"text_encoder": "nowhere/clip"}, "--text-encoder: .*'nowhere/clip'"),
    ],
)
def test_encoders_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoders(make_config(**changes))


def plan_of(records: list[Record], **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "latent_shape": (1, 8, 8, 8),
        "text_shape": (16, 32),
        "text_dtype": "float16",
        "records_per_shard": 2,
        "max_shard_bytes": 10**9,
    }
    return make_plan(records, **(settings | changes))


def test_plan_groups_by_number_of_captions_and_loses_none(tmp_path: Path) -> None:
    folder = make_coco(tmp_path, [2, 3, 2, 0, 2, 3])
    plan = plan_of(coco.records(folder.images, folder.captions))
    keys = [[int(record.key) for record in shard.records] for shard in plan.shards]
    assert keys == [[1, 3], [5], [2, 6]]
    assert [shard.layout.num_captions for shard in plan.shards] == [2, 2, 3]
    assert plan.quarantined == {"000000000004": "no caption"}
    assert (plan.num_source, plan.num_captions) == (6, 12)


def make_record(index: int, num_captions: int, length: int) -> Record:
    captions = tuple("x" * length for _ in range(num_captions))
    return Record(key=f"{index:06d}", path=Path("none"), captions=captions, extra={})


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([1, 90, 400, 900, 5000])), min_size=1
    ),
    records_per_shard=st.integers(1, 9),
    max_shard_bytes=st.integers(1, 150_000),
    text_dtype=st.sampled_from(["float16", "int8"]),
)
def test_shards_are_within_both_limits_and_no_shorter_than_they_need_be(
    shapes: list[tuple[int, int]],
    records_per_shard: int,
    max_shard_bytes: int,
    text_dtype: TextDtype,
) -> None:
    records = [make_record(index, *shape) for index, shape in enumerate(shapes)]
    limits: dict[str, Any] = {
        "records_per_shard": records_per_shard,
        "max_shard_bytes": max_shard_bytes,
        "text_dtype": text_dtype,
    }
    plan = plan_of(records, **limits)
    assert plan == plan_of(records, **limits)
    planned = [record for shard in plan.shards for record in shard.records]
    by_count = sorted((r for r in records if r.captions), key=lambda r: len(r.captions))
    assert planned == by_count  # in the source's order within each number of captions
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    for shard in plan.shards:
        size = len(shard.records)
        assert {len(record.captions) for record in shard.records} == {shard.layout.num_captions}
        assert max(map(most_meta_bytes, shard.records)) <= shard.layout.fields["json"].shape[0]
        assert shard.layout.fields["text"].dtype == text_dtype
        assert 1 <= size <= records_per_shard
        assert size == 1 or shard.layout.shard_bytes(size) <= max_shard_bytes
    for shard, after in pairwise(plan.shards):
        if shard.layout.num_captions == after.layout.num_captions:
            longer = (*shard.records, after.records[0])
            (whole,) = plan_of(list(longer), records_per_shard=99, text_dtype=text_dtype).shards
            too_many = len(longer) > records_per_shard
            assert too_many or whole.layout.shard_bytes(len(longer)) > max_shard_bytes


def test_a_long_record_ends_a_shard_when_it_would_widen_it_past_the_limit() -> None:
    records = [make_record(index, 1, length) for index, length in enumerate([9, 9, 9, 30000, 9])]
    (whole,) = plan_of(records[:3], records_per_shard=9).shards
    limit = whole.layout.shard_bytes(4)
    plan = plan_of(records, records_per_shard=9, max_shard_bytes=limit)
    assert [len(shard.records) for shard in plan.shards] == [3, 1, 1]
    assert plan.shards[1].layout.shard_bytes(1) > limit  # it must go somewhere


def test_plan_reserves_room_for_any_outcome(records: list[Record]) -> None:
    record = replace(records[0], captions=("é" * 300, "🐕"))
    (shard,) = plan_of([record]).shards
    meta = {"captions": list(record.captions), "truncated": [0, 1]}
    meta |= {"source_size_px": [20000, 20000], **record.extra}
    assert len(encode_meta(meta)) <= most_meta_bytes(record) <= shard.layout.fields["json"].shape[0]


def test_plan_refusals(records: list[Record]) -> None:
    with pytest.raises(ValueError, match="the source has no images"):
        plan_of([])
    with pytest.raises(ValueError, match="two records of key '000000000001'"):
        plan_of([records[0], records[0]])


def test_source_hash_sees_every_change(records: list[Record]) -> None:
    first = records[0]
    variants = [
        records,
        records[1:],
        [*records[1:], first],
        [replace(first, captions=("other",)), *records[1:]],
        [replace(first, extra={"image_id": 7}), *records[1:]],
        [replace(first, path=Path("other.png")), *records[1:]],
    ]
    assert len({hash_records(variant) for variant in variants}) == len(variants)
    moved = [replace(record, path=Path("/moved") / record.path.name) for record in records]
    assert hash_records(moved) == hash_records(records)
