"""Aspect-ratio buckets: which shape an image is trained at, by the rule of kohya's sd-scripts.

With `upscale`, a table of shapes of at most `resolution`^2 pixels is made, the image takes the one nearest in aspect
ratio, and is resized until it covers it. Without, an image is never enlarged: it is shrunk only if it has more than
`resolution`^2 pixels, and each side is then cut down to a multiple of `step`; `min_side` and `max_side` play no part.
"""

import math
from functools import lru_cache

import numpy as np

from fluxq.errors import WrongRequest

Size = tuple[int, int]  # (width, height) in pixels


def choose_bucket(
    width: int,
    height: int,
    resolution: int | Size,
    min_side: int,
    max_side: int,
    step: int,
    upscale: bool,
) -> tuple[Size, Size]:
    """The bucket of a `width` x `height` image, and the size that the image is resized to before its center is cut
    out.

    resolution is the side of a square, or (width, height); only its area counts. A min_side or max_side that is no
    multiple of `step` is moved outwards to one. The second size covers the first. Raises WrongRequest for a step that
    is no positive multiple of 16, for sides that leave no room for `resolution`, and for an image that would need
    enlarging when `upscale` is off.
    """
    if width < 1 or height < 1:
        raise WrongRequest(f"an image of {width} x {height} pixels has no area; remove it or replace it")
    area = _checked_area(resolution, step)
    if upscale:
        return _nearest(width, height, bucket_table(resolution, min_side, max_side, step))
    return _without_upscale(width, height, area, step)


@lru_cache(maxsize=64)
def bucket_table(resolution: int | Size, min_side: int, max_side: int, step: int) -> tuple[Size, ...]:
    """Every bucket that `upscale` chooses from, sorted: the square, and for each side the longest other that fits."""
    area = _checked_area(resolution, step)
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    low, high = min_side // step * step, -(-max_side // step) * step
    if not 0 < low <= min(sides) or high < max(sides):
        raise WrongRequest(
            f"buckets with sides from {min_side} to {max_side} in steps of {step} do not fit a resolution of "
            f"{sides[0]} x {sides[1]}; min_side must lie between {step} and {min(sides)}, and max_side must be "
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
        raise WrongRequest(f"a bucket step of {step} is no positive multiple of 16; use 16, 32, 48 or 64")
    area = resolution * resolution if isinstance(resolution, int) else resolution[0] * resolution[1]
    if area < step * step:
        raise WrongRequest(
            f"a resolution of {resolution} is smaller than one bucket step of {step}; raise the resolution"
        )
    return area


def _nearest(width: int, height: int, table: tuple[Size, ...]) -> tuple[Size, Size]:
    """The image's own size if the table has it, else the nearest w/h; of equally near ones the narrowest."""
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
            f"an image of {width} x {height} pixels is, at no more than {area:,} pixels, narrower than a bucket "
            f"step of {step}; remove it or replace it, or allow upscaling"
        )
    return bucket, resized


def _shrunk(width: int, height: int, area: int, step: int) -> Size:
    """The size of nearly `area` pixels that has one side on a multiple of `step`.

    Both sides are tried: each is rounded and cut to a multiple, the other follows from the aspect ratio and is cut
    likewise, and the pair nearer to the image's ratio decides which side is set; the other then follows unrounded. On
    a tie the height is set.
    """
    aspect = width / height
    exact_width = math.sqrt(area * aspect)
    by_width = _cut(exact_width, step)
    by_height = _cut(area / exact_width, step)
    error_by_width = _ratio_error(by_width, _cut(by_width / aspect, step), aspect)
    error_by_height = _ratio_error(_cut(by_height * aspect, step), by_height, aspect)
    if error_by_width < error_by_height:
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _cut(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _ratio_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf


def multiple_of_16(name: str, pixels: int) -> int:
    """`pixels`, if it is a multiple of 16: a token is 16 pixels wide."""
    if pixels % 16:
        nearest = " or ".join(str(p) for p in (pixels // 16 * 16, pixels // 16 * 16 + 16) if p)
        raise WrongRequest(f"{name} must be a multiple of 16 pixels, not {pixels}; {nearest} would do")
    return pixels
