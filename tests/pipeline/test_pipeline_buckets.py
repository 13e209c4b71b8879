"""Buckets have about equal areas, and an image goes to the bucket of the nearest aspect ratio."""

import math
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_t2i.pipeline.buckets import make_buckets, nearest_bucket

ARGUMENTS = st.tuples(st.integers(1, 24), st.sampled_from([1, 8, 32, 64]), st.floats(1, 5)).map(
    lambda drawn: (drawn[0] * drawn[1], drawn[1], drawn[2])
)
SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))


def test_buckets_of_sdxl() -> None:
    """The multiples of 64 up to 7:4 from the paper's appendix (arXiv 2307.01952)."""
    assert make_buckets(1024, 64, 1.8) == (
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (960, 1088),
        (1024, 1024),
        (1088, 960),
        (1152, 896),
        (1216, 832),
        (1344, 768),
    )


@given(ARGUMENTS)
def test_invariants_of_buckets(arguments: tuple[int, int, float]) -> None:
    image_size_px, multiple_px, max_aspect = arguments
    buckets = make_buckets(*arguments)
    assert (image_size_px, image_size_px) in buckets
    assert len(set(buckets)) == len(buckets)
    assert list(buckets) == sorted(buckets, key=lambda bucket: Fraction(*bucket))
    for width, height in buckets:
        assert width % multiple_px == height % multiple_px == 0 < min(width, height)
        assert max(width, height) <= max_aspect * min(width, height)
        assert (height, width) in buckets
        area = width * height
        assert area <= image_size_px**2 < area + multiple_px * min(width, height)


@given(ARGUMENTS)
def test_no_bucket_is_missing(arguments: tuple[int, int, float]) -> None:
    """Any other size is too long, or smaller than a bucket with the same short side."""
    image_size_px, multiple_px, max_aspect = arguments
    short_sides = {min(bucket) for bucket in make_buckets(*arguments)}
    for short in range(multiple_px, image_size_px + 1, multiple_px):
        longest = image_size_px**2 // (short * multiple_px) * multiple_px
        assert (short in short_sides) == (longest <= max_aspect * short)


def test_aspect_of_one_leaves_the_square() -> None:
    assert make_buckets(256, 64, 1) == ((256, 256),)


def test_a_size_that_the_multiple_does_not_divide_is_refused() -> None:
    message = r"--image-size-px: expected a multiple of 64 \(the least .*, found 100"
    with pytest.raises(ValueError, match=message):
        make_buckets(100, 64, 2)


@given(SIZES, ARGUMENTS, st.randoms())
def test_nearest_by_logarithm(
    size_px: tuple[int, int], arguments: tuple[int, int, float], random: Random
) -> None:
    buckets = list(make_buckets(*arguments))
    found = nearest_bucket(size_px, buckets)

    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(bucket[0] / bucket[1]) - math.log(size_px[0] / size_px[1]))

    assert distance(found) <= min(map(distance, buckets)) + 1e-9
    assert nearest_bucket(size_px[::-1], buckets) == found[::-1]
    random.shuffle(buckets)
    assert nearest_bucket(size_px, buckets) == found


@given(ARGUMENTS)
def test_a_bucket_is_nearest_to_itself(arguments: tuple[int, int, float]) -> None:
    buckets = make_buckets(*arguments)
    assert [nearest_bucket(bucket, buckets) for bucket in buckets] == list(buckets)


def test_of_two_equally_near_buckets_the_squarer_is_chosen() -> None:
    """In log aspect ratio, 2:1 is as far from the square as from 4:1."""
    buckets = [(128, 32), (64, 64), (32, 128)]
    assert nearest_bucket((200, 100), buckets) == (64, 64)
    assert nearest_bucket((100, 200), buckets[::-1]) == (64, 64)
    assert nearest_bucket((201, 100), buckets) == (128, 32)


def test_photographs() -> None:
    buckets = make_buckets(512, 64, 2)
    assert nearest_bucket((640, 480), buckets) == (576, 448)
    assert nearest_bucket((480, 640), buckets) == (448, 576)
    assert nearest_bucket((9000, 100), buckets) == max(buckets)
