"""What goes into the shards is what the networks give for one image and caption at a time."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import encoders as networks
from pipeline import coco, encode
from pipeline.config import PipelineConfig, SourceConfig
from pipeline.encode import Encoders, examples, load_encoders
from pipeline.images import load
from pipeline.plan import make_plan, most_meta_bytes
from pipeline.provenance import hash_records
from pipeline.record import Record
from shards.schema import Example, encode_meta
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


def plan_of(records: list[Record], records_per_shard: int = 2) -> Any:
    return make_plan(
        records,
        latent_shape=(1, 8, 8, 8),
        text_shape=(16, 32),
        records_per_shard=records_per_shard,
    )


def test_plan_groups_by_number_of_captions_and_loses_none(tmp_path: Path) -> None:
    folder = make_coco(tmp_path, [2, 3, 2, 0, 2, 3])
    plan = plan_of(coco.records(folder.images, folder.captions))
    keys = [[int(record.key) for record in shard.records] for shard in plan.shards]
    assert keys == [[1, 3], [5], [2, 6]]
    assert [shard.layout.num_captions for shard in plan.shards] == [2, 2, 3]
    assert plan.quarantined == {"000000000004": "no caption"}
    assert (plan.num_source, plan.num_captions) == (6, 12)


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
