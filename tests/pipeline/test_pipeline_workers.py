"""Parallel encoding gives what the networks give for one image and one caption at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latent_t2i.model import encoders as networks
from latent_t2i.pipeline import encode, workers
from latent_t2i.pipeline.config import SourceConfig, ViewsConfig
from latent_t2i.pipeline.encode import Encoders, single_threaded
from latent_t2i.pipeline.images import Preprocessing, load
from latent_t2i.pipeline.index import TokenizedRecord
from latent_t2i.pipeline.producers import vae
from latent_t2i.pipeline.producers.producer import Captions
from latent_t2i.pipeline.quantise import Quantiser
from latent_t2i.pipeline.sources import coco
from latent_t2i.pipeline.sources.locators import FileLocator, read_image_bytes
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.pipeline.stage import load_encoders
from latent_t2i.pipeline.workers import Batch, EncoderPool, Skipped, cut_batches
from latent_t2i.shards.schema import Example
from tests import tiny
from tests.coco_folders import make_coco
from tests.stage_one import make_config

PREPROCESSING = Preprocessing(size_px=(64, 64), crops=2)
VIEWS = ViewsConfig(flip=True, crops=2)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    config = make_config(SourceConfig(images="i", captions="c"), Path("out"), views=VIEWS)
    return load_encoders(config, torch.device("cpu"))


def test_the_hash_of_a_bfloat16_vae_is_that_of_its_float32_weights(encoders: Encoders) -> None:
    source = SourceConfig(images="i", captions="c")
    config = make_config(source, Path("out"), vae_dtype="bfloat16")
    rounded = load_encoders(config, torch.device("cpu"))
    assert {p.dtype for p in rounded.vae.network.parameters()} == {torch.bfloat16}
    assert rounded.vae.identity == encoders.vae.identity
    assert encoders.vae.identity.sha256 == networks.fingerprint(encoders.vae.network)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    folder = make_coco(tmp_path, [3] * 6)
    return list(coco.records(folder.images, folder.captions))


def batches_of(records: Sequence[Record], encoders: Encoders, shard: Any = None) -> list[Batch]:
    tokenized = [TokenizedRecord(r, encoders.text.tokenize(r.captions)) for r in records]
    return list(cut_batches(shard, tokenized, PREPROCESSING, encoders.batch_size))


def run(
    encoders: Encoders, *shards: Sequence[Record], num_threads: int = 2, quantise: Any = None
) -> list[tuple[Batch, list[Example | Skipped]]]:
    with (
        single_threaded(),
        EncoderPool(encoders, num_threads=num_threads, quantise=quantise) as pool,
    ):
        parts = (batches_of(records, encoders, number) for number, records in enumerate(shards))
        return list(pool.encode(batch for part in parts for batch in part))


def encode_all(
    records: Sequence[Record], encoders: Encoders, **changes: Any
) -> tuple[list[Example], dict[str, str]]:
    items = [item for _, items in run(encoders, records, **changes) for item in items]
    skipped = {item.key: item.reason for item in items if isinstance(item, Skipped)}
    return [item for item in items if isinstance(item, Example)], skipped


def test_parity_with_one_at_a_time(records: list[Record], encoders: Encoders) -> None:
    """Every second view is the flipped crop's latent, not the flipped latent."""
    found, skipped = encode_all(records, encoders)
    assert not skipped
    for record, example in zip(records, found, strict=True):
        pixels = load(read_image_bytes(record.locator), PREPROCESSING, key=record.key).pixels
        crops = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None].float() / 127.5 - 1
        views = [view for crop in crops for view in (crop, crop.flip(3))]
        assert len(example.latent) == len(views) == VIEWS.num
        for view, one in enumerate(views):
            with torch.no_grad():
                expected = networks.encode_images(encoders.vae.network, one)[0]
            torch.testing.assert_close(
                torch.from_numpy(example.latent[view]).float(), expected, rtol=1e-3, atol=1e-3
            )
        for index, caption in enumerate(record.captions):
            with torch.no_grad():
                token_ids = encoders.text.tokenize([caption])
                hidden, ids, cut = encoders.text.encoder.encode(token_ids, 16)
            text = torch.from_numpy(example.text[index]).float()
            torch.testing.assert_close(text, hidden[0], rtol=1e-3, atol=1e-3)
            assert example.tokens[index].tolist() == ids[0].tolist()
            assert (index in example.meta["truncated"]) == bool(cut[0])


def test_batch_size_does_not_matter(records: list[Record], encoders: Encoders) -> None:
    first, _ = encode_all(records, encoders)
    second, _ = encode_all(records, replace(encoders, batch_size=1))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a.latent, b.latent, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(a.text, b.text, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_bits_do_not_depend_on_threads(
    records: list[Record], encoders: Encoders, num_threads: int
) -> None:
    first, _ = encode_all(records, encoders, num_threads=2)
    second, _ = encode_all(records, encoders, num_threads=num_threads)
    for a, b in zip(first, second, strict=True):
        assert a.latent.tobytes() == b.latent.tobytes() and a.text.tobytes() == b.text.tobytes()


def test_bits_of_a_shard_do_not_depend_on_other_shards(
    records: list[Record], encoders: Encoders
) -> None:
    alone, _ = encode_all(records[3:], encoders)
    results = run(encoders, records[:3], records[3:])
    assert [batch.shard for batch, _ in results] == [0, 1]
    for a, b in zip(alone, results[1][1], strict=True):
        assert isinstance(b, Example) and a.key == b.key
        assert a.latent.tobytes() == b.latent.tobytes() and a.text.tobytes() == b.text.tobytes()


def test_results_are_in_order_and_the_last_of_a_shard_is_marked(
    records: list[Record], encoders: Encoders
) -> None:
    results = run(encoders, records, records[:5], records[:1])
    assert [(batch.shard, len(items), batch.is_last) for batch, items in results] == [
        (0, 4, False),
        (0, 2, True),
        (1, 4, False),
        (1, 1, True),
        (2, 1, True),
    ]


def test_each_distinct_caption_of_a_shard_is_encoded_once_and_released(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Sequence[int]] = []
    original = encode.encode_captions

    def recording(encoders: Encoders, captions: Captions) -> Any:
        encoded.extend(captions.values())
        return original(encoders, captions)

    monkeypatch.setattr(workers, "encode_captions", recording)
    encode_all(records, encoders)
    distinct = sorted({caption for record in records for caption in record.captions})
    assert sorted(encoded) == sorted(encoders.text.tokenize(distinct))
    batches = batches_of(records, encoders)
    batched = [caption for batch in batches for part in batch.captions for caption in part]
    released = [caption for batch in batches for caption in batch.last_uses]
    assert sorted(batched) == sorted(released) == distinct
    assert "a picture" in batches[0].captions[0] and "a picture" in batches[-1].last_uses


def test_captions_have_batches_of_their_own(encoders: Encoders) -> None:
    records = [
        Record(
            key=f"{number}",
            locator=FileLocator("none"),
            captions=tuple(f"{number} {index}" for index in range(9)),
            extra={},
        )
        for number in range(8)
    ]
    batches = batches_of(records, encoders)
    assert [[len(part) for part in batch.captions] for batch in batches] == [[16, 16, 16], [16, 8]]


def test_unreadable_images_are_skipped_with_the_reason(
    records: list[Record], encoders: Encoders
) -> None:
    broken, missing = records[1].locator, records[4].locator
    assert isinstance(broken, FileLocator) and isinstance(missing, FileLocator)
    Path(broken.path).write_text("no picture")
    Path(missing.path).unlink()
    found, skipped = encode_all(records, encoders)
    assert skipped == {records[1].key: "not an image", records[4].key: "missing file"}
    assert [example.key for example in found] == [records[n].key for n in (0, 2, 3, 5)]
    assert encode_all([records[1], records[4]], encoders)[0] == []


def test_truncated_captions_are_marked(records: list[Record], encoders: Encoders) -> None:
    long = "a very long caption"
    (example,), _ = encode_all([replace(records[0], captions=("a dog", long))], encoders)
    assert example.meta["truncated"] == [1]
    assert example.meta["captions"] == ["a dog", long]


def test_a_latent_that_is_not_finite_is_skipped(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = networks.encode_images

    def overflow(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        latents = original(vae, images)
        latents[1] = 1e6  # more than float16 holds
        return latents

    monkeypatch.setattr(vae, "encode_images", overflow)
    found, skipped = encode_all(records[:3], encoders)
    assert [example.key for example in found] == [records[0].key, records[2].key]
    assert skipped == {records[1].key: "latent is not finite in float16"}


def test_text_that_is_not_finite_is_skipped(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = encode.encode_captions

    def broken(encoders: Encoders, captions: Captions) -> Any:
        fields = original(encoders, captions)
        return fields | {"text": np.full_like(fields["text"], np.nan)}

    monkeypatch.setattr(workers, "encode_captions", broken)
    found, skipped = encode_all(records, encoders, quantise=no_call)
    assert found == []
    assert skipped == dict.fromkeys((r.key for r in records), "text is not finite in float16")


def no_call(text: NDArray[np.float16]) -> NDArray[np.int8]:
    raise AssertionError("called")


def test_int8_text_is_the_float16_text_quantised(records: list[Record], encoders: Encoders) -> None:
    scale = np.full(tiny.TEXT_WIDTH, 0.05, np.float32)
    expected, _ = encode_all(records, encoders)
    found, skipped = encode_all(records, encoders, quantise=Quantiser(scale))
    assert not skipped
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(b.text, Quantiser(scale)(a.text))
        np.testing.assert_array_equal(b.latent, a.latent)
        assert b.text.dtype == np.int8


def test_an_error_of_the_system_ends_the_run(
    records: list[Record], encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(locator: Any) -> bytes:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(workers, "read_image_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        encode_all(records, encoders)
