"""The plan decides shards from the source alone, within both limits, and loses no record."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_t2i.pipeline.images import Preprocessing
from latent_t2i.pipeline.index import Examined, Index, build_index, most_meta_bytes
from latent_t2i.pipeline.plan import Limits, SetPlan, ShardPlan, bytes_by_member, plan_shards
from latent_t2i.pipeline.sources.locators import FileLocator
from latent_t2i.pipeline.sources.record import Record
from latent_t2i.shards.schema import TextDtype


def make_record(number: int, num_captions: int, length: int) -> Record:
    captions = tuple("x" * length for _ in range(num_captions))
    return Record(key=f"{number:06d}", locator=FileLocator("none"), captions=captions, extra={})


def index_of(records: list[Record], buckets: tuple[str, ...] = ("",)) -> Index:
    def examine(chunk: Any) -> list[Examined]:
        return [
            Examined(num_cut=0, bucket=buckets[int(record.key) % len(buckets)], problem=None)
            for record in chunk
        ]

    return build_index(records, examine, lambda number: None)


def plan_of(index: Index, bucket: str = "", **changes: Any) -> tuple[ShardPlan, ...]:
    limits = {"num_records": 2, "num_bytes": 10**9}
    limits |= {name: changes.pop(name) for name in limits if name in changes}
    values: dict[str, Any] = {
        "latent_shape": (1, 8, 8, 8),
        "text_shape": (16, 32),
        "text_dtype": "float16",
        "limits": Limits(**limits),
    }
    return plan_shards(index, bucket, **(values | changes))


def open_source(index: Index, shard: ShardPlan) -> list[Record]:
    return index.records(shard.bucket, shard.num_captions, shard.first, shard.last)


def test_images_with_equally_many_captions_come_together() -> None:
    records = [make_record(n, count, 9) for n, count in enumerate([2, 3, 2, 1, 2, 3])]
    index = index_of(records)
    shards = plan_of(index)
    keys = [[int(record.key) for record in open_source(index, shard)] for shard in shards]
    assert keys == [[3], [0, 2], [4], [1, 5]]
    assert [shard.layout.num_captions for shard in shards] == [1, 2, 2, 3]
    assert [shard.index for shard in shards] == [0, 1, 2, 3]


def test_each_bucket_is_planned_alone() -> None:
    index = index_of([make_record(n, 1, 9) for n in range(5)], buckets=("64x64", "96x64"))
    keys = {
        bucket: [record.key[-1] for shard in plan_of(index, bucket, num_records=9)
                 for record in open_source(index, shard)]
        for bucket in ("64x64", "96x64", "other")
    }  # fmt: skip
    assert keys == {"64x64": ["0", "2", "4"], "96x64": ["1", "3"], "other": []}


@settings(max_examples=100, deadline=None)
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
    limits: dict[str, Any] = {"num_records": num_records, "num_bytes": num_bytes}
    shards = plan_of(index, text_dtype=text_dtype, **limits)
    planned = [record for shard in shards for record in open_source(index, shard)]
    by_count = sorted(records, key=lambda record: len(record.captions))
    assert planned == by_count  # in the source's order within each number of captions
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for shard in shards:
        mine = open_source(index, shard)
        assert len(mine) == shard.num_records
        assert {len(record.captions) for record in mine} == {shard.layout.num_captions}
        assert max(map(most_meta_bytes, mine)) <= shard.layout.fields["json"].shape[0]
        assert shard.layout.fields["text"].dtype == text_dtype
        assert 1 <= shard.num_records <= num_records
        assert shard.num_records == 1 or shard.num_bytes <= num_bytes
    for shard, after in pairwise(shards):
        if shard.num_captions == after.num_captions:
            longer = [*open_source(index, shard), open_source(index, after)[0]]
            (whole,) = plan_of(index_of(longer), num_records=99, text_dtype=text_dtype)
            assert len(longer) > num_records or whole.num_bytes > num_bytes
    index.close()


def test_a_long_record_ends_a_shard_when_it_would_widen_it_past_the_limit() -> None:
    records = [make_record(number, 1, length) for number, length in enumerate([9, 9, 9, 30000, 9])]
    (whole,) = plan_of(index_of(records[:3]), num_records=9)
    limit = whole.layout.shard_bytes(4)
    shards = plan_of(index_of(records), num_records=9, num_bytes=limit)
    assert [shard.num_records for shard in shards] == [3, 1, 1]
    assert shards[1].num_bytes > limit  # it must go somewhere


@pytest.mark.parametrize("num_records", [1, 3, 50])
def test_bytes_by_member_add_up_to_the_files(num_records: int) -> None:
    index = index_of([make_record(number, 1 + number % 2, 50) for number in range(20)])
    shards = plan_of(index, num_records=num_records)
    how = Preprocessing(size_px=(64, 64))
    part = SetPlan(bucket="", folder=Path(), how=how, shards=shards)
    sizes = bytes_by_member([part, replace(part, bucket="other")])
    assert sizes["latent"] == 2 * 20 * 2 * 8 * 8 * 8
    assert sizes["text"] == 2 * 30 * 2 * 16 * 32
    assert sizes["tokens"] == 2 * 30 * 4 * 16
    assert sum(sizes.values()) == 2 * sum(shard.num_bytes for shard in shards)
    assert part.num_records == 20
