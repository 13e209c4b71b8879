"""Aspect-ratio buckets: a few sizes of about equal area, so that little of an image is cropped.

As in NovelAI's and SDXL's training, no bucket has more pixels than the square, so none needs more
memory. All arithmetic is exact, so every machine chooses the same bucket.
"""

from collections.abc import Iterable

Size = tuple[int, int]
"""(width, height) in pixels."""


def make_buckets(image_size_px: int, multiple_px: int, max_aspect: float) -> tuple[Size, ...]:
    """Returns the buckets, narrowest first: one per short side, with the longest long side.

    Sides are multiples of `multiple_px`, areas at most `image_size_px` squared, and the ratio of
    the sides at most `max_aspect`. The square is among them, and every bucket also turned by 90
    degrees. Raises ValueError if `multiple_px` does not divide `image_size_px`.
    """
    if image_size_px % multiple_px:
        raise ValueError(
            f"--image-size-px: expected a multiple of {multiple_px} (the least common multiple of "
            f"--bucket-multiple-px and the VAE's downscaling factor), found {image_size_px}"
        )
    pairs = [
        (short, image_size_px**2 // short // multiple_px * multiple_px)
        for short in range(multiple_px, image_size_px + 1, multiple_px)
    ]
    kept = [(short, long) for short, long in pairs if long <= max_aspect * short]
    return (*kept, *((long, short) for short, long in reversed(kept) if long != short))


def nearest_bucket(size_px: Size, buckets: Iterable[Size]) -> Size:
    """Returns the bucket whose log aspect ratio is nearest to that of an image of `size_px`.

    Of two equally near ones, the squarer; the order of `buckets` does not matter.
    """
    width, height = size_px

    def distance(bucket: Size) -> tuple[float, float, Size]:
        across, down = bucket[0] * height, bucket[1] * width
        # The quotient of two ratios grows with the difference of their logarithms. Division of
        # integers is rounded exactly, which a logarithm need not be.
        return max(across, down) / min(across, down), max(bucket) / min(bucket), bucket

    return min(buckets, key=distance)
