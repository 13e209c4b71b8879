"""The plan depends on the source only, respects both limits, and loses no record."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Index, RecordCheck, build_index
from latent_t2i.pipeline.plan import (
    SetPlan,
    ShardPlan,
    bytes_by_member,
    plan_shards,
)
from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.schema import TextDtype
from tests import shard_sets


def make_record(number: int, num_captions: int, length: int) -> Record:
    captions = tuple("x" * length for _ in range(num_captions))
    return Record(key=f"{number:06d}", locator=FileLocator("none"), captions=captions, extra={})


def index_of(records: list[Record], buckets: tuple[str, ...] = ("",)) -> Index:
    def check(chunk: Any) -> list[RecordCheck]:
        return [
            RecordCheck(
                token_ids=[[]] * len(record.captions),
                num_cut=0,
                bucket=buckets[int(record.key) % len(buckets)],
                problem=None,
            )
            for record in chunk
        ]

    return build_index(records, check, lambda number: None)


def plan_of(index: Index, bucket: str = "", **changes: Any) -> tuple[ShardPlan, ...]:
    settings = {"records_per_shard": 2, "max_shard_bytes": 10**9} | changes
    return plan_shards(
        index,
        bucket,
        Path(bucket),
        latent_shape=(1, 8, 8, 8),
        text_shape=(16, 32),
        provenance=replace(shard_sets.make_provenance("moments"), **settings),
    )


def records_of(index: Index, shard: ShardPlan) -> list[Record]:
    found = index.records(shard.bucket, shard.num_captions, shard.first, shard.last)
    return [record for record, _ in found]


def test_images_with_equally_many_captions_come_together() -> None:
    records = [make_record(n, count, 9) for n, count in enumerate([2, 3, 2, 1, 2, 3])]
    index = index_of(records)
    shards = plan_of(index)
    keys = [[int(record.key) for record in records_of(index, shard)] for shard in shards]
    assert keys == [[3], [0, 2], [4], [1, 5]]
    assert [shard.layout.num_captions for shard in shards] == [1, 2, 2, 3]
    assert [shard.index for shard in shards] == [0, 1, 2, 3]


def test_each_bucket_is_planned_alone() -> None:
    index = index_of([make_record(n, 1, 9) for n in range(5)], buckets=("64x64", "96x64"))
    keys = {
        bucket: [record.key[-1] for shard in plan_of(index, bucket, records_per_shard=9)
                 for record in records_of(index, shard)]
        for bucket in ("64x64", "96x64", "other")
    }  # fmt: skip
    assert keys == {"64x64": ["0", "2", "4"], "96x64": ["1", "3"], "other": []}


@settings(max_examples=100)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from([1, 90, 400, 900, 5000])), min_size=1
    ),
    num_records=st.integers(1, 9),
    num_bytes=st.integers(1, 150_000),
    text_dtype=st.sampled_from(["float16", "int8"]),
)
def test_shards_are_within_both_limits_and_no_shorter_than_they_need_be(
    shapes: list[tuple[int, int]], num_records: int, num_bytes: int, text_dtype: TextDtype
) -> None:
    records = [make_record(number, *shape) for number, shape in enumerate(shapes)]
    index = index_of(records)
    shards = plan_of(
        index, text_dtype=text_dtype, records_per_shard=num_records, max_shard_bytes=num_bytes
    )
    planned = [record for shard in shards for record in records_of(index, shard)]
    by_count = sorted(records, key=lambda record: len(record.captions))
    assert planned == by_count  # in the source's order for each number of captions
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for shard in shards:
        found = records_of(index, shard)
        assert len(found) == shard.num_records
        assert {len(record.captions) for record in found} == {shard.layout.num_captions}
        sizes = dict(index.sizes(shard.bucket, shard.num_captions))
        (json_bytes,) = shard.layout.fields["json"].shape
        assert max(sizes[int(record.key)] for record in found) <= json_bytes
        assert shard.layout.fields["text"].dtype == text_dtype
        assert 1 <= shard.num_records <= num_records
        assert shard.num_records == 1 or shard.num_bytes <= num_bytes
    for shard, after in pairwise(shards):
        if shard.num_captions == after.num_captions:
            longer = [*records_of(index, shard), records_of(index, after)[0]]
            (whole,) = plan_of(index_of(longer), records_per_shard=99, text_dtype=text_dtype)
            assert len(longer) > num_records or whole.num_bytes > num_bytes
    index.close()


def test_a_record_with_a_large_json_starts_a_new_shard_if_it_would_exceed_the_limit() -> None:
    records = [make_record(number, 1, length) for number, length in enumerate([9, 9, 9, 30000, 9])]
    (whole,) = plan_of(index_of(records[:3]), records_per_shard=9)
    limit = whole.layout.shard_bytes(4)
    shards = plan_of(index_of(records), records_per_shard=9, max_shard_bytes=limit)
    assert [shard.num_records for shard in shards] == [3, 1, 1]
    assert shards[1].num_bytes > limit  # a shard has at least one record


@pytest.mark.parametrize("num_records", [1, 3, 50])
def test_bytes_by_member_add_up_to_the_files(num_records: int) -> None:
    index = index_of([make_record(number, 1 + number % 2, 50) for number in range(20)])
    shards = plan_of(index, records_per_shard=num_records)
    preprocessing = Preprocessing(size_px=(64, 64))
    part = SetPlan(
        bucket="",
        folder=Path(),
        preprocessing=preprocessing,
        provenance=shard_sets.make_provenance("moments"),
        shards=shards,
    )
    sizes = bytes_by_member([part, replace(part, bucket="other")])
    assert sizes["latent"] == 2 * 20 * 2 * 8 * 8 * 8
    assert sizes["text"] == 2 * 30 * 2 * 16 * 32
    assert sizes["tokens"] == 2 * 30 * 4 * 16
    assert sum(sizes.values()) == 2 * sum(shard.num_bytes for shard in shards)
    assert part.num_records == 20
