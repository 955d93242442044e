"""Aspect-ratio buckets: the shape that an image is trained at, by the rule of kohya's sd-scripts.

With `upscale`, a table lists shapes of at most `resolution`^2 pixels; an image takes the one nearest in aspect ratio
and is resized to cover it. Without `upscale`, an image is never enlarged: it is shrunk only if it has more than
`resolution`^2 pixels, then each side is rounded down to a multiple of `step`; `min_side` and `max_side` are ignored.
"""

import math
from functools import lru_cache

import numpy as np

from fluxq.errors import WrongRequest
from fluxq.settings import Size


def choose_bucket(
    width: int,
    height: int,
    resolution: int | Size,
    min_side: int,
    max_side: int,
    step: int,
    upscale: bool,
) -> tuple[Size, Size]:
    """The bucket of a `width` x `height` image, and the size to resize it to before the center crop.

    resolution is the side of a square, or (width, height); only its area counts. min_side is rounded down and max_side
    up to a multiple of `step`. The second size covers the first. Raises WrongRequest if `step` is not a positive
    multiple of 16, if the sides exclude `resolution`, and for an image that would need enlarging when `upscale` is off.
    """
    if width < 1 or height < 1:
        raise WrongRequest(f"an image of {width} x {height} pixels has no area; remove it or replace it")
    area = _checked_area(resolution, step)
    if upscale:
        return _nearest(width, height, bucket_table(resolution, min_side, max_side, step))
    return _without_upscale(width, height, area, step)


@lru_cache(maxsize=64)
def bucket_table(resolution: int | Size, min_side: int, max_side: int, step: int) -> tuple[Size, ...]:
    """Every bucket for `upscale`, sorted: the square, and for each side the longest other side that fits."""
    area = _checked_area(resolution, step)
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    low, high = min_side // step * step, -(-max_side // step) * step
    if not 0 < low <= min(sides) or high < max(sides):
        raise WrongRequest(
            f"buckets with sides from {min_side} to {max_side} in steps of {step} do not fit a resolution of "
            f"{sides[0]} x {sides[1]}; min_side must be between {step} and {min(sides)}, and max_side must be "
            f"{max(sides)} or more"
        )
    square = int(math.sqrt(area) // step) * step
    table = {(square, square)}
    for side in range(low, high + 1, step):
        other = min(high, area // side // step * step)
        if other >= low:
            table |= {(side, other), (other, side)}
    return tuple(sorted(table))


def _checked_area(resolution: int | Size, step: int) -> int:
    if step < 16 or step % 16:
        raise WrongRequest(f"a bucket step of {step} is not a positive multiple of 16; use 16, 32, 48 or 64")
    area = resolution * resolution if isinstance(resolution, int) else resolution[0] * resolution[1]
    if area < step * step:
        raise WrongRequest(
            f"a resolution of {resolution} is smaller than one bucket step of {step}; raise the resolution"
        )
    return area


def _nearest(width: int, height: int, table: tuple[Size, ...]) -> tuple[Size, Size]:
    """The image's own size if the table has it, else the bucket nearest in w/h; on a tie the narrowest."""
    aspect = width / height
    bucket = (width, height)
    if bucket not in table:
        bucket = table[int(np.abs(np.array([w / h for w, h in table]) - aspect).argmin())]
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))


def _without_upscale(width: int, height: int, area: int, step: int) -> tuple[Size, Size]:
    resized = _shrunk(width, height, area, step) if width * height > area else (width, height)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        raise WrongRequest(
            f"an image of {width} x {height} pixels is narrower than the bucket step of {step} once limited to "
            f"{area:,} pixels; remove it or replace it, or allow upscaling"
        )
    return bucket, resized


def _shrunk(width: int, height: int, area: int, step: int) -> Size:
    """The size of about `area` pixels with one side a multiple of `step`.

    Both sides are tried: one side is rounded down to a multiple, the other is computed from the aspect ratio and
    rounded down too. The pair closer to the image's ratio decides which side is fixed, the height on a tie; the other
    side then follows from the ratio and need not be a multiple.
    """
    aspect = width / height
    exact_width = math.sqrt(area * aspect)
    by_width = _floor_to_step(exact_width, step)
    by_height = _floor_to_step(area / exact_width, step)
    error_by_width = _ratio_error(by_width, _floor_to_step(by_width / aspect, step), aspect)
    error_by_height = _ratio_error(_floor_to_step(by_height * aspect, step), by_height, aspect)
    if error_by_width < error_by_height:
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _floor_to_step(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _ratio_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf


def multiple_of_16(name: str, pixels: int) -> int:
    """`pixels`, checked to be a multiple of 16: a token is 16 pixels wide. Raises WrongRequest otherwise."""
    if pixels % 16:
        nearest = " or ".join(str(p) for p in (pixels // 16 * 16, pixels // 16 * 16 + 16) if p)
        raise WrongRequest(f"{name} must be a multiple of 16 pixels, not {pixels}; use {nearest}")
    return pixels
