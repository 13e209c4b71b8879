"""Aspect-ratio buckets: few shapes of about equal area, so that little of a picture is cut off.

As NovelAI's and SDXL's: no bucket has more pixels than the square, so none needs more memory. An
image goes to the bucket nearest to it by the logarithm of the aspect ratio, which treats portrait
and landscape alike. All is exact, hence the same on every machine.
"""

from collections.abc import Iterable

Size = tuple[int, int]
"""(width, height) in pixels."""


def make_buckets(image_size_px: int, multiple_px: int, max_aspect: float) -> tuple[Size, ...]:
    """Returns the buckets, narrowest first: one for each short side, its long side the longest.

    Sides are multiples of `multiple_px`, areas at most `image_size_px` squared, and no side is more
    than `max_aspect` times the other. The square of `image_size_px` is among them, and with each
    bucket the same one turned. Raises ValueError if `multiple_px` does not divide `image_size_px`.
    """
    for flag, value in (("--image-size-px", image_size_px), ("multiple_px", multiple_px)):
        if value < 1:
            raise ValueError(f"{flag}: expected at least 1, found {value}")
    if image_size_px % multiple_px:
        raise ValueError(
            f"--image-size-px: expected a multiple of {multiple_px} for buckets, found "
            f"{image_size_px}"
        )
    if not max_aspect >= 1:
        raise ValueError(f"--bucket-max-aspect: expected at least 1, found {max_aspect}")
    pairs = [
        (short, image_size_px**2 // short // multiple_px * multiple_px)
        for short in range(multiple_px, image_size_px + 1, multiple_px)
    ]
    kept = [(short, long) for short, long in pairs if long <= max_aspect * short]
    return (*kept, *((long, short) for short, long in reversed(kept) if long != short))


def nearest_bucket(size_px: Size, buckets: Iterable[Size]) -> Size:
    """Returns the bucket whose aspect ratio is nearest to that of an image of `size_px`.

    Of two that are equally near, the squarer one; the buckets' order does not matter. Raises
    ValueError if there is none.
    """
    width, height = size_px

    def distance(bucket: Size) -> tuple[float, float, Size]:
        across, down = bucket[0] * height, bucket[1] * width
        # The quotient of two ratios grows with the difference of their logarithms; dividing whole
        # numbers is rounded exactly, which a logarithm need not be.
        return max(across, down) / min(across, down), max(bucket) / min(bucket), bucket

    return min(buckets, key=distance)
